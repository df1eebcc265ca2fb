"""The source's memory that pieces are laid out in, and what one sink has of it.

Files are not registered with transports: that would pin a model's pages in memory, and a mapped
file that someone truncates kills who reads it. Pieces are read from the file (by the kernel,
straight into place, mostly from its cache) into a segment of a few slots, which transports know.
A slot is one sink's until that says it has read it, or is gone.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from kvtransfer.errors import WeightsInvalidError, WeightsNotGivenError
from kvtransfer.memory import NONCE_BYTES, Segment
from kvtransfer.offload import Offload
from kvtransfer.weights.manifest import Manifest
from tandem.weights.v1 import weights_pb2 as pb

WINDOW = 8
"""Pieces that a sink may have asked for and not read."""
SLOTS = 4 * WINDOW
SILENT_SECONDS = 30.0
"""A sink that holds slots and says nothing for this long is given up."""


class Slots:
    """Memory for SLOTS pieces, first come, first served."""

    def __init__(self, piece_bytes: int, count: int = SLOTS) -> None:
        self.segment = Segment(count * piece_bytes, secrets.token_bytes(NONCE_BYTES))
        self._view = memoryview(self.segment.data.data)
        self._piece_bytes = piece_bytes
        self._free: asyncio.Queue[int] = asyncio.Queue()
        for slot in range(count):
            self._free.put_nowait(slot)

    async def take(self) -> int:
        """A free slot; its offset in the segment."""
        return await self._free.get() * self._piece_bytes

    def give_back(self, offset: int) -> None:
        """The opposite of take()."""
        self._free.put_nowait(offset // self._piece_bytes)

    def fill(self, offset: int, fd: int, start: int, length: int) -> int:
        """Reads a run of a file into a slot. Blocks. Returns how many bytes there were."""
        done = 0
        while done < length:
            into = self._view[offset + done : offset + length]
            count = os.preadv(fd, [into], start + done)
            if not count:
                break
            done += count
        return done


class Giving:
    """One sink's call: what it asks for, and the slots that it holds."""

    def __init__(self, folder: Path, manifest: Manifest, slots: Slots, offload: Offload) -> None:
        self.bytes = 0
        """Laid out so far."""
        self._folder = folder
        self._manifest = manifest
        self._slots = slots
        self._offload = offload
        self._wanted: deque[int] = deque()
        self._held: dict[int, int] = {}
        """Offsets of pieces laid out and not read yet, by number."""
        self._ended = False
        self._news = asyncio.Event()
        self._fault: Exception | None = None
        self._files: dict[int, int] = {}

    async def listen(self, requests: AsyncIterator[pb.GiveRequest]) -> None:
        """Takes the sink's messages until there are no more; next() raises what is wrong."""
        try:
            async for request in requests:
                self._take(request)
                self._news.set()
        except Exception as error:
            self._fault = error
        self._ended = True
        self._news.set()

    async def next(self) -> int | None:
        """The piece to lay out next; None: the sink wants no more.

        Raises WeightsInvalidError, WeightsNotGivenError if the sink is silent for too long.
        """
        while not self._wanted:
            if self._fault is not None:
                raise self._fault
            if self._ended:
                return None
            self._news.clear()
            try:
                async with asyncio.timeout(SILENT_SECONDS if self._held else None):
                    await self._news.wait()
            except TimeoutError:
                raise WeightsNotGivenError(
                    f"the sink has read nothing for {SILENT_SECONDS:g} s"
                ) from None
        return self._wanted.popleft()

    async def lay_out(self, number: int) -> int:
        """Reads a piece into a slot, once one is free; its offset.

        Raises WeightsNotGivenError if the file is not what it was, OSError.
        """
        piece = self._manifest.piece(number)
        offset = self._held[number] = await self._slots.take()
        fd = self._file(piece.file)

        def read(stop: Callable[[], bool]) -> int:
            return self._slots.fill(offset, fd, piece.offset, piece.length)

        if await self._offload.run(read, piece.length) < piece.length:
            name = self._manifest.files[piece.file].name
            raise WeightsNotGivenError(f"{name} became shorter", file=name)
        self.bytes += piece.length
        return offset

    def _file(self, index: int) -> int:
        if index not in self._files:
            path = self._folder / self._manifest.files[index].name
            self._files[index] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[index]

    def close(self) -> None:
        """Gives everything back. Idempotent."""
        while self._held:
            self._slots.give_back(self._held.popitem()[1])
        while self._files:
            os.close(self._files.popitem()[1])

    def _take(self, request: pb.GiveRequest) -> None:
        kind = request.WhichOneof("message")
        if kind == "want":
            for number in request.want.numbers:
                self._manifest.piece(number)
                if number in self._held or number in self._wanted:
                    raise WeightsInvalidError(f"piece {number} is asked for twice at once")
                self._wanted.append(number)
            if len(self._wanted) + len(self._held) > WINDOW:
                raise WeightsInvalidError(f"more than {WINDOW} pieces are asked for at once")
        elif kind == "read":
            for number in request.read.numbers:
                offset = self._held.pop(number, None)
                if offset is not None:
                    self._slots.give_back(offset)
        else:
            raise WeightsInvalidError("a call for weights is opened twice, or says nothing")
