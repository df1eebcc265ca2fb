"""The source's end of the TCP transport: a listener that sends ranges of one segment."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import socket

from kvtransfer.errors import TransportError
from kvtransfer.memory import Segment
from kvtransfer.transports import sockets
from kvtransfer.transports import tcp_protocol as protocol

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 4096
HELLO_SECONDS = 5.0
STALL_SECONDS = 30.0
"""A sink that takes nothing of a reply for this long is gone."""


class TcpSource:
    """Serves ranges of a segment to whoever knows its nonce."""

    def __init__(self, segment: Segment, host: str, port: int, idle_seconds: float) -> None:
        self.port = port
        self._host = host
        self._nonce = segment.nonce
        self._memory = segment.data.data.toreadonly()
        # Sinks close idle connections first; this is for those that are gone.
        self._idle_seconds = 4 * idle_seconds
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._serving: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listens; `port` then is the real one. Raises TransportError."""
        try:
            self._listener = socket.create_server(
                (self._host, self.port), family=_family(self._host)
            )
        except OSError as error:
            raise TransportError(
                f"can't listen for KV on {self._host or '*'}:{self.port}: {error.strerror}"
            ) from None
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._accepting = asyncio.create_task(self._accept(self._listener))

    async def close(self) -> None:
        """Ends the listener and every connection. Idempotent."""
        tasks = list(self._serving)
        if self._accepting is not None:
            tasks.append(self._accepting)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            sockets.end(self._listener)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:
                # Out of descriptors, mostly: connections that end will give some back.
                log.warning("accepting a KV connection failed: %s", error.strerror)
                await asyncio.sleep(0.1)
                continue
            if len(self._serving) >= MAX_CONNECTIONS:
                sock.close()
                continue
            task = loop.create_task(self._serve(sock))
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)

    async def _serve(self, sock: socket.socket) -> None:
        """One connection until it ends, in whatever way."""
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.timeout(HELLO_SECONDS):
                await self._greet(sock)
            while True:
                await self._reply(sock)
        except protocol.ProtocolError as error:
            log.warning("a KV connection was refused: %s", error)
            with contextlib.suppress(OSError, TimeoutError):
                await self._refuse(sock, str(error))
        except (OSError, EOFError, TimeoutError):
            pass  # The sink went away; whatever it still needs, it asks for anew.
        finally:
            sockets.end(sock)

    async def _greet(self, sock: socket.socket) -> None:
        magic, nonce = protocol.HELLO.unpack(await sockets.receive(sock, protocol.HELLO.size))
        if magic != protocol.MAGIC or not hmac.compare_digest(nonce, self._nonce):
            raise protocol.ProtocolError("not a ticket of this source")
        await sockets.send_vectors(sock, [memoryview(protocol.REPLY.pack(0, protocol.OK, 0))])

    async def _reply(self, sock: socket.socket) -> None:
        async with asyncio.timeout(self._idle_seconds):
            head = await sockets.receive(sock, protocol.REQUEST.size)
        request_id, count = protocol.unpack_request_head(head)
        async with asyncio.timeout(STALL_SECONDS):
            raw = await sockets.receive(sock, count * protocol.RANGE_BYTES)
            ranges = protocol.unpack_ranges(raw, len(self._memory))
            length = sum(size for _, size in ranges)
            views = [memoryview(protocol.REPLY.pack(request_id, protocol.OK, length))]
            views += [self._memory[offset : offset + size] for offset, size in ranges]
            await sockets.send_vectors(sock, views)

    async def _refuse(self, sock: socket.socket, why: str) -> None:
        words = why.encode()[: protocol.MAX_WORDS]
        head = protocol.REPLY.pack(0, protocol.REFUSED, len(words))
        async with asyncio.timeout(1.0):
            await sockets.send_vectors(sock, [memoryview(head), memoryview(words)])


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
