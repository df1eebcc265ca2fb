"""The source's end of the TCP transport: a listener that sends ranges of one segment."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import socket
from collections.abc import Callable

from kvtransfer.errors import TransportError
from kvtransfer.memory import Segment
from kvtransfer.offload import Offload
from kvtransfer.transports import sockets
from kvtransfer.transports import tcp_protocol as protocol
from kvtransfer.transports.sockets import TURN_BYTES

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 4096
HELLO_SECONDS = 5.0
STALL_SECONDS = 30.0
"""A sink that takes nothing of a reply for this long is gone."""
TURN_REPLIES = 2
"""Sent in a row by one thread, before other connections have their turn."""


class TcpSource:
    """Serves ranges of a segment to whoever knows its nonce; large ones from `offload`."""

    def __init__(
        self, segment: Segment, host: str, port: int, idle_seconds: float, offload: Offload
    ) -> None:
        self.port = port
        self._host = host
        self._nonce = segment.nonce
        self._memory = segment.data.data.toreadonly()
        self._offload = offload
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
            sockets.prepare(sock)
            async with asyncio.timeout(HELLO_SECONDS):
                await self._greet(sock)
            await self._converse(Conversation(sock, self._memory))
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
        await sockets.send(sock, protocol.REPLY.pack(0, protocol.OK, 0))

    async def _converse(self, with_sink: Conversation) -> None:
        while True:
            with_sink.listen()
            if not with_sink.owed:
                waiting = STALL_SECONDS if with_sink.listening else self._idle_seconds
                async with asyncio.timeout(waiting):
                    await sockets.ready(with_sink.sock)
                continue
            if with_sink.owed > TURN_BYTES:
                await self._offload.run(with_sink.speak, with_sink.owed)
            else:
                with_sink.answer()
                await asyncio.sleep(0)
            if with_sink.owed:
                async with asyncio.timeout(STALL_SECONDS):
                    await sockets.ready(with_sink.sock, reading=False, writing=True)

    async def _refuse(self, sock: socket.socket, why: str) -> None:
        words = why.encode()[: protocol.MAX_WORDS]
        head = protocol.REPLY.pack(0, protocol.REFUSED, len(words))
        async with asyncio.timeout(1.0):
            await sockets.send(sock, head + words)


class Conversation:
    """Requests of one connection, answered one after the other. For one thread at a time."""

    def __init__(self, sock: socket.socket, memory: memoryview) -> None:
        self.sock = sock
        self._memory = memory
        self._inbox = bytearray()
        self._reply = sockets.Vectors()

    @property
    def owed(self) -> int:
        """Bytes of a reply that are still to be sent."""
        return self._reply.nbytes

    @property
    def listening(self) -> bool:
        """In the middle of a request."""
        return len(self._inbox) > 0

    def listen(self) -> None:
        """Takes the next request, if it has come and no reply is owed. Never waits.

        Raises ProtocolError, EOFError, OSError.
        """
        while not self.owed:
            request = protocol.take_request(self._inbox, len(self._memory))
            if request is None:
                try:
                    came = self.sock.recv(protocol.MAX_REQUEST_BYTES, sockets.NOW)
                except (BlockingIOError, InterruptedError):
                    return
                if not came:
                    raise EOFError("the sink closed the connection")
                self._inbox += came
                continue
            head = protocol.REPLY.pack(request.request_id, protocol.OK, request.nbytes)
            views = [self._memory[offset : offset + size] for offset, size in request.ranges]
            self._reply = sockets.Vectors([memoryview(head), *views])

    def answer(self) -> None:
        """Sends of a reply what the socket takes now."""
        self._reply.send(self.sock, sockets.NOW)

    def speak(self, stop: Callable[[], bool]) -> None:
        """Sends replies, in a thread, while the sink takes them and more requests are there."""
        for _ in range(TURN_REPLIES):
            if not self.owed or stop() or not self._reply.send(self.sock, sockets.WAIT):
                return
            self.listen()


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
