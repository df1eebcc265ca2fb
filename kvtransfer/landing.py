"""Where the pieces of a fetch go: straight into blocks, or through a conversion."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from kvtransfer.fetching import Span
from kvtransfer.layout import KvLayout
from kvtransfer.pieces import Piece
from kvtransfer.report import Progress
from kvtransfer.store import KvStore


class Landing(Protocol):
    """What becomes of the bytes of one fetch. On the event loop but for land()."""

    layout: KvLayout
    """The layout that the source is asked for, and whose pieces come."""
    converts: bool
    """Whether land() has work to do."""

    def stage(self, pieces: Sequence[Piece]) -> AbstractAsyncContextManager[Sequence[int]]:
        """Offsets in the sink's segment to read each piece to, for the time of the context."""

    def land(self, pieces: Sequence[Piece], places: Sequence[int]) -> None:
        """These are in place and verified; inside the context of stage(), maybe in a thread."""

    def complete(self, index: int, checksums: Mapping[Span, int]) -> None:
        """Every layer of key `index` has landed; checksums by (first layer, layers)."""


class DirectLanding:
    """Same layout on both sides: pieces are read into their blocks, and verified there.

    Full blocks are sealed in the store as they complete; with `partial_last` the last one only
    has its bytes in place, because it may be a partial block, which is nobody's prefix.
    """

    converts = False

    def __init__(
        self,
        store: KvStore,
        keys: Sequence[bytes],
        blocks: Sequence[int],
        *,
        partial_last: bool,
        tenant: str = "",
        on_progress: Progress | None = None,
    ) -> None:
        self.layout = store.layout
        self._store = store
        self._keys = keys
        self._blocks = blocks
        self._partial_last = partial_last
        self._tenant = tenant
        self._on_progress = on_progress

    @asynccontextmanager
    async def stage(self, pieces: Sequence[Piece]) -> AsyncIterator[Sequence[int]]:
        """Their places in the blocks."""
        yield [self._place(piece) for piece in pieces]

    def land(self, pieces: Sequence[Piece], places: Sequence[int]) -> None:
        """They are where they belong."""

    def complete(self, index: int, checksums: Mapping[Span, int]) -> None:
        """Seals the block."""
        if not (self._partial_last and index == len(self._keys) - 1):
            self._seal(self._blocks[index], self._keys[index], checksums)
        if self._on_progress is not None:
            self._on_progress(index)

    def _seal(self, block: int, key: bytes, checksums: Mapping[Span, int]) -> None:
        store = self._store
        store.begin(block, key, self._tenant)
        spans = [store.grid.span(i) for i in range(store.grid.count)]
        if all(span in checksums for span in spans):
            # Both sides cut blocks alike: what was just verified need not be computed again.
            store.pieces_verified(block, range(len(spans)), [checksums[s] for s in spans])
        else:
            store.piece_done(block, 0, store.layout.layers)
        store.commit(block)

    def _place(self, piece: Piece) -> int:
        store, block = self._store, self._blocks[piece.key_index]
        return block * store.block_bytes + piece.first_layer * store.layer_bytes
