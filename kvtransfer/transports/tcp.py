"""TCP, between any two hosts: the sink asks for ranges, the source sends them from its segment.

No copy is made in user space on either side: sendmsg takes vectors of the segment, recvmsg_into
writes into the destination. The ticket's nonce, which travels in the answer to an admitted
Fetch, authenticates a connection; nothing is encrypted. A large read is spread over several
connections. They serve one fetch at a time, then wait for the next to the same source, and are
closed when idle.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Sequence

from kvtransfer.errors import TransportError
from kvtransfer.memory import Segment
from kvtransfer.offload import Offload
from kvtransfer.transports import sockets
from kvtransfer.transports import tcp_protocol as protocol
from kvtransfer.transports.base import Offer, Read, require_inside
from kvtransfer.transports.batches import batches
from kvtransfer.transports.tcp_source import TcpSource
from kvtransfer.transports.tcp_stream import Stream

IDLE_SECONDS = 30.0
STREAMS = 4
"""Connections of one fetch: the kernel copies a connection's bytes on one core, at 2 to 6 GB/s, so
a 100 Gbit/s link takes several."""
STREAM_BYTES = 8 * 2**20
"""What a connection is worth opening for."""
KEPT_PER_SOURCE = 2 * STREAMS
THREADS = 8
"""For all connections of both ends. They are for copying: who waits, waits on the event loop."""

_Place = tuple[str, int, str]  # host, port, nonce


class TcpTransport:
    """Both ends; see the module's docstring and base.Transport.

    `host` and `port` are where it listens; a wildcard host is told to sinks as none, and they
    then use the host of the source's gRPC address. `streams`: connections of one fetch at most.
    """

    name = "tcp"

    def __init__(
        self,
        segment: Segment,
        host: str,
        port: int,
        idle_seconds: float = IDLE_SECONDS,
        streams: int = STREAMS,
    ) -> None:
        self._segment = segment
        self._host = host
        self._offload = Offload(THREADS)
        self._source = TcpSource(segment, host, port, idle_seconds, self._offload)
        self._idle_seconds = idle_seconds
        self._streams = streams
        self._kept: dict[_Place, list[tuple[socket.socket, asyncio.TimerHandle]]] = {}
        self._closed = False

    def why_not(self) -> str:
        """It can be offered anywhere."""
        return ""

    async def start(self) -> None:
        """Listens. Raises TransportError."""
        await self._source.start()

    async def close(self) -> None:
        """Ends all connections, of both ends."""
        self._closed = True
        for kept in self._kept.values():
            for sock, timer in kept:
                timer.cancel()
                sockets.end(sock)
        self._kept.clear()
        await self._source.close()
        self._offload.close()

    def source_offer(self) -> Offer:
        """Nothing: who can reach gRPC is taken to reach this too."""
        return Offer(self.name, {})

    def sink_offer(self) -> Offer:
        """Nothing."""
        return Offer(self.name, {})

    def ticket(self) -> Offer:
        """Where to connect, and the nonce."""
        host = "" if self._host in ("", "0.0.0.0", "::") else self._host
        return Offer(
            self.name,
            {"host": host, "port": str(self._source.port), "nonce": self._segment.nonce.hex()},
        )

    def obstacle(self, source: Offer, sink: Offer) -> str:
        """None."""
        return ""

    async def connect(self, ticket: Offer, address: str, timeout: float) -> TcpReader:
        """A kept connection to the source, or a new one. Raises TransportError."""
        attributes = ticket.attributes
        host = attributes.get("host") or address.rpartition(":")[0].strip("[]")
        try:
            place = (host, int(attributes["port"]), attributes["nonce"])
        except (KeyError, ValueError):
            raise TransportError("the source's tcp ticket makes no sense") from None
        first = await self.take(place, timeout)
        return TcpReader(self, place, first, self._segment, self._offload, self._streams)

    async def take(self, place: _Place, timeout: float) -> socket.socket:
        """A connection that was kept and is sound, else a new one. Raises TransportError."""
        while kept := self._kept.get(place):
            sock, timer = kept.pop()
            timer.cancel()
            if not kept:
                del self._kept[place]
            if sockets.is_quiet(sock):
                return sock
            sockets.end(sock)
        host, port, nonce = place
        try:
            async with asyncio.timeout(timeout):
                return await _dial(host, port, bytes.fromhex(nonce))
        except TimeoutError:
            raise TransportError(f"{host}:{port} did not answer within {timeout:g} s") from None
        except (OSError, EOFError, ValueError) as error:
            raise TransportError(f"{host}:{port} can't be connected to: {error}") from None

    def keep(self, place: _Place, sock: socket.socket) -> None:
        """Takes back a connection on which nothing is under way."""
        if self._closed or len(self._kept.get(place, ())) >= KEPT_PER_SOURCE:
            sockets.end(sock)
            return
        timer = asyncio.get_running_loop().call_later(self._idle_seconds, self._forget, place, sock)
        self._kept.setdefault(place, []).append((sock, timer))

    def _forget(self, place: _Place, sock: socket.socket) -> None:
        rest = [entry for entry in self._kept.get(place, ()) if entry[0] is not sock]
        if rest:
            self._kept[place] = rest
        else:
            self._kept.pop(place, None)
        sockets.end(sock)


class TcpReader:
    """The connections of one fetch: one, and more once a read is large."""

    def __init__(
        self,
        transport: TcpTransport,
        place: _Place,
        first: socket.socket,
        segment: Segment,
        offload: Offload,
        streams: int,
    ) -> None:
        self._transport = transport
        self._place = place
        self._socks = [first]
        self._memory = segment.data.data
        self._offload = offload
        self._streams = streams

    async def read(self, reads: Sequence[Read], timeout: float) -> None:
        """Receives into place, over as many connections as the bytes are worth.

        If one fails or the read is cancelled all are closed: what is still on its way to them is
        nobody's.
        """
        require_inside(reads, 2**64, len(self._memory))
        if not self._socks:
            raise TransportError("the connection is closed")
        try:
            async with asyncio.timeout(timeout):
                await self._receive(reads, timeout)
        except BaseException as error:
            self._break()
            if isinstance(error, TimeoutError):
                raise TransportError(f"the source sent too little within {timeout:g} s") from None
            if isinstance(error, OSError | EOFError):
                raise TransportError(f"the connection broke: {error}") from None
            raise

    async def close(self) -> None:
        """Gives the connections back for the next fetch, if they are sound."""
        for sock in self._socks:
            self._transport.keep(self._place, sock)
        self._socks.clear()

    async def _receive(self, reads: Sequence[Read], timeout: float) -> None:
        size = sum(read.length for read in reads)
        count = max(1, min(self._streams, size // STREAM_BYTES))
        while len(self._socks) < count:
            self._socks.append(await self._transport.take(self._place, timeout))
        share = min(protocol.MAX_BYTES, -(-size // count))
        work = deque(batches(reads, protocol.MAX_RANGES, share))
        streams = [Stream(sock, self._memory, work) for sock in self._socks[:count]]
        if len(streams) == 1:
            await streams[0].run(self._offload)
            return
        try:
            async with asyncio.TaskGroup() as group:
                for stream in streams:
                    group.create_task(stream.run(self._offload))
        except ExceptionGroup as failures:
            # One says it: the others were cancelled for it, or broke like it.
            raise failures.exceptions[0] from None

    def _break(self) -> None:
        for sock in self._socks:
            sockets.end(sock)
        self._socks.clear()


async def _dial(host: str, port: int, nonce: bytes) -> socket.socket:
    loop = asyncio.get_running_loop()
    family, kind, proto, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[
        0
    ]
    sock = socket.socket(family, kind, proto)
    try:
        sock.setblocking(False)
        await loop.sock_connect(sock, address)
        sockets.prepare(sock)
        await sockets.send(sock, protocol.HELLO.pack(protocol.MAGIC, nonce))
        reply = protocol.unpack_reply(await sockets.receive(sock, protocol.REPLY.size))
        if reply.status != protocol.OK:
            words = await sockets.receive(sock, min(reply.length, protocol.MAX_WORDS))
            raise TransportError(f"the source refused: {words.decode(errors='replace')}")
    except BaseException:
        sockets.end(sock)
        raise
    return sock
