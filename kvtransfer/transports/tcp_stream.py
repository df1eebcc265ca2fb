"""The sink's end of one TCP connection: asks ahead, and receives the answers into place."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable

from kvtransfer.errors import TransportError
from kvtransfer.offload import Offload
from kvtransfer.transports import sockets
from kvtransfer.transports import tcp_protocol as protocol
from kvtransfer.transports.base import Read
from kvtransfer.transports.sockets import TURN_BYTES


class Stream:
    """One connection's part in a read. `run` once.

    `work` is shared by the connections of a read: each takes its next batch when it has room for
    one more request, so that a slow one gets less.
    """

    def __init__(self, sock: socket.socket, memory: memoryview, work: deque[list[Read]]) -> None:
        self._sock = sock
        self._memory = memory
        self._work = work
        self._asked: deque[tuple[int, list[Read]]] = deque()
        self._owed = 0
        self._next_id = 0
        self._request = sockets.Vectors()
        self._head = bytearray(protocol.REPLY.size)
        self._expect_reply()

    async def run(self, offload: Offload) -> None:
        """Until no work is left and all that was asked for is in place.

        Raises TransportError, OSError, EOFError. Ended or cancelled, it receives nothing more.
        """
        self._advance(sockets.NOW)
        while self._asked:
            await sockets.ready(self._sock, writing=self._request.nbytes > 0)
            if self._owed > TURN_BYTES:
                await offload.run(self._flow, self._owed)
            else:
                self._advance(sockets.NOW)

    def _flow(self, stop: Callable[[], bool]) -> None:
        """Receives, in a thread, while bytes keep coming."""
        while not stop() and self._advance(sockets.WAIT):
            pass

    def _advance(self, flags: int) -> bool:
        """Asks for more and receives one answer; False if the source must be waited for first."""
        self._ask()
        if not self._asked or not self._answer.receive(self._sock, flags):
            return False
        if self._in_head:
            self._take_head()
            if not self._answer.receive(self._sock, flags):
                return False
        self._owed -= sum(read.length for read in self._asked.popleft()[1])
        self._expect_reply()
        return True

    def _ask(self) -> None:
        while len(self._asked) < protocol.WINDOW and not self._request.nbytes:
            try:
                batch = self._work.popleft()
            except IndexError:
                return
            ranges = [(read.remote, read.length) for read in batch]
            request = protocol.pack_request(self._next_id, ranges)
            self._asked.append((self._next_id, batch))
            self._owed += sum(length for _, length in ranges)
            self._next_id += 1
            self._request = sockets.Vectors([memoryview(request)])
            self._request.send(self._sock, sockets.NOW)

    def _expect_reply(self) -> None:
        self._in_head = True
        self._answer = sockets.Vectors([memoryview(self._head)])

    def _take_head(self) -> None:
        request_id, batch = self._asked[0]
        reply = protocol.unpack_reply(self._head)
        if reply.status != protocol.OK:
            raise TransportError(f"the source refused: {self._words(reply.length)}")
        if (reply.request_id, reply.length) != (request_id, sum(r.length for r in batch)):
            raise TransportError("the source answered something that was not asked")
        self._in_head = False
        self._answer = sockets.Vectors(self._memory[r.local : r.local + r.length] for r in batch)

    def _words(self, length: int) -> str:
        """What of the words has come."""
        words = bytearray(min(length, protocol.MAX_WORDS))
        left = sockets.Vectors([memoryview(words)])
        left.receive(self._sock, sockets.NOW)
        return words[: len(words) - left.nbytes].decode(errors="replace")
