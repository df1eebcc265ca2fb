"""A sink against sources that announce what can't be, or stop announcing."""

import asyncio

import grpc
import numpy as np
import pytest

from kvtransfer import wire
from kvtransfer.blocks import checksum
from kvtransfer.endpoint import CROSSED_OFF_SECONDS, KvEndpoint
from kvtransfer.errors import KvSourceLostError, NoTransportError
from kvtransfer.layout import gqa_layout
from kvtransfer.pieces import Piece
from kvtransfer.store import KvStore
from kvtransfer.transports.base import Offer
from tandem.kvtransfer.v1 import kvtransfer_pb2 as pb
from tandem.kvtransfer.v1 import kvtransfer_pb2_grpc

LAYOUT = gqa_layout("m", layers=4, kv_heads=1, head_dim=8, dtype="bfloat16", block_tokens=4)
KEYS = [bytes([i]) * 16 for i in range(2)]


class Script(kvtransfer_pb2_grpc.KvTransferServiceServicer):
    """Answers every fetch with the same messages; then ends, or goes silent."""

    def __init__(self, endpoint: KvEndpoint) -> None:
        self.ticket = endpoint._transports[0].ticket()
        self.generations_offset = endpoint._store.generations_offset
        self.messages: list[pb.FetchResponse] = []
        self.silent = False
        self.released: asyncio.Queue[str] = asyncio.Queue()

    async def Describe(self, request, context):  # noqa: N802
        return pb.DescribeResponse()

    async def Fetch(self, request, context):  # noqa: N802
        for message in self.messages:
            yield message
        if self.silent:
            await asyncio.Event().wait()

    async def Renew(self, request, context):  # noqa: N802
        return pb.RenewResponse(live=True)

    async def Release(self, request, context):  # noqa: N802
        self.released.put_nowait(request.lease_id)
        return pb.ReleaseResponse()


@pytest.fixture(params=["shm", "tcp"])
async def ends(request):
    """(sink's endpoint and store, the scripted source and its store, address)"""
    made = []
    for _ in range(2):
        store = KvStore(LAYOUT, 8, layers_per_piece=2)
        endpoint = KvEndpoint(store, transports=[request.param], fetch_timeout_seconds=5)
        await endpoint.start()
        made.append((endpoint, store))
    (sink, sink_store), (source, source_store) = made
    script = Script(source)
    server = grpc.aio.server()
    kvtransfer_pb2_grpc.add_KvTransferServiceServicer_to_server(script, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield sink, sink_store, script, source_store, f"127.0.0.1:{port}"
    await sink.close()
    await server.stop(0)
    await source.close()


def opened(script: Script, **changes) -> pb.FetchResponse:
    attributes = {**script.ticket.attributes, **changes}
    ticket = Offer(script.ticket.name, attributes)
    return wire.opened_to(wire.Agreement(ticket, "why", 30, script.generations_offset))


def piece(store: KvStore, index: int, block: int, **changes) -> Piece:
    """All layers of a block, as an honest source announces them."""
    size = LAYOUT.block_bytes
    fields = {
        "key_index": index,
        "first_layer": 0,
        "layers": 4,
        "offset": block * size,
        "length": size,
        "generation": 0,
        "checksum": checksum(store.segment.data[block * size : (block + 1) * size]),
    }
    return Piece(**{**fields, **changes})


async def fetch(ends, **options):
    sink, store, _, _, address = ends
    blocks = store.allocate(2)
    try:
        async with asyncio.timeout(5):
            return await sink.fetch(
                address, "lease", KEYS, blocks, partial_last=False, **options
            ), blocks
    finally:
        store.release(blocks)
        store.check_integrity()


async def test_an_honest_one_works(ends):
    _, store, script, source, _ = ends
    source.memory[:] = np.arange(8, dtype=np.uint8)[:, None]
    pieces = [piece(source, 1, 6), piece(source, 0, 3)]
    script.messages = [opened(script), wire.ready_to(pieces)]
    report, blocks = await fetch(ends)
    assert report.complete == (True, True)
    assert [store.memory[b][0] for b in blocks] == [3, 6]
    assert store.match(KEYS) == blocks
    assert await script.released.get() == "lease"


@pytest.mark.parametrize(
    "changes",
    [
        {"key_index": 2},
        {"key_index": 2**32 - 1},
        {"first_layer": 1},
        {"layers": 0},
        {"layers": 2**32 - 1},
        {"length": 0},
        {"length": 2**32 - 1},
        {"offset": 2**62},
        {"offset": 8 * LAYOUT.block_bytes - 1},
    ],
)
async def test_pieces_that_can_not_be(ends, changes):
    _, store, script, source, _ = ends
    bad = piece(source, 0, 0, **changes)
    script.messages = [opened(script), wire.ready_to([piece(source, 1, 1), bad])]
    before = store.memory.copy()
    with pytest.raises(KvSourceLostError) as raised:
        await fetch(ends)
    assert not raised.value.complete[0]
    assert np.array_equal(store.memory[3:], before[3:])
    assert await script.released.get() == "lease"


async def test_end_before_all_was_announced(ends):
    _, _, script, source, _ = ends
    script.messages = [opened(script), wire.ready_to([piece(source, 0, 0)])]
    with pytest.raises(KvSourceLostError, match="ended the fetch before"):
        await fetch(ends)


@pytest.mark.parametrize("count", [0, 1])
async def test_silence_ends_with_the_deadline(ends, count):
    _, _, script, _, _ = ends
    script.messages = [opened(script)][:count]
    script.silent = True
    with pytest.raises(KvSourceLostError):
        await fetch(ends, timeout=0.3)


async def test_not_opened(ends):
    _, _, script, source, _ = ends
    for messages in ([], [wire.ready_to([piece(source, 0, 0)])], [pb.FetchResponse()]):
        script.messages = messages
        with pytest.raises(KvSourceLostError, match="did not open"):
            await fetch(ends)


async def test_transport_nobody_offered(ends):
    _, _, script, _, _ = ends
    script.messages = [wire.opened_to(wire.Agreement(Offer("pigeon", {}), "why", 30, 0))]
    with pytest.raises(KvSourceLostError, match="not offered"):
        await fetch(ends)


async def test_the_same_piece_again_and_again(ends):
    _, _, script, source, _ = ends
    source.memory[:] = 9
    again = [piece(source, 0, 0)] * 50
    script.messages = [opened(script), wire.ready_to(again), wire.ready_to([piece(source, 1, 1)])]
    report, _ = await fetch(ends)
    assert report.complete == (True, True)
    assert report.bytes == 2 * LAYOUT.block_bytes


async def test_everything_corrupt(ends):
    sink, store, script, source, _ = ends
    pieces = [piece(source, i, i, checksum=1) for i in range(2)]
    script.messages = [opened(script), wire.ready_to(pieces)]
    report, _ = await fetch(ends)
    assert report.complete == (False, False)
    assert report.corrupt_blocks == sink.counters.corrupt == 2
    assert report.bytes == 0
    assert report.first_bytes is None
    assert store.match(KEYS) == []
    assert store.stats().free == 8


@pytest.mark.parametrize("ends", ["shm"], indirect=True)
async def test_a_transport_that_did_not_work_is_tried_again_after_a_while(ends, monkeypatch):
    sink, _, script, source, _ = ends
    now = sink._clock()
    monkeypatch.setattr(sink, "_clock", lambda: now)
    script.messages = [opened(script, nonce="00" * 16)]
    with pytest.raises(NoTransportError, match="shm: "):
        await fetch(ends)
    script.messages = [opened(script), wire.ready_to([piece(source, i, i) for i in range(2)])]
    now += CROSSED_OFF_SECONDS - 1
    with pytest.raises(NoTransportError, match="shm: "):
        await fetch(ends)
    now += 1
    report, _ = await fetch(ends)
    assert report.complete == (True, True)
