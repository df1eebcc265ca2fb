"""TCP against peers that are not what they should be, on either end."""

import asyncio
import socket
import struct

import pytest

from kvtransfer.errors import TransportError
from kvtransfer.memory import Segment
from kvtransfer.transports import tcp_protocol as protocol
from kvtransfer.transports.base import Offer, Read
from kvtransfer.transports.tcp import KEPT_PER_SOURCE, TcpTransport

NONCE = bytes(range(16))
HELLO = protocol.HELLO.pack(protocol.MAGIC, NONCE)


@pytest.fixture
async def source():
    segment = Segment(10_000, NONCE)
    segment.data[:] = 5
    transport = TcpTransport(segment, "127.0.0.1", 0)
    await transport.start()
    yield transport
    await transport.close()


@pytest.fixture
async def sink():
    transport = TcpTransport(Segment(10_000_000, bytes(16)), "127.0.0.1", 0)
    await transport.start()
    yield transport
    await transport.close()


def port(transport: TcpTransport) -> int:
    return int(transport.ticket().attributes["port"])


async def answer_to(transport: TcpTransport, *parts: bytes) -> bytes:
    """Everything that a client which says this is told until the source hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port(transport))
    for part in parts:
        writer.write(part)
    writer.write_eof()
    async with asyncio.timeout(20):
        try:
            return await reader.read()
        except ConnectionResetError:
            return b""
        finally:
            writer.close()


def refusals(raw: bytes) -> list[str]:
    words = []
    while raw:
        reply = protocol.unpack_reply(raw[: protocol.REPLY.size])
        body = raw[protocol.REPLY.size :][: reply.length]
        raw = raw[protocol.REPLY.size + reply.length :]
        if reply.status != protocol.OK:
            words.append(body.decode())
    return words


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ([b"GET / HTTP/1.1".ljust(protocol.HELLO.size)], "ticket"),
        ([protocol.HELLO.pack(protocol.MAGIC, bytes(16))], "ticket"),
        ([HELLO, protocol.REQUEST.pack(1, 0)], "ranges"),
        ([HELLO, protocol.REQUEST.pack(1, 2**32 - 1)], "ranges"),
        ([HELLO, protocol.pack_request(1, [(9_999, 2)])], "leaves"),
        ([HELLO, protocol.pack_request(1, [(2**64 - 1, 2)])], "leaves"),
        ([HELLO, protocol.pack_request(1, [(0, 2**64 - 1)])], "leaves"),
    ],
)
async def test_source_refuses_what_it_can_not_serve_and_goes_on(source, sink, said, words):
    (refusal,) = refusals(await answer_to(source, *said))
    assert words in refusal
    reader = await sink.connect(source.ticket(), "ignored:1", 5)
    await reader.read([Read(0, 0, 10_000)], 5)
    await reader.close()


async def test_source_bounds_what_one_request_may_ask(source):
    many = [(0, 10_000)] * protocol.MAX_RANGES
    assert len(many) * 10_000 < protocol.MAX_BYTES
    big = Segment(protocol.MAX_BYTES, NONCE)
    transport = TcpTransport(big, "127.0.0.1", 0)
    await transport.start()
    ranges = [(0, protocol.MAX_BYTES), (0, 1)]
    (refusal,) = refusals(await answer_to(transport, HELLO, protocol.pack_request(1, ranges)))
    assert "more than" in refusal
    await transport.close()


@pytest.mark.parametrize("cut", [0, 1, 23, 24, 30, 47])
async def test_clients_that_leave_in_the_middle(source, sink, cut):
    said = (HELLO + protocol.pack_request(1, [(0, 100)]))[:cut]
    await answer_to(source, said)
    reader = await sink.connect(source.ticket(), "ignored:1", 5)
    await reader.read([Read(0, 0, 10_000)], 5)
    await reader.close()


class Impostor:
    """A listener that answers every client with the same bytes, then waits or hangs up."""

    def __init__(self, said: bytes, *, stay: bool) -> None:
        self._said, self._stay = said, stay

    async def __aenter__(self) -> Offer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._held: list[asyncio.StreamWriter] = []
        number = self._server.sockets[0].getsockname()[1]
        return Offer("tcp", {"host": "127.0.0.1", "port": str(number), "nonce": NONCE.hex()})

    async def __aexit__(self, *exc) -> None:
        for writer in self._held:
            writer.close()
        self._server.close()

    async def _serve(self, reader, writer) -> None:
        self._held.append(writer)
        writer.write(self._said)
        await writer.drain()
        if not self._stay:
            writer.close()


GREETED = protocol.REPLY.pack(0, protocol.OK, 0)


@pytest.mark.parametrize("stay", [True, False])
@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        GREETED[:-1],
        GREETED,
        GREETED + protocol.REPLY.pack(0, protocol.OK, 100) + b"x" * 99,
        GREETED + protocol.REPLY.pack(0, protocol.OK, 2**64 - 1),
        GREETED + protocol.REPLY.pack(7, protocol.OK, 100) + b"x" * 100,
        GREETED + protocol.REPLY.pack(0, protocol.REFUSED, 2**64 - 1) + b"\xff" * 2000,
        GREETED + struct.pack("<I", 0),
    ],
)
async def test_sink_gets_an_error_in_time_from_any_impostor(sink, said, stay):
    async def read(ticket: Offer) -> None:
        reader = await sink.connect(ticket, "ignored:1", 0.3)
        try:
            await reader.read([Read(0, 0, 100)], 0.3)
        finally:
            await reader.close()

    async with Impostor(said, stay=stay) as ticket, asyncio.timeout(20):
        with pytest.raises(TransportError):
            await read(ticket)


async def test_connection_that_the_source_closed_while_idle_is_replaced(source, sink):
    reader = await sink.connect(source.ticket(), "ignored:1", 5)
    await reader.read([Read(0, 0, 10)], 5)
    await reader.close()
    for task in list(source._source._serving):
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    reader = await sink.connect(source.ticket(), "ignored:1", 5)
    await reader.read([Read(0, 0, 10)], 5)
    await reader.close()


async def test_a_wildcard_host_is_reached_by_the_grpc_address(sink):
    transport = TcpTransport(Segment(100, NONCE), "0.0.0.0", 0)
    await transport.start()
    assert transport.ticket().attributes["host"] == ""
    reader = await sink.connect(transport.ticket(), "127.0.0.1:7777", 5)
    await reader.read([Read(0, 0, 100)], 5)
    await reader.close()
    await transport.close()


async def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        transport = TcpTransport(Segment(100, NONCE), "127.0.0.1", number)
        with pytest.raises(TransportError, match=f"127.0.0.1:{number}"):
            await transport.start()
        await transport.close()


async def test_many_connections_and_none_left(source, sink):
    readers = [await sink.connect(source.ticket(), "ignored:1", 5) for _ in range(40)]
    await asyncio.gather(*(r.read([Read(0, i * 100, 100)], 5) for i, r in enumerate(readers)))
    for reader in readers:
        await reader.close()
    assert sum(map(len, sink._kept.values())) == KEPT_PER_SOURCE
    await sink.close()
    async with asyncio.timeout(20):
        while source._source._serving:
            await asyncio.wait(source._source._serving)
