"""The KV hand-off between two real processes, over every transport: kvtransfer/endpoint.py.

The sink runs here, the source is tests/contract/kv_source.py. Blocks hold bytes that follow from
their key, so that "arrived" is judged by content.
"""

import asyncio
import signal

import grpc
import psutil
import pytest

from kvtransfer import wire
from kvtransfer.errors import (
    CorruptBlockError,
    InvalidFetchError,
    KvSourceLostError,
    LayoutMismatchError,
    NoTransportError,
)
from kvtransfer.keys import block_keys, salt
from tandem.kvtransfer.v1 import kvtransfer_pb2 as pb
from tandem.kvtransfer.v1 import kvtransfer_pb2_grpc
from tests.contract.kv_rig import RemoteSource
from tests.contract.kv_sink import COUNTER, LAYERS, Sink, fresh_keys, fresh_lease
from tests.contract.kv_source import layout


async def test_a_finished_prompt(name, source, sink):
    keys, lease = fresh_keys(9), fresh_lease()
    await source.do("offer", lease=lease, keys=keys, gaps=1)
    blocks = sink.allocate(9)
    report = await sink.endpoint.fetch(source.address, lease, keys, blocks, partial_last=False)
    assert report.transport == name
    assert report.complete == (True,) * 9
    assert report.blocks == 9
    assert report.bytes == 9 * sink.store.block_bytes
    assert report.corrupt_blocks == 0
    assert report.started <= report.first_bytes <= report.ended
    assert all(sink.holds(b, k) for b, k in zip(blocks, keys, strict=True))
    sink.store.release(blocks)
    assert sink.store.match(keys) == blocks
    assert sink.endpoint.counters.bytes == {name: report.bytes}


async def test_layer_by_layer_while_it_is_computed(source, sink):
    """Chunks of two blocks, two layers at a time; each chunk is here before the next begins."""
    keys, lease = fresh_keys(6), fresh_lease()
    blocks = sink.allocate(6)
    arrived: list[int] = []
    news = asyncio.Event()

    def progress(index: int) -> None:
        arrived.append(index)
        news.set()

    fetch = asyncio.create_task(
        sink.endpoint.fetch(source.address, lease, keys, blocks, on_progress=progress)
    )
    await source.do("settle", watches=1)  # It waits for a lease that is not there yet.
    await source.do("open", lease=lease)
    await source.do("add", lease=lease, keys=keys)
    for chunk in range(3):
        part = keys[2 * chunk : 2 * chunk + 2]
        for layer in range(0, LAYERS, 2):
            assert len(arrived) == 2 * chunk
            await source.do("write", keys=part, first=layer, layers=2)
        async with asyncio.timeout(30):
            while len(arrived) < 2 * chunk + 2:
                news.clear()
                await news.wait()
        assert not fetch.done() or chunk == 2
    await source.do("complete", lease=lease, keys=keys)
    report = await fetch
    assert sorted(arrived) == list(range(6))
    assert report.complete == (True,) * 6
    assert all(sink.holds(b, k) for b, k in zip(blocks, keys, strict=True))


async def test_pieces_may_come_in_any_order(source, sink):
    keys, lease = fresh_keys(4), fresh_lease()
    blocks = sink.allocate(4)
    fetch = asyncio.create_task(sink.endpoint.fetch(source.address, lease, keys, blocks))
    await source.do("open", lease=lease)
    await source.do("add", lease=lease, keys=keys)
    for key in reversed(keys):
        await source.do("write", keys=[key], first=0, layers=2)
    for layer in (4, 2):
        await source.do("write", keys=keys[2:] + keys[:2], first=layer, layers=2)
    await source.do("complete", lease=lease, keys=keys)
    assert (await fetch).complete == (True,) * 4
    assert all(sink.holds(b, k) for b, k in zip(blocks, keys, strict=True))


@pytest.mark.parametrize("per_piece", [1, 3, 4, 6])
async def test_sides_may_cut_blocks_differently(source, make_sink, per_piece):
    sink = await make_sink(layers_per_piece=per_piece)
    keys, lease = fresh_keys(3), fresh_lease()
    await source.do("offer", lease=lease, keys=keys)
    blocks = sink.allocate(3)
    await sink.endpoint.fetch(source.address, lease, keys, blocks, partial_last=False)
    sink.store.release(blocks)
    watch = sink.store.watch("again", keys, lambda: None, 1.0)
    pieces = sink.store.take(watch, 100)
    assert len(pieces) == 3 * sink.store.grid.count
    sink.store.unwatch(watch)
    sink.store.release_lease("again")


async def test_partial_last_block_has_its_bytes_and_is_nobodys_prefix(source, sink):
    tokens = range(next(COUNTER) * 100_000, next(COUNTER) * 100_000 + 8 * 2 + 3)[:19]
    keys, lease = block_keys(tokens, 8, salt("m", "test"), partial=True), fresh_lease()
    assert len(keys) == 3
    await source.do("offer", lease=lease, keys=keys)
    blocks = sink.allocate(3)
    report = await sink.endpoint.fetch(source.address, lease, keys, blocks)
    assert report.complete == (True,) * 3
    assert all(sink.holds(b, k) for b, k in zip(blocks, keys, strict=True))
    sink.store.release(blocks)
    assert sink.store.match(keys) == blocks[:2]


async def test_a_prefix_that_is_cached_at_the_source(source, sink):
    keys = fresh_keys(5)
    await source.do("cache", keys=keys)
    blocks = sink.allocate(3)
    report = await sink.endpoint.fetch(source.address, fresh_lease(), keys[:3], blocks)
    assert report.complete == (True,) * 3


async def test_only_what_is_missing(source, sink):
    keys, lease = fresh_keys(6), fresh_lease()
    await source.do("offer", lease=lease, keys=keys)
    blocks = sink.allocate(2)
    report = await sink.endpoint.fetch(source.address, lease, keys[4:], blocks)
    assert report.bytes == 2 * sink.store.block_bytes


async def test_nothing_missing_releases_the_lease(source, sink):
    keys, lease = fresh_keys(2), fresh_lease()
    await source.do("offer", lease=lease, keys=keys)
    report = await sink.endpoint.fetch(source.address, lease, [], [])
    assert report.complete == ()
    await source.idle()


async def test_fetch_twice(source, sink):
    keys, lease = fresh_keys(3), fresh_lease()
    await source.do("offer", lease=lease, keys=keys)
    first, second = sink.allocate(3), sink.allocate(3)
    await asyncio.gather(
        sink.endpoint.fetch(source.address, lease, keys, first, release=False),
        sink.endpoint.fetch(source.address, lease, keys, second, release=False),
    )
    for blocks in (first, second):
        assert all(sink.holds(b, k) for b, k in zip(blocks, keys, strict=True))
    sink.store.release(second)
    again = sink.allocate(3)
    await sink.endpoint.fetch(source.address, lease, keys, again)
    await source.idle()
    with pytest.raises(KvSourceLostError, match="released"):
        await sink.endpoint.fetch(source.address, lease, keys, sink.allocate(3))


async def test_release_is_idempotent_and_may_come_first(source, sink):
    keys, lease = fresh_keys(2), fresh_lease()
    async with grpc.aio.insecure_channel(source.address) as channel:
        stub = kvtransfer_pb2_grpc.KvTransferServiceStub(channel)
        await source.do("offer", lease=lease, keys=keys)
        answers = [await stub.Release(pb.ReleaseRequest(lease_id=lease)) for _ in range(3)]
        assert [a.was_live for a in answers] == [True, False, False]
        early = fresh_lease()
        assert not (await stub.Release(pb.ReleaseRequest(lease_id=early))).was_live
        assert not (await source.do("open", lease=early))["live"]


async def test_lease_ended_by_its_producer_in_mid_fetch(source, sink):
    keys, lease = fresh_keys(3), fresh_lease()
    await source.do("open", lease=lease)
    await source.do("add", lease=lease, keys=keys)
    await source.do("write", keys=keys[:1], first=0, layers=LAYERS)
    first_block = asyncio.Event()
    fetch = asyncio.create_task(
        sink.endpoint.fetch(
            source.address,
            lease,
            keys,
            sink.allocate(3),
            on_progress=lambda _: first_block.set(),
        )
    )
    await first_block.wait()
    await source.do("end", lease=lease, why="cancelled")
    with pytest.raises(KvSourceLostError, match="cancelled") as raised:
        await fetch
    assert raised.value.complete == (True, False, False)
    assert raised.value.metadata["cause"] == "LEASE_LOST"
    await source.do("forget", keys=keys)


async def test_corruption_is_detected_counted_and_confined(source, sink):
    keys, lease = fresh_keys(4), fresh_lease()
    await source.do("open", lease=lease)
    placed = (await source.do("add", lease=lease, keys=keys))["blocks"]
    await source.do("write", keys=keys, first=0, layers=LAYERS)
    # Behind the checksum's back: the last byte of one block, one in the middle of another.
    await source.do("corrupt", block=placed[1], byte=sink.store.block_bytes - 1)
    await source.do("corrupt", block=placed[3], byte=sink.store.block_bytes // 2)
    await source.do("complete", lease=lease, keys=keys)
    blocks = sink.allocate(4)
    report = await sink.endpoint.fetch(source.address, lease, keys, blocks, partial_last=False)
    assert report.complete == (True, False, True, False)
    assert report.corrupt_blocks == sink.endpoint.counters.corrupt == 2
    assert sink.endpoint.counters.reread == 2
    with pytest.raises(CorruptBlockError) as raised:
        report.require_sound()
    assert raised.value.metadata["indices"] == "1,3"
    assert sink.holds(blocks[0], keys[0])
    assert sink.holds(blocks[2], keys[2])
    sink.store.release(blocks)
    assert sink.store.match(keys) == blocks[:1]
    assert sink.store.match(keys[2:]) == blocks[2:3]
    assert sink.store.match(keys[1:2]) == []


async def test_corruption_on_the_way_is_mended_by_reading_again(name, source, sink, monkeypatch):
    transport = next(t for t in sink.endpoint._transports if t.name == name)
    connect, faults = transport.connect, iter([True])

    async def faulty(*args):
        reader = await connect(*args)
        read = reader.read

        async def flip(reads, timeout):
            await read(reads, timeout)
            if next(faults, False):
                sink.store.segment.data[reads[-1].local] ^= 1

        reader.read = flip
        return reader

    monkeypatch.setattr(transport, "connect", faulty)
    keys, lease = fresh_keys(3), fresh_lease()
    await source.do("offer", lease=lease, keys=keys)
    blocks = sink.allocate(3)
    report = await sink.endpoint.fetch(source.address, lease, keys, blocks)
    assert report.complete == (True,) * 3
    assert report.corrupt_blocks == 0
    assert sink.endpoint.counters.reread == 1
    assert all(sink.holds(b, k) for b, k in zip(blocks, keys, strict=True))


async def half_fetched(source: RemoteSource, sink: Sink, **options):
    """A fetch of three blocks of which one has arrived and more is to come."""
    keys, lease = fresh_keys(3), fresh_lease()
    await source.do("open", lease=lease)
    await source.do("add", lease=lease, keys=keys)
    await source.do("write", keys=keys[:1], first=0, layers=LAYERS)
    await source.do("write", keys=keys[1:2], first=0, layers=2)
    blocks = sink.allocate(3)
    arrived = asyncio.Event()
    fetch = asyncio.create_task(
        sink.endpoint.fetch(
            source.address, lease, keys, blocks, on_progress=lambda _: arrived.set(), **options
        )
    )
    async with asyncio.timeout(30):
        await arrived.wait()
    return fetch, keys, lease, blocks


async def test_source_killed_in_mid_fetch(own_source, sink):
    fetch, keys, _, blocks = await half_fetched(own_source, sink)
    own_source.kill()
    async with asyncio.timeout(12):
        with pytest.raises(KvSourceLostError) as raised:
            await fetch
    assert raised.value.complete == (True, False, False)
    assert raised.value.reason == "KV_SOURCE_LOST"
    sink.store.release(blocks)
    assert sink.store.match(keys) == blocks[:1]
    assert sink.endpoint.counters.lost == 1


async def test_source_frozen_in_mid_fetch(own_source, sink):
    loop = asyncio.get_running_loop()
    fetch, _, _, blocks = await half_fetched(own_source, sink, timeout=2.0)
    own_source.signal(signal.SIGSTOP)
    began = loop.time()
    with pytest.raises(KvSourceLostError) as raised:
        await fetch
    assert loop.time() - began < 10
    assert raised.value.complete == (True, False, False)
    sink.store.release(blocks)


async def test_source_that_is_not_there(sink, name):
    with pytest.raises(KvSourceLostError):
        await sink.endpoint.fetch("127.0.0.1:1", "x", fresh_keys(1), sink.allocate(1))


async def test_deadline_without_any_news(source, sink):
    lease = fresh_lease()
    with pytest.raises(KvSourceLostError) as raised:
        await sink.endpoint.fetch(
            source.address, lease, fresh_keys(2), sink.allocate(2), timeout=0.2
        )
    assert raised.value.complete == (False, False)
    await asyncio.gather(*sink.endpoint._releasing)
    await source.idle()
    assert not (await source.do("open", lease=lease))["live"]  # It was released meanwhile.


async def test_cancel_in_mid_fetch(source, sink):
    fetch, keys, _, blocks = await half_fetched(source, sink)
    fetch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetch
    sink.store.release(blocks)
    assert sink.store.stats().held == 0
    sink.store.check_integrity()
    await source.do("settle", leases=0, watches=0)
    await source.do("write", keys=keys[2:], first=0, layers=LAYERS)  # Prefill goes on a while.
    await source.do("forget", keys=keys)
    await source.idle()


async def test_cancel_at_any_moment(source, sink):
    """Wherever it was, nothing is held, and nothing is written once the blocks are given back."""
    for turns in [*range(24), *range(24, 120, 7)]:
        keys, lease = fresh_keys(4), fresh_lease()
        await source.do("offer", lease=lease, keys=keys)
        blocks = sink.allocate(4, seed=turns)
        fetch = asyncio.create_task(sink.endpoint.fetch(source.address, lease, keys, blocks))
        for _ in range(turns):
            await asyncio.sleep(0)
        fetch.cancel()
        await asyncio.gather(fetch, return_exceptions=True)
        sink.store.release(blocks)
        sink.store.check_integrity()
        assert sink.store.stats().held == 0
        if turns == 0:  # A task that never began does not release either.
            sink.endpoint.release(source.address, lease)
        await source.idle()


async def test_lease_expires(own_source, sink):
    keys, lease = fresh_keys(2), fresh_lease()
    await own_source.do("offer", lease=lease, keys=keys, seconds=0.2)
    await own_source.do("settle", leases=0, held=0, expired=1)
    with pytest.raises(KvSourceLostError, match="expired"):
        await sink.endpoint.fetch(own_source.address, lease, keys, sink.allocate(2))


async def test_sink_that_never_comes_back_costs_a_lease_time_only(own_source, sink):
    """A fetch of cached blocks, never released: the lease made for it runs out."""
    keys = fresh_keys(2)
    await own_source.do("cache", keys=keys)
    await sink.endpoint.fetch(own_source.address, "mine", keys, sink.allocate(2), release=False)
    await own_source.do("settle", leases=0, held=0, expired=1)


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"model": "other"}, "model"), ({"layers": 5}, "layers"), ({"head_dim": 64}, "components")],
)
async def test_layout_mismatch_names_the_field(source, make_sink, fields, field):
    sink = await make_sink(**fields)
    before = (await source.do("stats"))["refused"]
    with pytest.raises(LayoutMismatchError) as raised:
        await sink.endpoint.fetch(source.address, "x", fresh_keys(1), sink.allocate(1))
    error = raised.value
    assert error.metadata["field"] == error.metadata["fields"] == field
    assert error.metadata["source"] == layout().fields()[field]
    assert error.metadata["sink"] == layout(**fields).fields()[field]
    assert error.metadata["source"] in error.message
    assert error.metadata["sink"] in error.message
    assert (await source.do("stats"))["refused"] == before + 1


async def test_no_transport_in_common(name, source, make_sink):
    other = "tcp" if name == "shm" else "shm"
    sink = await make_sink(transports=(other,))
    with pytest.raises(NoTransportError) as raised:
        await sink.endpoint.fetch(source.address, "x", fresh_keys(1), sink.allocate(1))
    assert raised.value.metadata == {"source": name, "sink": other}
    assert f"{name}: the sink does not offer it" in raised.value.message
    assert f"{other}: the source does not offer it" in raised.value.message


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"keys": []}, "keys"),
        ({"keys": [b"short"]}, "keys"),
        ({"keys": [b"a" * 16] * 2}, "keys"),
        ({"keys": [i.to_bytes(16, "big") for i in range(65)]}, "keys"),
        ({"lease_id": ""}, "lease_id"),
        ({"lease_id": "é" * 300}, "lease_id"),
        ({"fetch_id": "x" * 100_000}, "fetch_id"),
        ({"tenant": "x" * 100_000}, "tenant"),
        ({"region": "x" * 100_000}, "region"),
        ({"layout_fields": {"model": "x" * 100_000}}, "layout_fields"),
        ({"offers": [pb.TransportOffer(name="x" * 100_000)]}, "offers"),
        ({"offers": [pb.TransportOffer(name="x")] * 10_000}, "offers"),
    ],
)
async def test_bad_requests_name_the_field(source, request_, field):
    fields = layout()
    good = {
        "lease_id": "x",
        "kv_layout": fields.fingerprint,
        "layout_fields": fields.fields(),
        "keys": [b"k" * 16],
    }
    async with grpc.aio.insecure_channel(source.address) as channel:
        stub = kvtransfer_pb2_grpc.KvTransferServiceStub(channel)
        call = stub.Fetch(pb.FetchRequest(**{**good, **request_}), timeout=5)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert raised.value.details().startswith(field)


async def test_names_too_long_to_be_remembered_are_not(source):
    long = "x" * 1_000_000
    async with grpc.aio.insecure_channel(source.address) as channel:
        stub = kvtransfer_pb2_grpc.KvTransferServiceStub(channel)
        for call in (
            stub.Release(pb.ReleaseRequest(lease_id=long)),
            stub.Renew(pb.RenewRequest(lease_id=long)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_fetches_that_wait_are_bounded(make_sink):
    """Books of 65,536 blocks wanted are kept at most; when some go there is room again."""
    source = RemoteSource(transports=["shm"], blocks=20_000)
    sink = await make_sink()
    fields = layout()
    many = [i.to_bytes(16, "big") for i in range(20_000)]
    try:
        async with grpc.aio.insecure_channel(source.address) as channel:
            stub = kvtransfer_pb2_grpc.KvTransferServiceStub(channel)
            offers = [wire.offer_to(t.sink_offer()) for t in sink.endpoint._transports]
            request = pb.FetchRequest(
                lease_id="x",
                kv_layout=fields.fingerprint,
                layout_fields=fields.fields(),
                keys=many,
                offers=offers,
            )
            most = 16
            calls = [stub.Fetch(request, timeout=30) for _ in range(most)]
            for call in calls:
                await call.read()
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.Fetch(request, timeout=30).read()
            assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            calls[0].cancel()
            await source.do("settle", watches=most - 1)
            assert (await stub.Fetch(request, timeout=30).read()).HasField("opened")
    finally:
        source.close()


async def test_a_fetch_without_deadline_is_refused(source):
    fields = layout()
    request = pb.FetchRequest(
        lease_id="x",
        kv_layout=fields.fingerprint,
        layout_fields=fields.fields(),
        keys=[b"k" * 16],
    )
    async with grpc.aio.insecure_channel(source.address) as channel:
        call = kvtransfer_pb2_grpc.KvTransferServiceStub(channel).Fetch(request)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_describe(name, source):
    async with grpc.aio.insecure_channel(source.address) as channel:
        stub = kvtransfer_pb2_grpc.KvTransferServiceStub(channel)
        answer = await stub.Describe(pb.DescribeRequest())
    assert answer.kv_layout == layout().fingerprint
    assert dict(answer.layout_fields) == layout().fields()
    assert [o.name for o in answer.offers] == [name]


async def test_keys_and_blocks_must_match(sink):
    with pytest.raises(ValueError, match="2 keys for 1 blocks"):
        await sink.endpoint.fetch("127.0.0.1:1", "x", fresh_keys(2), [0])


async def test_fetching_often_leaves_nothing(name, source):
    """Seen from a sink that does nothing else, in a process of its own."""
    keys = fresh_keys(2)
    await source.do("cache", keys=keys)
    left = await source.fetched_often(name, keys, first=300, then=2000)
    assert left["descriptors"] <= 2
    assert left["bytes"] < 2 * 2**20, "a KiB for each fetch"
    assert left["tasks"] < 10
    await source.idle()


# The choice between transports


async def test_another_host_means_tcp_and_says_why(make_sink):
    source = RemoteSource(transports=["shm", "tcp"])
    try:
        sink = await make_sink(host_id="elsewhere")
        keys = fresh_keys(1)
        await source.do("cache", keys=keys)
        report = await sink.endpoint.fetch(source.address, "x", keys, sink.allocate(1))
        assert report.transport == "tcp"
        assert "not on one host" in report.why
        near = await make_sink()
        report = await near.endpoint.fetch(source.address, "y", keys, near.allocate(1))
        assert report.transport == "shm"
    finally:
        source.close()


async def test_shared_memory_that_can_not_be_opened_falls_back_and_says_so(make_sink, caplog):
    source = RemoteSource(transports=["shm", "tcp"])
    try:
        sink = await make_sink()
        await source.do("close_segment")
        for lease in ("x", "y"):
            keys = fresh_keys(1)
            await source.do("cache", keys=keys)
            report = await sink.endpoint.fetch(source.address, lease, keys, sink.allocate(1))
            assert report.transport == "tcp"
        warnings = [r.message for r in caplog.records if r.name == "kvtransfer.endpoint"]
        assert len(warnings) == 1
        assert "shm" in warnings[0]
    finally:
        source.close()


async def test_a_transport_that_can_not_be_offered_is_no_secret(make_sink, caplog):
    sink = await make_sink(host_id="")
    assert "shm" in caplog.text
    assert [t.name for t in sink.endpoint._transports] == ["tcp"]
    with pytest.raises(NoTransportError, match="shm"):
        await make_sink(transports=("shm",), host_id="")


async def test_killed_sources_leave_no_memory_behind():
    """The segment has no name: nothing of it is in the file system."""
    source = RemoteSource(transports=["shm"])
    try:
        mapped = {m.path for m in psutil.Process(source.process.pid).memory_maps(grouped=False)}
    finally:
        source.close()
    assert "/memfd:tandem-kv" in mapped
    assert not [path for path in mapped if path.startswith("/dev/shm")]


async def test_invalid_fetches_are_that_error_at_the_sink(source, sink):
    keys = fresh_keys(1) * 2
    with pytest.raises(InvalidFetchError):
        await sink.endpoint.fetch(source.address, "x", keys, sink.allocate(2))
