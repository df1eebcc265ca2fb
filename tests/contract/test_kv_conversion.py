"""KV fetched from sources of other layouts, in processes of their own: kvtransfer/converting.py.

Sources are tests/contract/kv_shard_source.py; what should arrive follows from the tokens.
"""

import asyncio
import itertools
import json
from contextlib import asynccontextmanager

import numpy as np
import pytest

from kvtransfer import codecs
from kvtransfer.converting import ConvertedReport, Source, fetch_converted
from kvtransfer.endpoint import KvEndpoint
from kvtransfer.errors import CorruptBlockError, KvSourceLostError, LayoutMismatchError
from kvtransfer.layout import KvLayout
from kvtransfer.store import KvStore
from services.runtime.server import Server
from services.runtime.settings import ServerSettings
from tandem.kvtransfer.v1 import kvtransfer_pb2_grpc
from tests.contract.kv_rig import RemoteSource
from tests.contract.kv_shard_source import block, computed, keys, made, salt_of, stored
from tests.contract.kv_source import SERVICE

NAMES = ("shm", "tcp")
COUNTER = itertools.count(1)
TWO = [{"shard": i, "shards": 2} for i in range(2)]


class ShardSource(RemoteSource):
    script = "kv_shard_source.py"


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """Loaded before anything has a deadline."""
    codecs.implementation()


@pytest.fixture(scope="module")
def sources():
    """Sources by layout, for tests that leave them as they found them."""
    started: dict[str, ShardSource] = {}

    def get(**layout) -> ShardSource:
        name = json.dumps(layout)
        if name not in started:
            started[name] = ShardSource(transports=NAMES, layout=layout)
        return started[name]

    yield get
    for source in started.values():
        source.close()


@pytest.fixture
def own_sources():
    """Sources for a test that harms them."""
    started = []

    def get(**layout) -> ShardSource:
        started.append(ShardSource(transports=NAMES, layout=layout, lease_seconds=0.4))
        return started[-1]

    yield get
    for source in started:
        source.close()


class Sink:
    """A worker of one layout, in this process."""

    def __init__(self, store: KvStore, endpoint: KvEndpoint) -> None:
        self.store, self.endpoint = store, endpoint
        self.address = ""

    def allocate(self, count: int) -> list[int]:
        """Blocks that others had, in no order."""
        blocks = self.store.allocate(count + 1)[:0:-1]
        self.store.memory[blocks] = 0xEE
        return blocks

    async def fetch(self, sources, lease, tokens, blocks, **options) -> ConvertedReport:
        found = [Source(s.address, lease) for s in sources]
        return await fetch_converted(
            self.endpoint,
            self.store,
            found,
            tokens,
            blocks,
            salt_of=salt_of,
            tenant="tenant",
            **options,
        )

    def holds(self, arrays, tokens: range, blocks: list[int], first: int = 0) -> bool:
        """Every token of the sequence from block `first` on is in its place, bit for bit."""
        size = self.store.layout.block_tokens
        for index, at in enumerate(blocks, first):
            there = min(size, len(tokens) - index * size)
            expected = block(self.store.layout, arrays, index)
            shown = block(self.store.layout, ones(self.store.layout, there, arrays), 0) > 0
            if not np.array_equal(self.store.memory[at][shown], expected[shown]):
                return False
        return True

    def cached(self, tokens: range) -> int:
        """Full blocks of these tokens in the prefix index, from the first on."""
        blocks = self.store.match(keys(self.store.layout, tokens, partial=False))
        self.store.release(blocks)
        return len(blocks)


def ones(layout: KvLayout, tokens: int, arrays):
    """Arrays whose every byte is one, in as many tokens: where a block has bytes of tokens."""
    return {
        n: np.full(
            (*a.shape[:1], tokens, *a.shape[2:-1], a.shape[-1] * a.itemsize), 1, np.uint8
        ).view(a.dtype)
        for n, a in arrays.items()
    }


@pytest.fixture
async def make_sink(name):
    sinks: list[Sink] = []

    async def make(layers_per_piece=4, scratch_bytes=2**24, **layout) -> Sink:
        store = KvStore(
            made(**layout), 64, layers_per_piece=layers_per_piece, scratch_bytes=scratch_bytes
        )
        endpoint = KvEndpoint(
            store, transports=[name], fetch_timeout_seconds=15.0, stall_seconds=5.0
        )
        await endpoint.start()
        sinks.append(Sink(store, endpoint))
        return sinks[-1]

    yield make
    for sink in sinks:
        await sink.endpoint.close()
        assert sink.store.scratch.lent == 0
        sink.store.check_integrity()
        sink.store.close()


@asynccontextmanager
async def serving(sinks: list[Sink]):
    """Sinks that are sources in turn."""
    servers = []
    for sink in sinks:
        server = Server(ServerSettings(), "sink")
        add = kvtransfer_pb2_grpc.add_KvTransferServiceServicer_to_server
        server.add(add, sink.endpoint.servicer, SERVICE)
        sink.address = await server.start()
        servers.append(server)
    try:
        yield
    finally:
        for server in servers:
            await server.stop(0)


def fresh(count: int) -> tuple[str, range]:
    """A lease, and tokens that no other test has."""
    start = next(COUNTER) * 100_000
    return f"lease-{start}", range(start, start + count)


def as_fp8(arrays, layout: KvLayout):
    """bf16 arrays, in an fp8 layout."""
    result = {}
    for name, bits in arrays.items():
        if layout.component(name).dtype == "bfloat16":
            result[name] = bits
        else:
            x = codecs.bf16_decode(bits)
            result |= stored(layout, name, x)
    return result


async def finished(source: ShardSource, lease: str, tokens: range, commit: bool = False) -> dict:
    return await source.do(
        "finished", lease=lease, start=tokens.start, count=len(tokens), commit=commit
    )


async def test_bf16_becomes_fp8_as_if_quantized_here(make_sink, sources):
    source, sink = sources(), await make_sink(dtype="fp8_e4m3")
    lease, tokens = fresh(40)
    await finished(source, lease, tokens)
    told, blocks = [], sink.allocate(3)
    report = await sink.fetch([source], lease, tokens, blocks, on_progress=told.append)
    assert report.complete == (True,) * 3
    assert not report.exact
    assert report.bytes == 3 * made().block_bytes
    assert sorted(told) == [0, 1, 2]
    assert sink.holds(as_fp8(computed(made(), tokens), sink.store.layout), tokens, blocks)
    assert sink.cached(tokens) == 2  # The third is not full.
    await source.idle()


@pytest.mark.parametrize("count", [64, 96, 97, 5])
async def test_blocks_become_smaller_and_larger_while_prefill_runs(make_sink, sources, count):
    large = sources(block_tokens=64)
    small, back = await make_sink(block_tokens=32), await make_sink(block_tokens=48)
    lease, tokens = fresh(count)
    blocks = small.allocate(small.store.layout.blocks_for(count))
    await large.do("prompt", lease=lease, start=tokens.start, count=count)
    fetching = asyncio.create_task(small.fetch([large], lease, tokens, blocks))
    for first in (0, 2, 4):
        assert not fetching.done()
        await large.do("compute", lease=lease, first=first, layers=2, only=[])
    await large.do("finish", lease=lease)
    report = await fetching
    assert report.exact
    assert report.complete == (True,) * len(blocks)
    assert small.holds(computed(made(), tokens), tokens, blocks)
    assert small.cached(tokens) == count // 32
    # Not multiples of one another, and only what is cached: no lease has the rest.
    async with serving([small]):
        again = back.allocate(back.store.layout.blocks_for(count))
        report = await back.fetch([small], f"{lease}-2", tokens, again, partial=False)
        held = count // 32 * 32
        assert report.complete == tuple(min(i * 48 + 48, count) <= held for i in range(len(again)))
        assert back.cached(tokens) == held // 48
        assert back.holds(computed(made(), tokens), tokens, again[: held // 48])
    small.store.release(blocks)


@pytest.mark.parametrize("heads", [4, 2])
async def test_two_shards_become_four_and_two_again(make_sink, sources, heads):
    """With 2 heads, four shards hold each of them twice."""
    two = [sources(heads=heads, dtype="fp8_e4m3", **shard) for shard in TWO]
    four = [
        await make_sink(heads=heads, dtype="fp8_e4m3", block_tokens=8, shard=i, shards=4)
        for i in range(4)
    ]
    lease, tokens = fresh(32)
    arrays = computed(made(heads=heads, dtype="fp8_e4m3"), tokens)
    for i, sink in enumerate(four):
        for source in two:
            await finished(source, f"{lease}-{i}", tokens)
        blocks = sink.allocate(4)
        report = await sink.fetch(two, f"{lease}-{i}", tokens, blocks)
        assert len(report.fetches) == 1  # One source has all the heads of this one.
        assert report.exact
        assert sink.holds(arrays, tokens, blocks)
        sink.store.release(blocks)
    for source in two:
        await source.idle()
    async with serving(four):
        for i in range(2):
            sink = await make_sink(heads=heads, dtype="fp8_e4m3", shard=i, shards=2)
            blocks = sink.allocate(2)
            report = await sink.fetch(four, f"{lease}-back-{i}", tokens, blocks)
            assert report.complete == (True, True)
            assert report.exact
            assert sink.holds(arrays, tokens, blocks)


async def test_mla_moves_between_orders_dtypes_and_shards(make_sink, sources):
    flash = [
        sources(kind="mla", dtype="fp8_e4m3", block_tokens=64, interleaved=True, **shard)
        for shard in TWO
    ]
    wide = sources(kind="mla", block_tokens=64)
    sink = await make_sink(kind="mla", dtype="fp8_e4m3", block_tokens=32)
    for origin, exact in (([flash[1]], True), (flash, True), ([wide], False)):
        lease, tokens = fresh(100)
        for source in origin:
            await finished(source, lease, tokens)
        blocks = sink.allocate(4)
        report = await sink.fetch(origin, lease, tokens, blocks)
        assert report.complete == (True,) * 4
        assert report.exact == exact
        assert len(report.fetches) == 1  # Every shard has the latent values: any one serves.
        if exact:
            arrays = computed(made(kind="mla", dtype="fp8_e4m3"), tokens)
        else:
            arrays = as_fp8(computed(made(kind="mla"), tokens), sink.store.layout)
        assert sink.holds(arrays, tokens, blocks)
        assert sink.cached(tokens) == 3
        for source in origin:
            await source.idle()  # The lease at the one that was not read is released as well.


async def test_the_same_layout_is_read_into_place(make_sink, sources):
    source, sink = sources(), await make_sink(scratch_bytes=8192)
    lease, tokens = fresh(70)
    await finished(source, lease, tokens)
    told, blocks = [], sink.allocate(4)
    report = await sink.fetch(
        [source], lease, tokens[:], blocks[:], skip=16, on_progress=told.append
    )
    assert report.complete == (True,) * 4
    assert sorted(told) == [0, 1, 2, 3]
    assert sink.holds(computed(made(), tokens), tokens, blocks, first=1)
    found = sink.store.match(keys(sink.store.layout, tokens)[1:4])
    assert found == blocks[:3]
    sink.store.release(found)


async def test_only_what_is_missing_is_fetched(make_sink, sources):
    source, sink = sources(block_tokens=64), await make_sink(block_tokens=32, dtype="fp8_e4m3")
    lease, tokens = fresh(200)
    await finished(source, lease, tokens)
    blocks = sink.allocate(4)
    report = await sink.fetch([source], lease, tokens, blocks, skip=96)
    assert report.complete == (True,) * 4
    assert report.bytes == 3 * made(block_tokens=64).block_bytes  # The first is not needed.
    arrays = as_fp8(computed(made(), tokens), sink.store.layout)
    assert sink.holds(arrays, tokens, blocks, first=3)
    await source.idle()


async def test_kv_can_be_kept_out_of_the_index(make_sink, sources):
    source, sink = sources(), await make_sink(dtype="fp8_e4m3")
    lease, tokens = fresh(32)
    await finished(source, lease, tokens)
    blocks = sink.allocate(2)
    report = await sink.fetch([source], lease, tokens, blocks, commit=False)
    assert report.complete == (True, True)
    assert sink.holds(as_fp8(computed(made(), tokens), sink.store.layout), tokens, blocks)
    assert sink.cached(tokens) == 0


async def test_a_corrupt_piece_costs_its_blocks_and_no_others(make_sink, own_sources):
    source = own_sources(block_tokens=64)
    sink = await make_sink(block_tokens=32, dtype="fp8_e4m3")
    lease, tokens = fresh(192)
    answer = await finished(source, lease, tokens)
    last = made(block_tokens=64).block_bytes - 1
    await source.do("corrupt", block=answer["blocks"][1], byte=last)
    blocks = sink.allocate(6)
    report = await sink.fetch([source], lease, tokens, blocks)
    assert report.complete == (True, True, False, False, True, True)
    assert report.corrupt_blocks == 2
    with pytest.raises(CorruptBlockError, match="2 of 6 blocks"):
        report.require_sound()
    assert sink.cached(tokens) == 2
    arrays = as_fp8(computed(made(), tokens), sink.store.layout)
    assert sink.holds(arrays, tokens, blocks[:2])
    assert sink.holds(arrays, tokens, blocks[4:], first=4)


async def test_a_shard_that_is_killed_leaves_only_whole_blocks(make_sink, own_sources):
    shards = [own_sources(**shard) for shard in TWO]
    sink = await make_sink(block_tokens=8)
    lease, tokens = fresh(32)
    for source in shards:
        await source.do("prompt", lease=lease, start=tokens.start, count=32)
    await shards[0].do("compute", lease=lease, first=0, layers=6, only=[])
    await shards[0].do("finish", lease=lease)
    await shards[1].do("compute", lease=lease, first=0, layers=6, only=[0])
    await shards[1].do("compute", lease=lease, first=0, layers=4, only=[1])
    whole, told, blocks = asyncio.Event(), [], sink.allocate(4)

    def progress(index: int) -> None:
        told.append(index)
        if len(told) == 2:
            whole.set()

    fetching = asyncio.create_task(sink.fetch(shards, lease, tokens, blocks, on_progress=progress))
    await asyncio.wait_for(whole.wait(), 10)
    shards[1].kill()
    with pytest.raises(KvSourceLostError) as lost:
        await asyncio.wait_for(fetching, 10)
    assert lost.value.complete == (True, True, False, False)
    assert sorted(told) == [0, 1]
    assert sink.cached(tokens) == 2
    assert sink.holds(computed(made(), tokens), tokens, blocks[:2])
    await shards[0].idle()


async def test_a_source_that_is_gone_before_it_begins(make_sink, own_sources):
    shards = [own_sources(**shard) for shard in TWO]
    sink = await make_sink(block_tokens=8)
    lease, tokens = fresh(16)
    await finished(shards[0], lease, tokens)
    shards[1].kill()
    with pytest.raises(KvSourceLostError) as lost:
        await sink.fetch(shards, lease, tokens, sink.allocate(2))
    assert lost.value.complete == (False, False)
    await shards[0].idle()  # Its lease was released nevertheless.


async def test_a_cancelled_fetch_writes_no_more_and_holds_nothing(make_sink, sources):
    shards = [sources(**shard) for shard in TWO]
    sink = await make_sink(dtype="fp8_e4m3")
    lease, tokens = fresh(64)
    for source in shards:
        await source.do("prompt", lease=lease, start=tokens.start, count=64)
        await source.do("compute", lease=lease, first=0, layers=6, only=[0, 1])
    arrived, blocks = asyncio.Event(), sink.allocate(4)
    fetching = asyncio.create_task(
        sink.fetch(shards, lease, tokens, blocks, on_progress=lambda _: arrived.set())
    )
    await asyncio.wait_for(arrived.wait(), 10)
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    before = sink.store.memory[blocks].copy()
    for source in shards:
        await source.do("compute", lease=lease, first=0, layers=6, only=[2, 3])
        await source.do("finish", lease=lease)
        await source.idle()
    assert np.array_equal(sink.store.memory[blocks], before)
    assert sink.store.scratch.lent == 0


async def test_many_at_once_share_a_little_scratch(make_sink, sources):
    shards = [sources(**shard) for shard in TWO]
    piece = 6 * made(shards=2).layer_bytes
    sink = await make_sink(block_tokens=24, scratch_bytes=3 * piece + 4096)
    jobs = []
    for _ in range(8):
        lease, tokens = fresh(40)
        for source in shards:
            await finished(source, lease, tokens)
        blocks = sink.allocate(2)
        jobs.append((lease, tokens, blocks))
    async with asyncio.timeout(15):
        reports = await asyncio.gather(
            *(sink.fetch(shards, lease, tokens, blocks) for lease, tokens, blocks in jobs)
        )
    assert all(report.complete == (True, True) for report in reports)
    for _, tokens, blocks in jobs:
        assert sink.holds(computed(made(), tokens), tokens, blocks)


async def test_pieces_that_scratch_cannot_take_are_refused_in_words(make_sink, sources):
    source, sink = sources(), await make_sink(dtype="fp8_e4m3", scratch_bytes=8192)
    lease, tokens = fresh(16)
    await finished(source, lease, tokens)
    with pytest.raises(KvSourceLostError, match="do not fit the 8192 bytes of scratch"):
        await sink.fetch([source], lease, tokens, sink.allocate(1))
    await source.idle()


@pytest.mark.parametrize(
    ("layout", "field"),
    [({"model": "other"}, "model"), ({"heads": 8}, "components"), ({"kind": "mla"}, "components")],
)
async def test_what_cannot_be_converted_is_refused_and_released(make_sink, sources, layout, field):
    source, sink = sources(), await make_sink(**layout)
    lease, tokens = fresh(16)
    await finished(source, lease, tokens)
    with pytest.raises(LayoutMismatchError) as refused:
        await sink.fetch([source], lease, tokens, sink.allocate(1))
    assert refused.value.metadata["field"] == field
    await source.idle()


async def test_a_missing_shard_is_named(make_sink, sources):
    source, sink = sources(**TWO[0]), await make_sink()
    lease, tokens = fresh(16)
    await finished(source, lease, tokens)
    with pytest.raises(LayoutMismatchError, match="head 2 of k") as refused:
        await sink.fetch([source], lease, tokens, sink.allocate(1))
    assert refused.value.metadata["field"] == "shard"
    await source.idle()


async def test_calls_that_cannot_be_meant_are_refused(make_sink, sources):
    sink, source = await make_sink(), sources()
    with pytest.raises(ValueError, match="2 blocks for 16 tokens"):
        await sink.fetch([source], "x", range(16), [1, 2])
    with pytest.raises(ValueError, match="skip: 8 tokens"):
        await sink.fetch([source], "x", range(16), [1], skip=8)
