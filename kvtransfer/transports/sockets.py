"""What asyncio lacks for raw sockets: vectors out, exact reads into memory, a safe end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

RECEIVE_BYTES = 2**20
"""At most this much is copied in one go, so that the event loop gets its turn."""

VECTORS = 512
"""Half of what systems take at once (IOV_MAX)."""


async def receive_into(sock: socket.socket, view: memoryview) -> None:
    """Fills `view`. Raises EOFError if the peer closes first, OSError if the connection breaks."""
    loop = asyncio.get_running_loop()
    while view:
        count = await loop.sock_recv_into(sock, view[:RECEIVE_BYTES])
        if not count:
            raise EOFError("the peer closed the connection")
        view = view[count:]


async def receive(sock: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes. Raises as receive_into()."""
    data = bytearray(size)
    await receive_into(sock, memoryview(data))
    return bytes(data)


async def send_vectors(sock: socket.socket, views: Sequence[memoryview]) -> None:
    """Sends all bytes of some buffers, in order, without joining them. Raises OSError."""
    waiting = [view for view in views if view]
    first = 0
    while first < len(waiting):
        try:
            sent = sock.sendmsg(waiting[first : first + VECTORS])
        except (BlockingIOError, InterruptedError):
            await _writable(sock)
            continue
        while first < len(waiting) and sent >= len(waiting[first]):
            sent -= len(waiting[first])
            first += 1
        if sent:
            waiting[first] = waiting[first][sent:]


def end(sock: socket.socket) -> None:
    """Closes a socket that something may still wait for. Idempotent."""
    if sock.fileno() < 0:
        return
    loop = asyncio.get_running_loop()
    loop.remove_reader(sock)
    loop.remove_writer(sock)
    sock.close()


async def _writable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_writer(sock, _settle, ready)
    try:
        await ready
    finally:
        if sock.fileno() >= 0:
            loop.remove_writer(sock)


def _settle(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
