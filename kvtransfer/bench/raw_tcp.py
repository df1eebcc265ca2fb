"""What TCP can do here: the plainest loop there is, sendmsg to recv_into, a thread a stream.

No event loop, no framing but an (offset, length) asked for, no checks.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack

from kvtransfer.memory import Segment
from kvtransfer.transports.base import Read

_ASK = struct.Struct("<QQ")
CALL_BYTES = 4 * 2**20
"""Of 256 KiB, 1 and 4 MiB a call the fastest."""


async def serve(segment: Segment, argument: object, stack: AsyncExitStack) -> int:
    """The source; returns its port."""
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    stack.callback(listener.shutdown, socket.SHUT_RDWR)
    threading.Thread(target=_accept, args=(listener, segment.data.data), daemon=True).start()
    port: int = listener.getsockname()[1]
    return port


def _accept(listener: socket.socket, memory: memoryview) -> None:
    while True:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_send, args=(sock, memory), daemon=True).start()


def _send(sock: socket.socket, memory: memoryview) -> None:
    with sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while raw := sock.recv(_ASK.size, socket.MSG_WAITALL):
            at, length = _ASK.unpack(raw)
            end = at + length
            while at < end:
                at += sock.sendmsg([memory[at : min(end, at + CALL_BYTES)]])


class RawTcp:
    """The sink: each read goes over the stream of its number."""

    def __init__(self, port: int, streams: int, segment: Segment) -> None:
        self._memory = segment.data.data
        self._socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(streams)]
        self._threads = ThreadPoolExecutor(streams)
        for sock in self._socks:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def read(self, reads: Sequence[Read]) -> None:
        """At most as many as there are streams."""
        if len(reads) == 1:
            self._receive(self._socks[0], reads[0])
        else:
            list(self._threads.map(self._receive, self._socks, reads))

    def close(self) -> None:
        """Ends it."""
        for sock in self._socks:
            sock.close()
        self._threads.shutdown()

    def _receive(self, sock: socket.socket, read: Read) -> None:
        sock.sendall(_ASK.pack(read.remote, read.length))
        at, end = read.local, read.local + read.length
        while at < end:
            at += sock.recv_into(self._memory[at : min(end, at + CALL_BYTES)])
