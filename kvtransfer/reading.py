"""Reading pieces into place, and checking there that they are what was announced.

The checksum says whether the bytes are right. The generations of the source's blocks, read after
the bytes, say whether the source still meant them: it raises a generation before it lets anybody
write, so a reader that finds it unchanged afterwards has read what was announced.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np

from kvtransfer.blocks import checksum
from kvtransfer.landing import Landing
from kvtransfer.offload import Offload
from kvtransfer.pieces import Piece
from kvtransfer.store import KvStore
from kvtransfer.transports.base import Read, Reader

GENERATION_BYTES = 8


class PieceReads:
    """The reads of one fetch, one at a time. On the event loop; long work is in threads."""

    def __init__(self, store: KvStore, offload: Offload, landing: Landing) -> None:
        self._store = store
        self._offload = offload
        self._landing = landing
        self._loop = asyncio.get_running_loop()

    async def read(
        self, reader: Reader, pieces: Sequence[Piece], generations_offset: int, timeout: float
    ) -> tuple[tuple[Piece, ...], bool]:
        """Pieces whose bytes are wrong, and whether a block is not the announced one any more.

        What is right has landed then, unless it is stale. `generations_offset`: where the source
        has its generations, bytes; `timeout` in seconds, of reading alone. Raises TransportError.
        """
        async with (
            # This room first: who has scratch must not wait for anything.
            self._store.room.borrow(GENERATION_BYTES * len(pieces)) as generations,
            self._landing.stage(pieces) as places,
        ):
            # The source's time counts from here: it has no part in the wait for room.
            until = self._loop.time() + timeout
            reads = [Read(p.offset, at, p.length) for p, at in zip(pieces, places, strict=True)]
            await reader.read(merged(reads), timeout)
            verifying = self._loop.create_task(self._verify(pieces, places))
            try:
                left = max(0.0, until - self._loop.time())
                stale = await self._stale(reader, pieces, generations_offset, generations, left)
                wrong = await verifying
            finally:
                verifying.cancel()
            if not stale:
                await self._land(pieces, places, wrong)
        return wrong, stale

    async def _verify(self, pieces: Sequence[Piece], places: Sequence[int]) -> tuple[Piece, ...]:
        """Those whose bytes are not what was announced."""
        data = self._store.segment.data

        def check(stop: Callable[[], bool]) -> tuple[Piece, ...]:
            wrong = []
            for piece, at in zip(pieces, places, strict=True):
                if stop():
                    break
                if checksum(data[at : at + piece.length]) != piece.checksum:
                    wrong.append(piece)
            return tuple(wrong)

        return await self._offload.run(check, sum(p.length for p in pieces))

    async def _stale(
        self,
        reader: Reader,
        pieces: Sequence[Piece],
        generations_offset: int,
        at: int,
        timeout: float,
    ) -> bool:
        """Whether a block is not the announced one any more, by its generation at the source.

        Generations are read to offset `at`.
        """
        size = self._landing.layout.block_bytes
        announced = {piece.offset // size: piece.generation for piece in pieces}
        blocks = sorted(announced)
        reads = [
            Read(
                generations_offset + GENERATION_BYTES * block,
                at + GENERATION_BYTES * i,
                GENERATION_BYTES,
            )
            for i, block in enumerate(blocks)
        ]
        await reader.read(merged(reads), timeout)
        raw = self._store.segment.data[at : at + GENERATION_BYTES * len(blocks)]
        now: list[int] = np.frombuffer(raw, "<u8").tolist()
        return now != [announced[block] for block in blocks]

    async def _land(
        self, pieces: Sequence[Piece], places: Sequence[int], wrong: Sequence[Piece]
    ) -> None:
        if not self._landing.converts:
            return
        bad = set(wrong)
        good = [(p, at) for p, at in zip(pieces, places, strict=True) if p not in bad]
        await self._offload.run(
            lambda stop: self._landing.land([p for p, _ in good], [at for _, at in good]),
            sum(p.length for p, _ in good),
        )


def merged(reads: Sequence[Read]) -> list[Read]:
    """The same bytes in fewer reads: neighbours on both sides become one."""
    result: list[Read] = []
    for read in reads:
        last = result[-1] if result else None
        if (
            last is not None
            and last.remote + last.length == read.remote
            and last.local + last.length == read.local
        ):
            result[-1] = Read(last.remote, last.local, last.length + read.length)
        else:
            result.append(read)
    return result
