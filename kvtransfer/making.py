"""The sink's blocks in the making, while pieces of other layouts land for them.

A source's pieces are staged in scratch, where they are verified, and converted from there into the
blocks. A block that has all its tokens from every source is sealed under the sink's own key.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from kvtransfer.assembly import Assembly
from kvtransfer.blocks import checksum
from kvtransfer.conversion import Contribution, Conversion, convert
from kvtransfer.errors import TransportError
from kvtransfer.fetching import Span
from kvtransfer.keys import block_keys
from kvtransfer.landing import DirectLanding, Landing
from kvtransfer.layout import KvLayout
from kvtransfer.offload import INLINE_BYTES
from kvtransfer.pieces import Piece
from kvtransfer.report import Progress
from kvtransfer.store import KvStore

SaltOf = Callable[[str], bytes]
"""Of a layout's fingerprint: keys.salt() with the model, tenant and adapter of the sequence."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Whose KV: that of `tokens` from the `skip`th on."""

    tokens: Sequence[int]
    salt_of: SaltOf
    skip: int
    partial: bool
    """The sources have their incomplete last blocks too."""
    tenant: str

    def keys(self, layout: KvLayout, *, partial: bool) -> list[bytes]:
        """Of the blocks of a layout, from the start of the sequence."""
        salt = self.salt_of(layout.fingerprint)
        return block_keys(self.tokens, layout.block_tokens, salt, partial=partial)


@dataclass(frozen=True, slots=True)
class Part:
    """What is to be fetched from one source."""

    source: int
    """Index into the sources."""
    first_block: int
    """Which block of the sequence the first key is of."""
    keys: Sequence[bytes]
    landing: Landing


class Making:
    """Blocks of a store that become those of a sequence. On the event loop but for landing.

    `parts` are to be fetched. Full blocks are sealed if `commit`, and `on_progress` told of each
    whole one by its index into `blocks`; sealed() waits for what is being sealed.
    """

    def __init__(
        self,
        store: KvStore,
        conversion: Conversion,
        wanted: Wanted,
        blocks: Sequence[int],
        *,
        commit: bool,
        on_progress: Progress | None,
    ) -> None:
        layout, contributions = store.layout, conversion.contributions
        self.assembly = Assembly(
            [c.layout.block_tokens for c in contributions],
            layout.block_tokens,
            range(wanted.skip, len(wanted.tokens)),
        )
        self.store = store
        self._first = self.assembly.blocks.start
        self._blocks = blocks
        self._tenant = wanted.tenant
        self._on_progress = on_progress
        self._sealing: set[asyncio.Task[None]] = set()
        direct = commit and conversion.identical
        # A direct landing seals for itself.
        self._keys = wanted.keys(layout, partial=False) if commit and not direct else []
        self.parts = [self._part(i, c, wanted, direct=direct) for i, c in enumerate(contributions)]

    def memory(self, number: int) -> NDArray[np.uint8]:
        """Of the sink's block with this number in the sequence."""
        size, block = self.store.block_bytes, self._blocks[number - self._first]
        return self.store.segment.data[block * size : (block + 1) * size]

    def landed(self, contribution: int, source_block: int) -> None:
        """A source's block is in."""
        for number in self.assembly.landed(contribution, source_block):
            if number < len(self._keys):
                task = asyncio.get_running_loop().create_task(self._seal(number))
                self._sealing.add(task)
            else:
                self._tell(number)

    async def sealed(self) -> None:
        """Every block that is whole is sealed. Raises ValueError for one that was not held."""
        await asyncio.gather(*self._sealing)

    def _part(
        self, number: int, contribution: Contribution, wanted: Wanted, *, direct: bool
    ) -> Part:
        first = self.assembly.source_blocks(number).start
        keys = wanted.keys(contribution.layout, partial=wanted.partial)[first:]
        landing: Landing = ConvertingLanding(self, number, contribution, first)
        if direct:
            whole = len(wanted.tokens) // contribution.layout.block_tokens - first
            landing = DirectLanding(
                self.store,
                keys,
                self._blocks,
                partial_last=len(keys) > whole,
                tenant=self._tenant,
                on_progress=lambda index: self.landed(number, first + index),
            )
        return Part(contribution.source, first, keys, landing)

    async def _seal(self, number: int) -> None:
        """What was converted has checksums of its own, which take a while."""
        store, data, size = self.store, self.memory(number), self.store.layer_bytes
        indices = range(store.grid.count)

        def checksums() -> list[int]:
            spans = [store.grid.span(index) for index in indices]
            return [checksum(data[at * size : (at + layers) * size]) for at, layers in spans]

        found = checksums() if len(data) <= INLINE_BYTES else await asyncio.to_thread(checksums)
        block = self._blocks[number - self._first]
        store.begin(block, self._keys[number], self._tenant)
        store.pieces_verified(block, indices, found)
        store.commit(block)
        self._tell(number)

    def _tell(self, number: int) -> None:
        if self._on_progress is not None:
            self._on_progress(number - self._first)


class ConvertingLanding:
    """Where one source's pieces go: into scratch, and converted from there."""

    converts = True

    def __init__(
        self, making: Making, number: int, contribution: Contribution, first_block: int
    ) -> None:
        self.layout = contribution.layout
        self._making = making
        self._number = number
        self._contribution = contribution
        self._first_block = first_block

    @asynccontextmanager
    async def stage(self, pieces: Sequence[Piece]) -> AsyncIterator[Sequence[int]]:
        """One after the other in scratch. Raises TransportError if they never fit."""
        scratch, starts = self._making.store.scratch, [0, *accumulate(p.length for p in pieces)]
        if starts[-1] > scratch.nbytes:
            raise TransportError(
                f"pieces of {starts[-1]} bytes to convert do not fit the {scratch.nbytes} bytes "
                "of scratch here (scratch_bytes)"
            )
        async with scratch.borrow(starts[-1]) as at:
            yield [at + start for start in starts[:-1]]

    def land(self, pieces: Sequence[Piece], places: Sequence[int]) -> None:
        """Converts them. In any thread: no two landings write the same bytes."""
        making, data = self._making, self._making.store.segment.data
        for piece, at in zip(pieces, places, strict=True):
            first = piece.first_layer * making.store.layer_bytes
            block = self._first_block + piece.key_index
            for window in making.assembly.windows(self._number, block):
                into = making.memory(window.sink_block)[first:]
                convert(self._contribution, data[at : at + piece.length], into, window)

    def complete(self, index: int, checksums: Mapping[Span, int]) -> None:
        """A source's block is in. Its checksums are of the bytes before they were converted."""
        self._making.landed(self._number, self._first_block + index)
