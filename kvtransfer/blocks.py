"""A worker's KV blocks: their memory, what each holds, and who else has it.

One lock guards pool, events, tiers and what store.py adds to them; each call holds it for
microseconds and never while it computes a checksum or wakes anyone.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvtransfer.layout import KvLayout
from kvtransfer.memory import NONCE_BYTES, Segment
from kvtransfer.news import ChangeLog, ChangeLogs, StoreEvents, Where
from kvtransfer.pieces import PieceGrid
from kvtransfer.pool import BlockPool
from kvtransfer.scratch import SCRATCH_BYTES, Scratch, SegmentPlan
from kvtransfer.tiers.base import Label
from kvtransfer.tiers.books import SpillBooks

if TYPE_CHECKING:
    from kvtransfer.tiers.tiers import Tiers


@dataclass(frozen=True, slots=True)
class Spill:
    """A committed block to be copied to the top tier, as it was when it was chosen."""

    block: int
    generation: int
    label: Label


class BlockStore:
    """`blocks` blocks of one layout. Thread-safe.

    `memory` is uint8 [blocks, layout.block_bytes], in the segment: the engine writes into it,
    transports read from it. Behind it lie the generations of the blocks, for sinks to read, and
    `scratch_bytes` of scratch (scratch.py). A block's bytes may be written only by who holds a
    reference on it, and not once it is committed or under a lease.
    """

    def __init__(
        self,
        layout: KvLayout,
        blocks: int,
        *,
        layers_per_piece: int,
        scratch_bytes: int = SCRATCH_BYTES,
        nonce: bytes | None = None,
    ) -> None:
        self.layout = layout
        self.total_blocks = blocks
        self.grid = PieceGrid(layout.layers, layers_per_piece)
        self.layers_per_piece = layers_per_piece
        # The layout computes these each time.
        self.layer_bytes, self.block_bytes = layout.layer_bytes, layout.block_bytes
        plan = SegmentPlan.of(blocks, self.block_bytes, scratch_bytes)
        self.segment = Segment(plan.nbytes, nonce or secrets.token_bytes(NONCE_BYTES))
        self.memory: NDArray[np.uint8] = self.segment.data[: blocks * self.block_bytes].reshape(
            blocks, self.block_bytes
        )
        self.generations_offset = plan.generations
        """Where sinks find the generations of all blocks in the segment, bytes."""
        self._generations = self.segment.data[plan.generations :][: blocks * 8].view("<u8")
        self.room = Scratch(plan.room, plan.scratch - plan.room)
        """Registered memory for generations that fetches read."""
        self.scratch = Scratch(plan.scratch, plan.nbytes - plan.scratch)
        """Registered memory for what is on its way and has no block."""
        self._lock = threading.Lock()
        self._pool = BlockPool(blocks)
        self._ready = [0] * blocks
        self._tenants = [""] * blocks
        self._checksums = np.zeros((blocks, self.grid.count), np.uint64)
        self._log = ChangeLogs()
        self._own_log = self._log.begin()
        self.tiers: Tiers | None = None
        """Where evicted blocks go, see attach()."""
        self._books: SpillBooks | None = None
        self._listeners: list[Callable[[], None]] = []

    @property
    def generations(self) -> NDArray[np.uint64]:
        """Of all blocks: a view, which changes as they do. Of a block held it is not in doubt."""
        return self._generations

    # Blocks

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Blocks of the longest cached prefix of `keys`; takes one reference on each."""
        with self._lock:
            return self._pool.match(keys)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each, all or none.

        Evicts the least recently used cached blocks if it must. Raises OutOfBlocksError.
        """
        with self._lock:
            blocks, removed = self._pool.allocate(count)
            for block in blocks:
                self._ready[block] = 0
                self._generations[block] = self._pool.generation(block)
            self._note_removed(removed)
        if removed:
            self._changed()
        if self.tiers is not None:
            self.tiers.nudge()
        return blocks

    def retain(self, blocks: Sequence[int]) -> None:
        """One more reference on each. Raises ValueError if one is not held."""
        with self._lock:
            self._pool.retain(blocks)

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less on each: committed blocks stay cached. Raises ValueError."""
        with self._lock:
            freed = self._pool.release(blocks)
        if freed:
            self._changed()

    def available(self) -> int:
        """Blocks that allocate() can give."""
        with self._lock:
            return self._pool.available

    # Content

    def begin(self, block: int, key: bytes, tenant: str = "") -> None:
        """The block is going to hold `key`, of a full or a partial block, computed for `tenant`.

        Raises ValueError if it is not held, or if others rely on what it has.
        """
        with self._lock:
            unkeyed, generation = self._pool.key(block) is None, self._pool.generation(block)
            removed = self._pool.begin(block, key)
            if unkeyed or self._pool.generation(block) != generation:
                self._ready[block] = 0
                self._generations[block] = self._pool.generation(block)
                self._tenants[block] = tenant
            if removed is not None:
                self._note_removed([removed])
        if removed is not None:
            self._changed()

    def piece_done(self, block: int, first_layer: int, layers: int) -> None:
        """The bytes of a layer range, one or more whole pieces, are final from now on.

        Computes checksums, makes the pieces readable and wakes the fetches that wait for them.
        Raises ValueError if the block was not begun or the range is not whole pieces.
        """
        indices = self.grid.indices(first_layer, layers)
        self.pieces_verified(block, indices, [self._checksum(block, i) for i in indices])

    def pieces_verified(self, block: int, indices: Iterable[int], checksums: Iterable[int]) -> None:
        """piece_done for who has just computed the checksums over these very bytes."""
        with self._lock:
            if self._pool.key(block) is None:
                raise ValueError(f"block {block} was not begun")
            wakes: list[Callable[[], None]] = []
            for index, value in zip(indices, checksums, strict=True):
                if self._ready[block] >> index & 1:
                    continue
                self._checksums[block, index] = value
                self._ready[block] |= 1 << index
                wakes += self._piece_ready(block, index)
        call_all(wakes)

    def commit(self, block: int) -> bool:
        """A full block, all pieces done, enters the prefix index.

        False if another block has the key already: then this one stays private, which is no error.
        Raises ValueError if pieces are missing.
        """
        with self._lock:
            if self._ready[block] != self.grid.all:
                raise ValueError(f"block {block} is not complete")
            key = self._pool.key(block)
            before = Where.NOWHERE if key is None else self._where(key)
            entered = self._pool.commit(block)
            if entered and key is not None:
                self._log.note(key, before, Where.POOL)
        if entered:
            self._changed()
        return entered

    def seal(self, block: int, key: bytes, tenant: str = "") -> bool:
        """begin, all pieces done, commit: for a block that decoding has filled."""
        self.begin(block, key, tenant)
        self.piece_done(block, 0, self.layout.layers)
        return self.commit(block)

    # Tiers

    def attach(self, tiers: Tiers, books: SpillBooks) -> None:
        """Blocks go to `tiers` before they are evicted, and come back from there.

        To be called once, before anything is in the pool. Raises ValueError.
        """
        with self._lock:
            if self._books is not None or self._pool.free < self._pool.total:
                raise ValueError("tiers belong to a pool from its beginning")
            self.tiers, self._books, self._pool.watcher = tiers, books, books
            self._log.restart()

    def next_spill(self) -> Spill | None:
        """What to copy to the top tier next, if anything should be now."""
        with self._lock:
            if self._books is None:
                return None
            block = self._books.next(self._pool.free, self._pool.available)
            key = None if block is None else self._pool.key(block)
            if block is None or key is None:
                return None
            checksums = self._checksums[block].astype("<u8", copy=False).tobytes()
            label = Label(key, self._tenants[block], checksums)
            return Spill(block, self._pool.generation(block), label)

    def unchanged(self, spill: Spill) -> bool:
        """Whether the block has had the same content all the time since next_spill()."""
        with self._lock:
            return self._pool.generation(spill.block) == spill.generation

    def set_tiers(self, levels: Mapping[bytes, int | None]) -> None:
        """Where in the tiers keys are now, 0 is the top, or that they are in none.

        For one caller at a time, who saw it in the tiers.
        """
        with self._lock:
            if self._books is None:
                return
            before = {key: self._where(key) for key in levels}
            found = {key: self._pool.find(key) for key in levels}
            blocks = {
                key: (block, self._pool.references(block) > 0)
                for key, block in found.items()
                if block is not None
            }
            self._books.set_levels(levels, blocks)
            pushed_out = dict.fromkeys(self._books.take_unannounced(), Where.LOWER)
            changed = self._note(pushed_out | before)
        if changed:
            self._changed()

    def in_tiers(self, keys: Sequence[bytes]) -> int:
        """How many leading ones of `keys` are in a tier."""
        with self._lock:
            return sum(1 for _ in takewhile(self._in_tier, keys))

    # News

    def events(self, log: ChangeLog | None = None) -> StoreEvents:
        """Changes since the last call of the keys announced. For one consumer, or for each `log`.

        These are the pool's, and as lower ones the latest of those that only a tier has. They are
        net changes; the first answer is a snapshot.
        """
        with self._lock:
            return (log or self._own_log).drain(self._keys)

    def snapshot(self) -> StoreEvents:
        """All keys announced; events() then goes on from here."""
        with self._lock:
            self._own_log.restart()
            return self._own_log.drain(self._keys)

    def begin_log(self) -> ChangeLog:
        """For one more consumer of events()."""
        with self._lock:
            return self._log.begin()

    def end_log(self, log: ChangeLog) -> None:
        """Its consumer asks no more."""
        with self._lock:
            self._log.end(log)

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls back, from any thread, whenever keys, free blocks, leases or fetches changed.

        The callback must be quick and not raise. Returns what takes it off again.
        """
        self._listeners = [*self._listeners, callback]

        def stop() -> None:
            self._listeners = [c for c in self._listeners if c is not callback]

        return stop

    def close(self) -> None:
        """Nobody can map the memory any more; arrays on it stay valid."""
        self.segment.close()

    # All below are called with the lock held.

    def _piece_ready(self, block: int, index: int) -> list[Callable[[], None]]:
        """A piece of a block is final; whom to wake for it, once the lock is let go."""
        return []

    def _in_tier(self, key: bytes) -> bool:
        return self._books is not None and key in self._books

    def _where(self, key: bytes) -> Where:
        """As far as it is announced: only the latest of the tiers' keys are."""
        if self._pool.find(key) is not None:
            return Where.POOL
        tiered = self._books is not None and key in self._books.announced
        return Where.LOWER if tiered else Where.NOWHERE

    def _keys(self) -> dict[Where, Iterable[bytes]]:
        lower = () if self._books is None else self._books.announced
        return {Where.POOL: self._pool.keys(), Where.LOWER: lower}

    def _note_removed(self, keys: Iterable[bytes]) -> None:
        """Keys left the pool's index, and may have pushed others out of what is announced."""
        pushed_out = () if self._books is None else self._books.take_unannounced()
        self._note(dict.fromkeys(pushed_out, Where.LOWER) | dict.fromkeys(keys, Where.POOL))

    def _note(self, before: Mapping[bytes, Where]) -> bool:
        """Notes where keys are that were there; whether any is elsewhere now."""
        changed = False
        for key, was in before.items():
            now = self._where(key)
            changed = changed or now is not was
            self._log.note(key, was, now)
        return changed

    # And these without.

    def _checksum(self, block: int, index: int) -> int:
        first, layers = self.grid.span(index)
        size = self.layer_bytes
        return checksum(self.memory[block, first * size : (first + layers) * size])

    def _changed(self) -> None:
        call_all(self._listeners)


def checksum(data: NDArray[np.uint8]) -> int:
    """XXH3-64 of contiguous bytes."""
    return xxhash.xxh3_64_intdigest(data.data)


def call_all(callbacks: Iterable[Callable[[], None]]) -> None:
    """One after the other; never with a lock held."""
    for callback in callbacks:
        callback()
