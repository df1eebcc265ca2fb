"""TCP, between any two hosts: the sink asks for ranges, the source sends them from its segment.

No copy is made in user space on either side: sendmsg takes vectors of the segment, recvmsg_into
writes into the destination. The ticket's nonce, which travels in the answer to an admitted
Fetch, authenticates a connection; nothing is encrypted. One connection serves one fetch at a
time, then waits for the next to the same source, and is closed when idle.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

from kvtransfer.errors import TransportError
from kvtransfer.memory import Segment
from kvtransfer.transports import sockets
from kvtransfer.transports import tcp_protocol as protocol
from kvtransfer.transports.base import Offer, Read, require_inside
from kvtransfer.transports.tcp_source import TcpSource

IDLE_SECONDS = 30.0
KEPT_PER_SOURCE = 4

_Place = tuple[str, int, str]  # host, port, nonce


class TcpTransport:
    """Both ends; see the module's docstring and base.Transport.

    `host` and `port` are where it listens; a wildcard host is told to sinks as none, and they
    then use the host of the source's gRPC address.
    """

    name = "tcp"

    def __init__(
        self, segment: Segment, host: str, port: int, idle_seconds: float = IDLE_SECONDS
    ) -> None:
        self._segment = segment
        self._host = host
        self._source = TcpSource(segment, host, port, idle_seconds)
        self._idle_seconds = idle_seconds
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
        kept = self._kept.get(place)
        if kept:
            sock, timer = kept.pop()
            if not kept:
                del self._kept[place]
            timer.cancel()
            return TcpReader(self, place, sock, self._segment, kept=True)
        return TcpReader(self, place, await self.dial(place, timeout), self._segment, kept=False)

    async def dial(self, place: _Place, timeout: float) -> socket.socket:
        """A new connection, admitted by the source. Raises TransportError."""
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
    """One connection, for one fetch."""

    def __init__(
        self,
        transport: TcpTransport,
        place: _Place,
        sock: socket.socket,
        segment: Segment,
        *,
        kept: bool,
    ) -> None:
        self._transport = transport
        self._place = place
        self._sock: socket.socket | None = sock
        self._memory = segment.data.data
        self._kept = kept

    async def read(self, reads: Sequence[Read], timeout: float) -> None:
        """Asks for WINDOW batches ahead and receives into place. A failed connection is closed."""
        require_inside(reads, 2**64, len(self._memory))
        if self._sock is None:
            raise TransportError("the connection is closed")
        try:
            async with asyncio.timeout(timeout):
                await self._exchange(batches(reads), timeout)
        except BaseException as error:
            # At once and without an await: nothing may be received into memory that its owner
            # takes for his own from here on.
            self._break()
            if isinstance(error, TimeoutError):
                raise TransportError(f"the source sent too little within {timeout:g} s") from None
            if isinstance(error, OSError | EOFError):
                raise TransportError(f"the connection broke: {error}") from None
            raise

    async def close(self) -> None:
        """Gives the connection back for the next fetch, if it is sound."""
        if self._sock is not None:
            self._transport.keep(self._place, self._sock)
            self._sock = None

    async def _exchange(self, work: list[list[Read]], timeout: float) -> None:
        try:
            await self._ask(work)
        except (OSError, EOFError):
            if not self._kept:
                raise
            # The source may have closed a connection that was kept; a new one tells.
            self._break()
            self._kept = False
            self._sock = await self._transport.dial(self._place, timeout)
            await self._ask(work)
        self._kept = False

    async def _ask(self, work: list[list[Read]]) -> None:
        sock = self._sock
        assert sock is not None
        asked = 0
        for done, batch in enumerate(work):
            while asked < min(len(work), done + protocol.WINDOW):
                ranges = [(r.remote, r.length) for r in work[asked]]
                request = protocol.pack_request(asked, ranges)
                await sockets.send_vectors(sock, [memoryview(request)])
                asked += 1
            await self._answer(sock, done, batch)

    async def _answer(self, sock: socket.socket, request_id: int, batch: list[Read]) -> None:
        reply = protocol.unpack_reply(await sockets.receive(sock, protocol.REPLY.size))
        if reply.status != protocol.OK:
            words = await sockets.receive(sock, min(reply.length, protocol.MAX_WORDS))
            raise TransportError(f"the source refused: {words.decode(errors='replace')}")
        if (reply.request_id, reply.length) != (request_id, sum(r.length for r in batch)):
            raise TransportError("the source answered something that was not asked")
        await sockets.receive_vectors(
            sock, (self._memory[r.local : r.local + r.length] for r in batch)
        )

    def _break(self) -> None:
        if self._sock is not None:
            sockets.end(self._sock)
            self._sock = None


def batches(reads: Sequence[Read]) -> list[list[Read]]:
    """The same bytes in requests within the protocol's limits; long reads are cut."""
    result: list[list[Read]] = []
    room = 0
    for read in reads:
        at = 0
        while at < read.length:
            if not room or len(result[-1]) == protocol.MAX_RANGES:
                result.append([])
                room = protocol.MAX_BYTES
            size = min(read.length - at, room)
            result[-1].append(Read(read.remote + at, read.local + at, size))
            at += size
            room -= size
    return result


async def _dial(host: str, port: int, nonce: bytes) -> socket.socket:
    loop = asyncio.get_running_loop()
    family, kind, proto, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[
        0
    ]
    sock = socket.socket(family, kind, proto)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await loop.sock_connect(sock, address)
        await loop.sock_sendall(sock, protocol.HELLO.pack(protocol.MAGIC, nonce))
        reply = protocol.unpack_reply(await sockets.receive(sock, protocol.REPLY.size))
        if reply.status != protocol.OK:
            words = await sockets.receive(sock, min(reply.length, protocol.MAX_WORDS))
            raise TransportError(f"the source refused: {words.decode(errors='replace')}")
    except BaseException:
        sockets.end(sock)
        raise
    return sock
