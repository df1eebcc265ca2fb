"""What every transport must do (kvtransfer/transports/base.py). Source and sink are two processes.

Memory on both sides holds known bytes, so a test can tell where each byte came from.
"""

import asyncio
import contextlib
import functools
import gc
import random
import secrets
import signal
import time

import numpy as np
import psutil
import pytest

from kvtransfer.errors import TransportError
from kvtransfer.memory import NONCE_BYTES, Segment
from kvtransfer.offload import Offload
from kvtransfer.transports import nixl_agent, ucx_worker
from kvtransfer.transports.base import Offer, Read, Transport
from kvtransfer.transports.nixl import NixlTransport
from kvtransfer.transports.shm import ShmTransport, host_identity
from kvtransfer.transports.tcp import TcpTransport
from kvtransfer.transports.ucx import UcxTransport
from tests.contract.kv_rig import RemoteSource
from tests.contract.transport_source import filled

NAMES = ("shm", "tcp", "ucx", "nixl", "nixl over tcp")
"""The last is what NIXL does across hosts without RDMA, where it needs the source's help."""
SOURCE_BYTES = 20 * 2**20 + 17
SINK_BYTES = 28 * 2**20
LARGE = 12 * 2**20
"""A read that no buffer on the way holds; less than half of the sink's memory."""


ABSENT = {"ucx": ucx_worker.load().why_not, "nixl": nixl_agent.load()[2]}
"""Why a package is not there, "" if it is."""


@pytest.fixture(params=NAMES)
def name(request) -> str:
    if why := ABSENT.get(request.param.split()[0]):
        pytest.skip(why)
    return request.param


class TransportSource(RemoteSource):
    """A process that serves one transport: transport_source.py."""

    script = "transport_source.py"

    def __init__(self, name: str) -> None:
        transport, *over = name.split()
        env = {"UCX_TLS": "tcp"} if over else {}
        super().__init__(env=env, transport=transport, data_bytes=SOURCE_BYTES)


@pytest.fixture(scope="module")
def shared_sources():
    """One source for each transport, for tests that don't harm it."""
    sources = {n: TransportSource(n) for n in NAMES if not ABSENT.get(n.split()[0])}
    yield sources
    for source in sources.values():
        source.close()


@pytest.fixture
def own_source(name):
    """A source for a test that harms it."""
    source = TransportSource(name)
    yield source
    source.close()


@pytest.fixture
def segment():
    segment = Segment(SINK_BYTES, secrets.token_bytes(NONCE_BYTES))
    yield segment
    segment.close()


@pytest.fixture
async def sink(name, segment):
    """The transport at the sink."""
    offload = Offload()
    made: Transport
    if name == "shm":
        made = ShmTransport(segment, offload, host_identity(), idle_seconds=0.2)
    elif name == "tcp":
        made = TcpTransport(segment, "127.0.0.1", 0, idle_seconds=0.2)
    elif name == "ucx":
        made = UcxTransport(segment, "127.0.0.1", idle_seconds=0.2)
    else:
        ucx = {"TLS": "tcp"} if name == "nixl over tcp" else {}
        made = NixlTransport(segment, "127.0.0.1", ucx=ucx, idle_seconds=0.2, grace_seconds=0.3)
    await made.start()
    yield made
    await made.close()
    offload.close()


@functools.cache
def whole() -> np.ndarray:
    """What every source's memory holds."""
    return filled(SOURCE_BYTES)


class Place:
    """A source's ticket, address and bytes."""

    def __init__(self, source: RemoteSource, ticket: dict) -> None:
        self.address = source.address
        self.ticket = Offer(ticket["name"], ticket["attributes"])
        self.data = whole()


@pytest.fixture
async def place(name, shared_sources) -> Place:
    source = shared_sources[name]
    return Place(source, await source.do("ticket"))


@pytest.fixture
async def own_place(own_source) -> Place:
    return Place(own_source, await own_source.do("ticket"))


def disjoint(seed: int, remote_bytes: int, count: int, largest: int) -> list[Read]:
    """Reads of anywhere to places that do not overlap."""
    rng = random.Random(seed)
    reads, at = [], 0
    for _ in range(count):
        length = rng.choice([0, 1, 7, 64, 4096, largest])
        at += rng.choice([0, 1, 100])
        reads.append(Read(rng.randrange(remote_bytes - length), at, length))
        at += length
    rng.shuffle(reads)
    return reads


async def eventually(condition) -> None:
    """Lets the loop run until something is so."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


@pytest.mark.parametrize(("count", "largest"), [(1, 1), (40, 100_000), (1000, 10_000)])
async def test_reads_put_each_byte_in_its_place_and_touch_no_other(
    sink, place, segment, count, largest
):
    segment.data[:] = expected = np.full(SINK_BYTES, 0xEE, np.uint8)
    reads = disjoint(count, len(place.data), count, largest)
    reader = await sink.connect(place.ticket, place.address, 5)
    await reader.read(reads, 10)
    await reader.close()
    for read in reads:
        source = place.data[read.remote : read.remote + read.length]
        expected[read.local : read.local + read.length] = source
    assert np.array_equal(segment.data, expected)


async def test_one_read_larger_than_any_buffer(sink, place, segment):
    size = LARGE
    reader = await sink.connect(place.ticket, place.address, 5)
    await reader.read([Read(0, 64, size)], 10)
    await reader.close()
    assert np.array_equal(segment.data[64 : 64 + size], place.data[:size])


async def test_nothing_to_read(sink, place):
    reader = await sink.connect(place.ticket, place.address, 5)
    await reader.read([], 1)
    await reader.read([Read(0, 0, 0)], 1)
    await reader.close()


async def test_readers_at_once(sink, place, segment):
    part = 2**20

    async def one(index: int) -> None:
        reader = await sink.connect(place.ticket, place.address, 5)
        for step in range(3):
            await reader.read([Read((index + step) * part, index * part, part)], 10)
        await reader.close()

    await asyncio.gather(*(one(i) for i in range(8)))
    for index in range(8):
        assert np.array_equal(
            segment.data[index * part : (index + 1) * part],
            place.data[(index + 2) * part : (index + 3) * part],
        )


async def test_closing_is_final_and_idempotent(sink, place):
    reader = await sink.connect(place.ticket, place.address, 5)
    await reader.close()
    await reader.close()
    with pytest.raises(TransportError):
        await reader.read([Read(0, 0, 1)], 1)


async def test_reads_outside_of_memory_are_refused(sink, place, segment):
    size = len(place.data)
    bad = [
        Read(size, 0, 1),
        Read(size - 3, 0, 4),
        Read(-1, 0, 2),
        Read(0, SINK_BYTES - 1, 2),
        Read(0, -1, 2),
        Read(0, 0, -1),
        Read(2**63, 0, 2**10),
    ]
    before = segment.data.copy()
    for read in bad:
        reader = await sink.connect(place.ticket, place.address, 5)
        with pytest.raises(TransportError):
            await reader.read([read], 5)
        await reader.close()
    assert np.array_equal(segment.data, before)
    reader = await sink.connect(place.ticket, place.address, 5)
    await reader.read([Read(size - 4, 0, 4)], 5)
    await reader.close()


@pytest.mark.parametrize("change", [{"nonce": "00" * 16}, {"nonce": "zz"}, {"nonce": ""}])
async def test_only_the_ticket_of_this_run_opens_it(sink, place, change):
    ticket = Offer(place.ticket.name, {**place.ticket.attributes, **change})
    with pytest.raises(TransportError):
        await sink.connect(ticket, place.address, 0.5)


async def test_an_empty_ticket_is_an_error_not_a_crash(sink, place):
    with pytest.raises(TransportError):
        await sink.connect(Offer(place.ticket.name, {}), place.address, 5)


async def test_after_a_cancel_nothing_is_written(sink, place, segment):
    size = LARGE
    for started in range(6):
        segment.data[:] = 0xEE
        reader = await sink.connect(place.ticket, place.address, 5)
        task = asyncio.create_task(reader.read([Read(0, 0, size)], 10))
        wanted = started * size // 6
        # Cancelled with this much of the data in place.
        await eventually(lambda at=wanted, t=task: segment.data[at] != 0xEE or t.done())
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        left = segment.data.copy()
        await reader.close()
        other = await sink.connect(place.ticket, place.address, 5)
        await other.read([Read(0, size, size)], 10)
        await other.close()
        assert np.array_equal(segment.data[:size], left[:size])


async def test_a_frozen_source_delays_nobody_and_writes_nothing_later(
    name, sink, own_source, own_place, segment
):
    loop = asyncio.get_running_loop()
    own_source.signal(signal.SIGSTOP)
    began = loop.time()
    with contextlib.suppress(TransportError):
        reader = await sink.connect(own_place.ticket, own_place.address, 0.3)
        await reader.close()
    assert loop.time() - began < 3
    own_source.signal(signal.SIGCONT)
    reader = await sink.connect(own_place.ticket, own_place.address, 5)
    await reader.read([Read(0, 0, 100)], 5)

    own_source.signal(signal.SIGSTOP)
    segment.data[:] = 0xEE
    began = loop.time()
    if name == "shm":
        await reader.read([Read(0, 0, LARGE)], 5)  # Its memory needs nobody's help.
    elif name == "nixl":
        # Nor here, once UCX has found out that the kernel can copy.
        with contextlib.suppress(TransportError):
            await reader.read([Read(0, 0, LARGE)], 0.3)
    else:
        with pytest.raises(TransportError):
            await reader.read([Read(0, 0, LARGE)], 0.3)
    await reader.close()
    assert loop.time() - began < 3

    before = segment.data.copy()
    own_source.signal(signal.SIGCONT)
    try:
        reader = await sink.connect(own_place.ticket, own_place.address, 5)
        await reader.read([Read(0, SINK_BYTES - 100, 100)], 5)
        await reader.close()
    except TransportError:
        # As of UCX 1.23 NIXL's source does not survive answering a reader that is gone.
        assert "nixl" in name
        assert await asyncio.to_thread(own_source.process.wait, 10)
    assert np.array_equal(segment.data[: SINK_BYTES - 100], before[: SINK_BYTES - 100])


async def test_a_read_from_a_frozen_source_that_comes_back(sink, own_source, own_place, segment):
    reader = await sink.connect(own_place.ticket, own_place.address, 5)
    await reader.read([Read(0, 0, 100)], 5)
    own_source.signal(signal.SIGSTOP)
    reading = asyncio.create_task(reader.read([Read(0, 0, LARGE)], 10))
    await asyncio.sleep(0)
    own_source.signal(signal.SIGCONT)
    await reading
    await reader.close()
    assert np.array_equal(segment.data[:LARGE], own_place.data[:LARGE])


async def test_a_source_killed_before_during_and_after(name, sink, own_source, own_place, segment):
    reader = await sink.connect(own_place.ticket, own_place.address, 5)
    await reader.read([Read(0, 0, 100)], 5)
    segment.data[:] = 0xEE
    reading = asyncio.create_task(reader.read([Read(0, 0, LARGE)], 10))
    await eventually(lambda: segment.data[0] != 0xEE or reading.done())
    own_source.kill()
    during = await asyncio.gather(reading, return_exceptions=True)
    assert isinstance(during[0], TransportError | None)
    if name == "shm":
        # The mapping keeps what was there: the bytes are still right.
        await reader.read([Read(100, 0, 100)], 5)
        assert np.array_equal(segment.data[:100], own_place.data[100:200])
    else:
        with pytest.raises(TransportError):
            await reader.read([Read(100, 0, 100)], 5)
    await reader.close()
    left = segment.data.copy()
    if name != "shm":
        with pytest.raises(TransportError):
            await sink.connect(own_place.ticket, own_place.address, 5)
    await sink.close()
    assert np.array_equal(segment.data, left)


def _kept(transport: Transport) -> int:
    return len(transport._mappings if isinstance(transport, ShmTransport) else transport._kept)


async def test_what_is_kept_serves_again_and_is_given_up_when_idle(sink, place, segment):
    for at in (0, 100):
        reader = await sink.connect(place.ticket, place.address, 5)
        await reader.read([Read(at, at, 100)], 5)
        await reader.close()
        assert _kept(sink) == 1
    assert np.array_equal(segment.data[:200], place.data[:200])
    await eventually(lambda: _kept(sink) == 0)


async def test_closing_the_transport_gives_everything_up(sink, place):
    idle = await sink.connect(place.ticket, place.address, 5)
    used = await sink.connect(place.ticket, place.address, 5)
    await idle.close()
    await sink.close()
    await used.close()
    await sink.close()
    assert _kept(sink) == 0


async def test_offers_are_plain_and_do_not_tell_the_nonce(sink, segment):
    for offer in (sink.source_offer(), sink.sink_offer()):
        assert offer.name == sink.name
        assert segment.nonce.hex() not in offer.attributes.values()
    assert sink.obstacle(sink.source_offer(), sink.sink_offer()) == ""
    assert sink.why_not() == ""


async def test_reading_often_leaves_nothing_behind(name, sink, place, shared_sources, segment):
    """Connections come and go, sink and source keep nothing of them."""
    me, source = psutil.Process(), shared_sources[name]

    async def some(count: int) -> None:
        for _ in range(count):
            readers = [await sink.connect(place.ticket, place.address, 5) for _ in range(6)]
            await asyncio.gather(
                *(r.read([Read(i, 100 * i, 100)], 5) for i, r in enumerate(readers))
            )
            for reader in readers:
                await reader.close()

    await some(5)
    gc.collect()
    mine, theirs = me.num_fds(), await source.do("burdens")
    rss = me.memory_info().rss
    await some(40)
    gc.collect()
    await eventually(lambda: me.num_fds() <= mine + 8)
    now = await source.do("burdens")
    assert now["descriptors"] <= theirs["descriptors"] + 8
    assert now["rss"] - theirs["rss"] < 16 * 2**20
    assert me.memory_info().rss - rss < 16 * 2**20


async def test_being_idle_costs_nothing(name, sink, place, shared_sources):
    source = shared_sources[name]
    reader = await sink.connect(place.ticket, place.address, 5)
    await reader.read([Read(0, 0, 100)], 5)
    gc.collect()  # or it may be due just now: of everything that all tests before have left
    before, mine = await source.do("burdens"), time.process_time()
    await asyncio.sleep(0.5)
    after, spent = await source.do("burdens"), time.process_time() - mine
    await reader.close()
    assert spent < 0.05
    assert after["cpu"] - before["cpu"] < 0.05
