import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.transports import ucx_protocol as protocol
from kvtransfer.transports.base import Read
from kvtransfer.transports.batches import batches
from kvtransfer.transports.ucx_settings import loopback_only

NONCE = bytes(range(16))


@given(st.binary(min_size=1, max_size=protocol.MAX_ADDRESS), st.binary(max_size=20))
def test_a_hello_travels_whatever_follows_it(address, junk):
    hello = protocol.Hello(NONCE, address)
    raw = (protocol.pack_hello(hello) + junk)[: protocol.HELLO_BYTES]
    assert protocol.unpack_hello(raw.ljust(protocol.HELLO_BYTES, b"\0")) == hello


def test_an_address_that_has_no_room():
    with pytest.raises(ValueError):
        protocol.pack_hello(protocol.Hello(NONCE, bytes(protocol.MAX_ADDRESS + 1)))


@given(st.binary(max_size=80))
def test_any_bytes_are_a_hello_or_an_error(start):
    with contextlib.suppress(protocol.ProtocolError):
        protocol.unpack_hello(start.ljust(protocol.HELLO_BYTES, b"\1"))


RANGES = st.lists(
    st.tuples(st.integers(0, 900), st.integers(1, 100)), min_size=1, max_size=protocol.MAX_RANGES
)


@given(RANGES)
def test_a_request_travels(ranges):
    raw = protocol.pack_request(ranges)
    assert len(raw) == protocol.REQUEST_BYTES
    assert protocol.unpack_request(raw, 1000) == ranges


@given(st.binary(max_size=80))
def test_any_bytes_are_a_request_within_bounds_or_an_error(start):
    try:
        ranges = protocol.unpack_request(start.ljust(protocol.REQUEST_BYTES, b"\1"), 1000)
    except protocol.ProtocolError:
        return
    assert all(n > 0 and offset + n <= 1000 for offset, n in ranges)


@pytest.mark.parametrize(
    "ranges", [[], [(1000, 1)], [(0, 1001)], [(999, 2)], [(5, 0)], [(2**64 - 1, 2)]]
)
def test_requests_that_may_not_be(ranges):
    with pytest.raises(protocol.ProtocolError):
        protocol.unpack_request(protocol.pack_request(ranges), 1000)


def test_a_request_of_too_many_bytes():
    ranges = [(0, protocol.MAX_BYTES), (0, 1)]
    with pytest.raises(protocol.ProtocolError):
        protocol.unpack_request(protocol.pack_request(ranges), 2**40)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40))
def test_words_travel(words):
    raw = protocol.pack_reply(words)
    assert len(raw) == protocol.REPLY_BYTES
    assert protocol.unpack_reply(raw) == words


def test_words_that_are_too_long_are_cut():
    assert protocol.unpack_reply(protocol.pack_reply("é" * 300)).startswith("é" * 128)


@given(
    st.lists(st.builds(Read, st.integers(0, 99), st.integers(0, 99), st.integers(0, 50))),
    st.integers(1, 5),
    st.integers(1, 30),
)
def test_batches_are_the_same_bytes_in_order_and_bounded(reads, max_ranges, max_bytes):
    cut = batches(reads, max_ranges, max_bytes)
    assert all(0 < len(batch) <= max_ranges for batch in cut)
    assert all(0 < sum(r.length for r in batch) <= max_bytes for batch in cut)
    assert [
        (r.remote + i, r.local + i) for batch in cut for r in batch for i in range(r.length)
    ] == [(r.remote + i, r.local + i) for r in reads for i in range(r.length)]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_loopback_stays_on_loopback(host):
    assert loopback_only(host) == {"NET_DEVICES": "lo"}


@pytest.mark.parametrize("host", ["", "0.0.0.0", "10.0.0.1", "kv.example", "::"])
def test_other_hosts_leave_it_to_ucx(host):
    assert loopback_only(host) == {}
