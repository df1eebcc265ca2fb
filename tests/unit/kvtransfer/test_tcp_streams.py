"""Large reads by TCP, over several connections: what they bring, and how they end."""

import asyncio
import contextlib
import itertools
import socket

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.errors import TransportError
from kvtransfer.memory import Segment
from kvtransfer.transports import sockets
from kvtransfer.transports import tcp as tcp_module
from kvtransfer.transports import tcp_protocol as protocol
from kvtransfer.transports.base import Read
from kvtransfer.transports.tcp import STREAM_BYTES, TcpTransport
from kvtransfer.transports.tcp_source import Conversation

NONCE = bytes(range(16))
SIZE = 3 * STREAM_BYTES + 12_345
STREAMS = SIZE // STREAM_BYTES


@pytest.fixture
async def source():
    segment = Segment(SIZE, NONCE)
    segment.data[:] = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    transport = TcpTransport(segment, "127.0.0.1", 0)
    await transport.start()
    yield transport
    await transport.close()


@pytest.fixture
async def sink():
    transport = TcpTransport(Segment(SIZE, bytes(16)), "127.0.0.1", 0)
    await transport.start()
    yield transport
    await transport.close()


def scattered(pieces: int) -> list[Read]:
    """All bytes, in parts of about equal size, put in place in reverse order."""
    ends = np.linspace(0, SIZE, pieces + 1).astype(int).tolist()
    reads = [Read(a, SIZE - b, b - a) for a, b in itertools.pairwise(ends)]
    return reads[::-1]


@pytest.mark.parametrize("pieces", [1, 2, 3000])
async def test_bytes_come_over_several_connections_that_are_kept(source, sink, pieces):
    reader = await sink.connect(source.ticket(), "ignored:1", 5)
    reads = scattered(pieces)
    for _ in range(2):
        await reader.read(reads, 20)
    assert len(source._source._serving) == STREAMS
    for read in reads:
        mine = sink._segment.data[read.local : read.local + read.length]
        theirs = source._segment.data[read.remote : read.remote + read.length]
        assert np.array_equal(mine, theirs)
    await reader.close()
    assert sum(map(len, sink._kept.values())) == STREAMS
    await (await sink.connect(source.ticket(), "ignored:1", 5)).read(reads, 20)
    assert len(source._source._serving) == STREAMS


async def test_small_reads_take_one_connection(source, sink):
    reader = await sink.connect(source.ticket(), "ignored:1", 5)
    await reader.read([Read(0, 0, 2 * STREAM_BYTES - 1)], 20)
    assert len(source._source._serving) == 1
    await reader.close()


async def test_as_many_connections_as_told(source):
    transport = TcpTransport(Segment(SIZE, bytes(16)), "127.0.0.1", 0, streams=2)
    await transport.start()
    reader = await transport.connect(source.ticket(), "ignored:1", 5)
    await reader.read([Read(0, 0, SIZE)], 20)
    assert len(source._source._serving) == 2
    await reader.close()
    await transport.close()


async def test_a_connection_that_breaks_ends_the_read_and_all_connections(source, sink):
    reader = await sink.connect(source.ticket(), "ignored:1", 5)
    await reader.read([Read(0, 0, SIZE)], 20)
    # All but one: of so few requests one connection may get none, and need not be a sound one.
    for serving in list(source._source._serving)[1:]:
        serving.cancel()
    async with asyncio.timeout(20):
        while len(source._source._serving) > 1:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0)
    with pytest.raises(TransportError):
        await reader.read([Read(0, 0, SIZE)], 20)
    with pytest.raises(TransportError, match="closed"):
        await reader.read([Read(0, 0, 1)], 20)
    await reader.close()
    assert not sink._kept
    reader = await sink.connect(source.ticket(), "ignored:1", 5)
    await reader.read([Read(0, 0, SIZE)], 20)
    await reader.close()


@pytest.mark.parametrize("part", range(6))
async def test_after_a_cancel_no_connection_writes(source, sink, part):
    data = sink._segment.data
    reader = await sink.connect(source.ticket(), "ignored:1", 5)
    await reader.read([Read(0, 0, SIZE)], 20)
    data[:] = 0xEE
    seen = part * SIZE // 6
    reading = asyncio.create_task(reader.read([Read(0, 0, SIZE)], 20))
    async with asyncio.timeout(30):
        while data[seen : seen + 64].min() == 0xEE and not reading.done():  # noqa: ASYNC110
            await asyncio.sleep(0)
    reading.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await reading
    left = data.copy()
    await reader.close()
    async with asyncio.timeout(30):  # Until the source has nothing more to send to anybody.
        while source._source._serving and not sink._kept:
            await asyncio.wait(source._source._serving)
    assert np.array_equal(data, left)


async def test_a_source_that_stops_in_the_middle_ends_the_read_in_time(sink):
    """The first bytes of a large reply come, and then no more."""
    half = STREAM_BYTES // 2
    held = []

    async def serve(reader, writer) -> None:
        held.append(writer)
        await reader.readexactly(protocol.HELLO.size)
        writer.write(protocol.REPLY.pack(0, protocol.OK, 0))
        await reader.readexactly(protocol.REQUEST.size + protocol.RANGE.size)
        writer.write(protocol.REPLY.pack(0, protocol.OK, STREAM_BYTES) + bytes(half))
        await writer.drain()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    attributes = {"host": "127.0.0.1", "nonce": NONCE.hex()}
    attributes["port"] = str(server.sockets[0].getsockname()[1])
    ticket = tcp_module.Offer("tcp", attributes)
    reader = await sink.connect(ticket, "ignored:1", 5)
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(TransportError, match="too little"):
        await reader.read([Read(0, 0, STREAM_BYTES)], 0.4)
    assert 0.3 < loop.time() - began < 3
    await reader.close()
    for writer in held:
        writer.close()
    server.close()


async def test_frozen_sources_do_not_keep_threads_from_others(source, sink):
    """More sources stall in the middle of a reply than there are threads."""
    stalled = asyncio.Event()
    count = tcp_module.THREADS + 2
    held = []

    async def serve(reader, writer) -> None:
        held.append(writer)
        await reader.readexactly(protocol.HELLO.size)
        writer.write(protocol.REPLY.pack(0, protocol.OK, 0))
        await reader.readexactly(protocol.REQUEST.size + protocol.RANGE.size)
        writer.write(protocol.REPLY.pack(0, protocol.OK, 2 * sockets.TURN_BYTES) + bytes(100))
        if len(held) == count:
            stalled.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    attributes = {"host": "127.0.0.1", "nonce": NONCE.hex()}
    attributes["port"] = str(server.sockets[0].getsockname()[1])
    ticket = tcp_module.Offer("tcp", attributes)
    readers = [await sink.connect(ticket, "ignored:1", 5) for _ in range(count)]
    stuck = [
        asyncio.create_task(reader.read([Read(0, 0, 2 * sockets.TURN_BYTES)], 30))
        for reader in readers
    ]
    async with asyncio.timeout(20):
        await stalled.wait()
        fine = await sink.connect(source.ticket(), "ignored:1", 5)
        await fine.read([Read(0, 0, SIZE)], 5)
        await fine.close()
    assert not any(task.done() for task in stuck)
    for task in stuck:
        task.cancel()
    await asyncio.gather(*stuck, return_exceptions=True)
    for writer in held:
        writer.close()
    server.close()


@given(st.lists(st.integers(0, 5), min_size=1), st.integers(0, 64))
def test_vectors_go_on_where_they_stopped(sizes, window):
    here, there = socket.socketpair()
    with here, there:
        data = bytes(range(1, 256))[: sum(sizes)]
        views, at = [], 0
        for size in sizes:
            views.append(memoryview(data)[at : at + size])
            at += size
        sending = sockets.Vectors(views)
        assert sending.nbytes == len(data)
        assert sending.send(here, sockets.NOW)
        into = bytearray(len(data))
        first, rest = into[:0], memoryview(into)
        receiving = sockets.Vectors([rest[:window], rest[window:]])
        assert receiving.receive(there, sockets.NOW)
        assert receiving.nbytes == 0
        assert bytes(into) == data
        assert not first


def test_a_request_may_come_in_any_parts():
    here, there = socket.socketpair()
    with here, there:
        memory = memoryview(bytes(range(200)))
        conversation = Conversation(there, memory)
        raw = b"".join(protocol.pack_request(i, [(i, 3), (9, 1)]) for i in range(3))
        for at in range(len(raw)):
            here.send(raw[at : at + 1])
            conversation.listen()
            conversation.answer()
        conversation.listen()
        size = protocol.REPLY.size + 4
        for i in range(3):
            answer = here.recv(size, socket.MSG_WAITALL)
            assert protocol.unpack_reply(answer[: protocol.REPLY.size]).request_id == i
            assert answer[protocol.REPLY.size :] == bytes([i, i + 1, i + 2, 9])
        assert not conversation.listening
        assert not conversation.owed
