"""What asyncio lacks for raw sockets: vectors in and out without a copy, and a safe end.

Bytes are moved by calls made here, between awaits, never by the event loop behind one's back: a
coroutine that was cancelled has no buffer lent to anyone.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Iterable, Sequence

VECTORS = 512
"""Buffers a system call is given: half of what systems take at once (IOV_MAX)."""
TURN_BYTES = 2**20
"""After so many bytes, a fraction of a millisecond's copying, the event loop gets its turn."""


async def receive_vectors(sock: socket.socket, views: Iterable[memoryview]) -> None:
    """Fills some buffers, in order. Raises EOFError if the peer closes first, or OSError."""

    def move(batch: Sequence[memoryview]) -> int:
        count = sock.recvmsg_into(batch)[0]
        if not count:
            raise EOFError("the peer closed the connection")
        return count

    await _move_all(sock, views, move, sending=False)


async def receive(sock: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes. Raises as receive_vectors()."""
    data = bytearray(size)
    await receive_vectors(sock, [memoryview(data)])
    return bytes(data)


async def send_vectors(sock: socket.socket, views: Iterable[memoryview]) -> None:
    """Sends all bytes of some buffers, in order. Raises OSError."""
    await _move_all(sock, views, sock.sendmsg, sending=True)


def end(sock: socket.socket) -> None:
    """Closes a socket that something may still wait for. Idempotent."""
    if sock.fileno() < 0:
        return
    loop = asyncio.get_running_loop()
    loop.remove_reader(sock)
    loop.remove_writer(sock)
    sock.close()


async def _move_all(
    sock: socket.socket,
    views: Iterable[memoryview],
    move: Callable[[Sequence[memoryview]], int],
    *,
    sending: bool,
) -> None:
    left = deque(view for view in views if view)
    turn = 0
    while left:
        try:
            count = move(_turn(left))
        except (BlockingIOError, InterruptedError):
            await _ready(sock, sending=sending)
            turn = 0
            continue
        turn += count
        while count and count >= len(left[0]):
            count -= len(left.popleft())
        if count:
            left[0] = left[0][count:]
        if turn >= TURN_BYTES:
            await asyncio.sleep(0)
            turn = 0


def _turn(left: deque[memoryview]) -> list[memoryview]:
    """The next buffers, of TURN_BYTES together at most."""
    batch: list[memoryview] = []
    size = 0
    for view in left:
        if size + len(view) > TURN_BYTES or len(batch) == VECTORS:
            break
        batch.append(view)
        size += len(view)
    return batch or [left[0][:TURN_BYTES]]


async def _ready(sock: socket.socket, *, sending: bool) -> None:
    """Returns when the socket can be written to, or read from."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    (loop.add_writer if sending else loop.add_reader)(sock, _settle, ready)
    try:
        await ready
    finally:
        if sock.fileno() >= 0:
            (loop.remove_writer if sending else loop.remove_reader)(sock)


def _settle(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
