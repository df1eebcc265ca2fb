"""Raw sockets for bulk data: vectors moved without a copy, where the peer's pace permits.

Sockets are blocking ones that the system lets go of after SLICE_SECONDS. A call that moves bytes
either must not wait (MSG_DONTWAIT, on the event loop), or may wait so long in a thread: then one
system call moves megabytes without the interpreter, and a thread is taken only while bytes flow.
Whatever takes longer is awaited on the loop by ready(). Nothing is lent to the event loop: a
buffer is written only inside of a call made here.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable

VECTORS = 512
"""Buffers a system call is given: half of what systems take at once (IOV_MAX)."""
TURN_BYTES = 2**20
"""So much is moved on the event loop: it takes a few hundred microseconds, about as long as it
takes to hand work to a thread on both sides. What is more goes to threads."""
SLICE_SECONDS = 0.02
"""A thread waits so long for one peer in a call, then lets another connection have its turn."""
WAKE_BYTES = 2**20
"""A thread that receives is woken for so many bytes, not for every packet: between two processes
of one host that makes a fifth of the CPU time. The last of what it waits for is less than that, and
then it is woken for any byte."""
NOW = socket.MSG_DONTWAIT
"""Flag of calls on the event loop."""
WAIT = 0
"""Flag of calls in a thread."""

_TIMEVAL = struct.pack("@ll", 0, round(1e6 * SLICE_SECONDS))


class Vectors:
    """Buffers to be filled or sent, in order, from wherever the last call left off."""

    def __init__(self, views: Iterable[memoryview] = ()) -> None:
        self._views = deque(view for view in views if view)
        self.nbytes = sum(map(len, self._views))
        """Left."""

    def receive(self, sock: socket.socket, flags: int) -> bool:
        """Fills buffers until all are full (True), or the peer must be waited for (False).

        Raises EOFError if the peer closed the connection, or OSError.
        """
        if not flags and self.nbytes > 2 * WAKE_BYTES:
            _wake_for(sock, WAKE_BYTES)
            try:
                if not self._fill(sock, self.nbytes - WAKE_BYTES, flags):
                    return False
            finally:
                _wake_for(sock, 1)
        return self._fill(sock, self.nbytes, flags)

    def _fill(self, sock: socket.socket, wanted: int, flags: int) -> bool:
        """receive() of the first `wanted` bytes."""
        end = self.nbytes - wanted
        while self.nbytes > end:
            batch, size = self._batch(self.nbytes - end)
            try:
                count = sock.recvmsg_into(batch, 0, flags or socket.MSG_WAITALL)[0]
            except (BlockingIOError, InterruptedError):
                return False
            if not count:
                raise EOFError("the peer closed the connection")
            self._moved(count)
            if count < size and not flags:
                return False
        return True

    def send(self, sock: socket.socket, flags: int) -> bool:
        """Sends until nothing is left (True), or the peer must be waited for. Raises OSError."""
        while self._views:
            batch, size = self._batch(self.nbytes)
            try:
                count = sock.sendmsg(batch, (), flags)
            except (BlockingIOError, InterruptedError):
                return False
            self._moved(count)
            if count < size and not flags:
                return False
        return True

    def _batch(self, most: int) -> tuple[list[memoryview], int]:
        """Buffers for one call, and their bytes: `most` at most."""
        if most == self.nbytes and len(self._views) <= VECTORS:
            return list(self._views), most
        batch: list[memoryview] = []
        size = 0
        for view in self._views:
            if size == most or len(batch) == VECTORS:
                break
            batch.append(view[: most - size])
            size += len(batch[-1])
        return batch, size

    def _moved(self, count: int) -> None:
        self.nbytes -= count
        views = self._views
        while count and count >= len(views[0]):
            count -= len(views.popleft())
        if count:
            views[0] = views[0][count:]


def prepare(sock: socket.socket) -> None:
    """Makes a connected socket one of the kind that this module is about."""
    sock.setblocking(True)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


async def receive(sock: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes, few. Raises EOFError or OSError."""
    data = bytearray(size)
    left = Vectors([memoryview(data)])
    while not left.receive(sock, NOW):
        await ready(sock)
    return bytes(data)


async def send(sock: socket.socket, data: bytes) -> None:
    """All of a few bytes. Raises OSError."""
    left = Vectors([memoryview(data)])
    while not left.send(sock, NOW):
        await ready(sock, reading=False, writing=True)


async def ready(sock: socket.socket, *, reading: bool = True, writing: bool = False) -> None:
    """Returns when the socket can be read from, or written to, whichever is asked for."""
    loop = asyncio.get_running_loop()
    news: asyncio.Future[None] = loop.create_future()
    ways: list[tuple[Callable[..., None], Callable[..., object]]] = []
    if reading:
        ways.append((loop.add_reader, loop.remove_reader))
    if writing:
        ways.append((loop.add_writer, loop.remove_writer))
    for add, _ in ways:
        add(sock, _settle, news)
    try:
        await news
    finally:
        if sock.fileno() >= 0:
            for _, remove in ways:
                remove(sock)
            sock.setblocking(True)  # uvloop makes non-blocking what it watches


def _wake_for(sock: socket.socket, nbytes: int) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, nbytes)


def is_quiet(sock: socket.socket) -> bool:
    """An idle connection is sound: open, and with nothing to be read from it."""
    try:
        sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def end(sock: socket.socket) -> None:
    """Closes a socket that something may still wait for. Idempotent."""
    if sock.fileno() < 0:
        return
    loop = asyncio.get_running_loop()
    loop.remove_reader(sock)
    loop.remove_writer(sock)
    sock.close()


def _settle(news: asyncio.Future[None]) -> None:
    if not news.done():
        news.set_result(None)
