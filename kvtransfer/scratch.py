"""How a worker's segment is divided, and the part of it that is lent out for a while.

    0             blocks, one after the other
    generations   one little-endian uint64 for each block
    room          for generations that fetches read from sources
    scratch       memory for bytes on their way: registered like the blocks, and so readable into

Transports register the whole of it once; a fetch that needs room besides its blocks borrows some.
Generations have a room of their own: each read borrows some of it first and holds it while it waits
for scratch, and in one room those would wait for each other for ever.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

ALIGNMENT = 4096
SCRATCH_BYTES = 64 * 2**20
"""Address space; physical memory is taken as it is first used."""
ROOM_BYTES = 2**20
"""For the generations of 32 of the largest reads at a time (fetching.BATCH_PIECES); others wait."""


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """Offsets in a segment, bytes; every part starts at a multiple of 4096."""

    generations: int
    room: int
    scratch: int
    nbytes: int

    @classmethod
    def of(cls, blocks: int, block_bytes: int, scratch_bytes: int) -> SegmentPlan:
        """For so many blocks."""
        generations = _aligned(blocks * block_bytes)
        room = _aligned(generations + 8 * blocks)
        scratch = room + ROOM_BYTES
        return cls(generations, room, scratch, scratch + scratch_bytes)


class Scratch:
    """`nbytes` from `offset` of a segment, lent in pieces. On one event loop.

    First come, first served: a large request is not starved by small ones.
    """

    def __init__(self, offset: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self._free = [(offset, nbytes)]
        self._waiting: deque[tuple[int, asyncio.Future[int]]] = deque()

    @property
    def lent(self) -> int:
        """Bytes that somebody has now."""
        return self.nbytes - sum(size for _, size in self._free)

    @asynccontextmanager
    async def borrow(self, nbytes: int) -> AsyncIterator[int]:
        """Offset in the segment of so many bytes, for the time of the context.

        Waits until there is room. Raises ValueError if there never can be.
        """
        size = max(ALIGNMENT, _aligned(nbytes))
        if size > self.nbytes:
            raise ValueError(f"{nbytes} bytes of scratch wanted, there are {self.nbytes}")
        offset = await self._take(size)
        try:
            yield offset
        finally:
            self._give(offset, size)

    async def _take(self, size: int) -> int:
        offset = None if self._waiting else self._carve(size)
        if offset is not None:
            return offset
        turn: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._give(turn.result(), size)
            else:
                self._serve()  # Who waited behind it may have room enough.
            raise

    def _carve(self, size: int) -> int | None:
        for i, (offset, room) in enumerate(self._free):
            if room >= size:
                self._free[i : i + 1] = [(offset + size, room - size)] if room > size else []
                return offset
        return None

    def _give(self, offset: int, size: int) -> None:
        merged: list[tuple[int, int]] = []
        for start, room in sorted([*self._free, (offset, size)]):
            if merged and sum(merged[-1]) == start:
                merged[-1] = merged[-1][0], merged[-1][1] + room
            else:
                merged.append((start, room))
        self._free = merged
        self._serve()

    def _serve(self) -> None:
        while self._waiting:
            size, turn = self._waiting[0]
            if turn.cancelled():  # Its task has yet to hear of it.
                self._waiting.popleft()
                continue
            offset = self._carve(size)
            if offset is None:
                return
            self._waiting.popleft()
            turn.set_result(offset)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
