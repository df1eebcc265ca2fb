"""A worker's KV blocks: the memory, the books of it, and what fetches may read of it.

One lock guards pool, leases, events and watches; each call holds it for microseconds and never
while it computes a checksum or wakes anyone. Callers are the engine's thread, which writes blocks,
and the event loop, which serves fetches.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvtransfer.errors import BlocksNotHeldError, WrongTenantError
from kvtransfer.layout import KvLayout
from kvtransfer.leases import LeaseState, LeaseTable
from kvtransfer.memory import NONCE_BYTES, Segment
from kvtransfer.news import ChangeLog, StoreEvents
from kvtransfer.pieces import Piece, PieceGrid
from kvtransfer.pool import BlockPool
from kvtransfer.scratch import SCRATCH_BYTES, Scratch, SegmentPlan
from kvtransfer.tiers.base import Label, TierStats
from kvtransfer.tiers.books import SpillBooks
from kvtransfer.watches import Watch, WatchTable, lost

if TYPE_CHECKING:
    from kvtransfer.tiers.tiers import Tiers


@dataclass(frozen=True, slots=True)
class StoreStats:
    """The pool's books at one moment, in blocks: free + cached + held = total."""

    total: int
    free: int
    cached: int
    held: int
    leases: int
    evicted: int
    """Cached blocks evicted since the start."""
    expired: int
    """Leases that expired since the start."""
    watches: int
    """Fetches being served."""
    lost: int = 0
    """Of the evicted, those that no tier had; without tiers, 0."""
    restored: int = 0
    """Blocks brought back from tiers."""
    tiers: tuple[TierStats, ...] = ()
    """From the top."""


@dataclass(frozen=True, slots=True)
class Spill:
    """A committed block to be copied to the top tier, as it was when it was chosen."""

    block: int
    generation: int
    label: Label


class KvStore:
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
        clock: Callable[[], float] = time.monotonic,
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
        self._clock = clock
        self._lock = threading.Lock()
        self._pool = BlockPool(blocks)
        self._leases = LeaseTable()
        self._watches = WatchTable()
        self._ready = [0] * blocks
        self._tenants = [""] * blocks
        self._checksums = np.zeros((blocks, self.grid.count), np.uint64)
        self._log = ChangeLog()
        self._expired = 0
        self.tiers: Tiers | None = None
        """Where evicted blocks go, see attach()."""
        self._books: SpillBooks | None = None
        self._listeners: list[Callable[[], None]] = []

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
            woken: list[Watch] = []
            for index, value in zip(indices, checksums, strict=True):
                if self._ready[block] >> index & 1:
                    continue
                self._checksums[block, index] = value
                self._ready[block] |= 1 << index
                more = self._ready[block] != self.grid.all
                woken += self._watches.piece(block, partial(self._piece, block, index), more=more)
            wakes = _disarm(woken)
        _call(wakes)

    def commit(self, block: int) -> bool:
        """A full block, all pieces done, enters the prefix index.

        False if another block has the key already: then this one stays private, which is no error.
        Raises ValueError if pieces are missing.
        """
        with self._lock:
            if self._ready[block] != self.grid.all:
                raise ValueError(f"block {block} is not complete")
            key = self._pool.key(block)
            known = key is not None and self._announced(key)
            entered = self._pool.commit(block)
            if entered and key is not None and not known:
                self._log.note([key], stored=True)
        if entered:
            self._changed()
        return entered

    def seal(self, block: int, key: bytes, tenant: str = "") -> bool:
        """begin, all pieces done, commit: for a block that decoding has filled."""
        self.begin(block, key, tenant)
        self.piece_done(block, 0, self.layout.layers)
        return self.commit(block)

    # Leases

    def open_lease(self, lease_id: str, seconds: float, tenant: str = "") -> bool:
        """A prompt of `tenant` was accepted whose blocks will be fetched.

        False if the lease ended already. It does not expire before lease_complete; then `seconds`
        after it was last touched.
        """
        with self._lock:
            return self._leases.open(lease_id, seconds, self._clock(), tenant)

    def lease_add(self, lease_id: str, blocks: Sequence[int], keys: Sequence[bytes]) -> None:
        """Adds held blocks to an open lease, which takes its own references on them.

        Their pieces may be ready, or become so later. A lease that ended takes nothing. Raises
        ValueError if a block is not held, or was begun with another key.
        """
        with self._lock:
            for block, key in zip(blocks, keys, strict=True):
                if self._pool.key(block) not in (None, key):
                    raise ValueError(f"block {block} was begun with another key")
                if not self._pool.references(block):
                    raise ValueError(f"block {block} is not held")
            new = self._leases.add(lease_id, blocks, keys, self._clock())
            self._pool.retain(new)
            self._bind(lease_id)
            wakes = _disarm(self._watches.of(lease_id))
        _call(wakes)

    def lease_complete(self, lease_id: str) -> None:
        """Every block is in the lease and final; from now on it can expire.

        Raises ValueError if a block of it lacks pieces. A lease that ended: no matter.
        """
        with self._lock:
            lease = self._leases.live(lease_id)
            for key, block in lease.blocks.items() if lease else ():
                if self._pool.key(block) != key or self._ready[block] != self.grid.all:
                    raise ValueError(f"block {block} of lease {lease_id} is not complete")
            self._leases.complete(lease_id, self._clock())
            wakes = _disarm(self._watches.completed(lease_id) if lease else ())
        _call(wakes)

    def release_lease(self, lease_id: str, why: str = "released") -> bool:
        """Ends a lease, whoever asks and however often; was it live? `why` completes "it was"."""
        with self._lock:
            blocks, wakes = self._end(lease_id, why)
        _call(wakes)
        if blocks is not None:
            self._changed()
        return blocks is not None

    def touch_lease(self, lease_id: str) -> bool:
        """The sink was heard of; False if the lease ended. One not yet opened may come."""
        with self._lock:
            self._leases.touch(lease_id, self._clock())
            return self._leases.state(lease_id) is not LeaseState.ENDED

    def lease_state(self, lease_id: str) -> LeaseState:
        """Where the lease is in its life."""
        with self._lock:
            return self._leases.state(lease_id)

    def expire(self) -> list[str]:
        """Ends the leases whose time has run out; returns them. For a timer."""
        wakes: list[Callable[[], None]] = []
        with self._lock:
            due = self._leases.due(self._clock())
            for lease_id in due:
                wakes += self._end(lease_id, "expired")[1]
            self._expired += len(due)
        _call(wakes)
        if due:
            self._changed()
        return due

    # Fetches

    def watch(
        self,
        lease_id: str,
        keys: Sequence[bytes],
        wake: Callable[[], None],
        adopt_seconds: float,
        *,
        held_only: bool = False,
        tenant: str = "",
    ) -> Watch:
        """Begins to serve a fetch: `wake` is called, from any thread, when take() has news.

        If nobody opened the lease and all keys are cached, the fetch gets a lease of
        `adopt_seconds`. Ended by unwatch(). Raises WrongTenantError, changing nothing, if the
        lease or a block it would adopt is not of `tenant`; with `held_only` BlocksNotHeldError
        if a key's block is not here yet.
        """
        watch = Watch(lease_id, keys, self.grid.count, wake, tenant)
        with self._lock:
            if held_only:
                self._require_held(lease_id, keys)
            if self._leases.state(lease_id) is LeaseState.UNKNOWN:
                self._adopt(lease_id, keys, adopt_seconds, tenant)
            self._watches.add(watch)
            self._bind(lease_id)
            why = self._leases.why_ended(lease_id)
            if why is not None:
                watch.failure = lost(lease_id, why)
            elif self._leases.state(lease_id) is LeaseState.COMPLETE:
                self._watches.completed(lease_id)
        self._changed()
        return watch

    def take(self, watch: Watch, limit: int) -> list[Piece]:
        """Up to `limit` pieces that became ready; none means that wake() will be called.

        Touches the lease. Raises LeaseLostError or BlocksNotHeldError.
        """
        with self._lock:
            if watch.failure is not None:
                raise watch.failure
            self._leases.touch(watch.lease_id, self._clock())
            pieces = watch.ready[:limit]
            del watch.ready[:limit]
            watch.remaining -= len(pieces)
            watch.armed = not pieces
            return pieces

    def unwatch(self, watch: Watch) -> None:
        """A fetch ended, in whatever way. Idempotent."""
        with self._lock:
            self._watches.remove(watch)
        self._changed()

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
            before = {key: self._announced(key) for key in levels}
            found = {key: self._pool.find(key) for key in levels}
            blocks = {
                key: (block, self._pool.references(block) > 0)
                for key, block in found.items()
                if block is not None
            }
            self._books.set_levels(levels, blocks)
            after = {key: self._announced(key) for key in levels}
            pushed_out = [k for k in self._books.take_unannounced() if k not in levels]
            self._log.note([k for k in levels if after[k] > before[k]], stored=True)
            self._log.note([k for k in levels if after[k] < before[k]], stored=False)
            self._log.note(pushed_out, stored=False)
        if after != before or pushed_out:
            self._changed()

    def in_tiers(self, keys: Sequence[bytes]) -> int:
        """How many leading ones of `keys` are in a tier."""
        with self._lock:
            return sum(1 for _ in takewhile(self._in_tier, keys))

    def hold_for_restore(
        self, lease_id: str, keys: Sequence[bytes], tenant: str
    ) -> dict[bytes, int | None]:
        """Prepares for a fetch of `keys` that has no lease yet: each key's block, None if it lacks.

        Takes one reference on each block. Those lacking are to be brought back from a tier. Empty,
        and nothing held, if nothing is to be brought back: because the lease is known, or all are
        in the pool, or some are neither in the pool nor in a tier. Raises WrongTenantError, holding
        nothing, if a block in the pool is not of `tenant`.
        """
        with self._lock:
            found = {key: self._pool.find(key) for key in keys}
            lacking = [key for key, block in found.items() if block is None]
            known = self._leases.state(lease_id) is not LeaseState.UNKNOWN
            if known or not lacking or not all(map(self._in_tier, lacking)):
                return {}
            here = [block for block in found.values() if block is not None]
            if any(self._tenants[block] != tenant for block in here):
                raise WrongTenantError.of(lease_id)
            for key in found.keys() - set(lacking):
                self._pool.match([key])
            return found

    def restored(
        self, lease_id: str, keys: Sequence[bytes], tenant: str
    ) -> AbstractAsyncContextManager[None]:
        """Within it, blocks of `keys` that only a tier has are in the pool: for watch().

        Entering it raises WrongTenantError, before anything is brought back, if a block is not of
        `tenant`.
        """
        return nullcontext() if self.tiers is None else self.tiers.restored(lease_id, keys, tenant)

    # News and proofs

    def events(self) -> StoreEvents:
        """Changes since the last call of the keys announced. For one consumer.

        These are the pool's, and the latest of those that only a tier has. They are net changes;
        the first answer is a snapshot.
        """
        with self._lock:
            return self._log.drain(self._keys)

    def snapshot(self) -> StoreEvents:
        """All keys announced; events() then goes on from here."""
        with self._lock:
            self._log.restart()
            return self._log.drain(self._keys)

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls back, from any thread, whenever keys, free blocks, leases or fetches changed.

        The callback must be quick and not raise. Returns what takes it off again.
        """
        self._listeners = [*self._listeners, callback]

        def stop() -> None:
            self._listeners = [c for c in self._listeners if c is not callback]

        return stop

    def stats(self) -> StoreStats:
        """Now."""
        restored = 0 if self.tiers is None else self.tiers.restored_blocks
        tiers = () if self.tiers is None else self.tiers.stats()
        with self._lock:
            pool = self._pool
            return StoreStats(
                total=pool.total,
                free=pool.free,
                cached=pool.cached,
                held=pool.held,
                leases=len(self._leases),
                evicted=pool.evicted,
                expired=self._expired,
                watches=len(self._watches),
                lost=0 if self._books is None else self._books.lost,
                restored=restored,
                tiers=tiers,
            )

    def check_integrity(self) -> None:
        """Proves free + cached + held = total, and that leases and tiers hold what they should.

        Raises AssertionError.
        """
        with self._lock:
            self._pool.check_integrity()
            for block, count in self._leases.held().items():
                assert self._pool.references(block) >= count, f"block {block} lost a lease's hold"
            for block in range(self.total_blocks):
                assert not self._pool.committed(block) or self._ready[block] == self.grid.all, (
                    f"block {block} is in the index with pieces missing"
                )
            if self._books is not None:
                self._books.check(self._pool.committed_blocks())
        if self.tiers is not None:
            self.tiers.check_integrity()

    def close(self) -> None:
        """Nobody can map the memory any more; arrays on it stay valid."""
        self.segment.close()

    # All below are called with the lock held.

    def _in_tier(self, key: bytes) -> bool:
        return self._books is not None and key in self._books

    def _announced(self, key: bytes) -> bool:
        tiered = self._books is not None and key in self._books.announced
        return tiered or self._pool.find(key) is not None

    def _keys(self) -> Iterable[bytes]:
        return [*self._pool.keys(), *(() if self._books is None else self._books.announced)]

    def _note_removed(self, keys: Iterable[bytes]) -> None:
        """Keys left the pool's index, and may have pushed others out of what is announced."""
        if self._books is not None:
            keys = dict.fromkeys((*keys, *self._books.take_unannounced()))
        self._log.note([k for k in keys if not self._announced(k)], stored=False)

    def _require_held(self, lease_id: str, keys: Sequence[bytes]) -> None:
        lease = self._leases.live(lease_id)
        held = {} if lease is None else lease.blocks
        if all(k in held or self._pool.find(k) is not None for k in keys):
            return
        # What a tier has counts: if no more than that is asked for, it is brought back.
        pooled = held.keys() | {k for k in keys if self._pool.find(k) is not None}
        here = list(takewhile(lambda k: k in pooled or self._in_tier(k), keys))
        if len(here) == len(keys):  # There was no room to bring them back, or it failed.
            here = list(takewhile(pooled.__contains__, keys))
        raise BlocksNotHeldError(
            f"{len(keys) - len(here)} of the {len(keys)} blocks asked for are not held",
            lease_id=lease_id,
            missing=len(keys) - len(here),
            held=len(here),
        )

    def _adopt(self, lease_id: str, keys: Sequence[bytes], seconds: float, tenant: str) -> None:
        blocks = self._pool.match(keys)
        others = any(self._tenants[block] != tenant for block in blocks)
        if len(blocks) == len(keys) and not others:
            self._leases.adopt(lease_id, seconds, blocks, keys, self._clock(), tenant)
            return
        self._pool.release(blocks)
        if others:
            raise WrongTenantError.of(lease_id)

    def _bind(self, lease_id: str) -> None:
        lease = self._leases.live(lease_id)
        if lease is None:
            return
        for watch in self._watches.of(lease_id):
            if watch.tenant != lease.tenant:  # It came before its lease was opened.
                watch.failure = WrongTenantError.of(lease_id)
                continue
            for key in watch.unbound & lease.blocks.keys():
                block, index = lease.blocks[key], watch.indices[key]
                done = self._ready[block] if self._pool.key(block) == key else 0
                ready = [
                    self._piece(block, i, index) for i in range(self.grid.count) if done >> i & 1
                ]
                self._watches.bind(watch, key, block, ready, more=done != self.grid.all)

    def _end(self, lease_id: str, why: str) -> tuple[list[int] | None, list[Callable[[], None]]]:
        blocks = self._leases.end(lease_id, why)
        if blocks:
            self._pool.release(blocks)
        return blocks, _disarm(self._watches.ended(lease_id, why))

    def _piece(self, block: int, index: int, key_index: int) -> Piece:
        first, layers = self.grid.span(index)
        return Piece(
            key_index=key_index,
            first_layer=first,
            layers=layers,
            offset=block * self.block_bytes + first * self.layer_bytes,
            length=layers * self.layer_bytes,
            generation=self._pool.generation(block),
            checksum=int(self._checksums[block, index]),
        )

    # And these without.

    def _checksum(self, block: int, index: int) -> int:
        first, layers = self.grid.span(index)
        size = self.layer_bytes
        return checksum(self.memory[block, first * size : (first + layers) * size])

    def _changed(self) -> None:
        _call(self._listeners)


def checksum(data: NDArray[np.uint8]) -> int:
    """XXH3-64 of contiguous bytes."""
    return xxhash.xxh3_64_intdigest(data.data)


def _disarm(watches: Iterable[Watch]) -> list[Callable[[], None]]:
    wakes = []
    for watch in watches:
        if watch.armed:
            watch.armed = False
            wakes.append(watch.wake)
    return wakes


def _call(callbacks: Iterable[Callable[[], None]]) -> None:
    for callback in callbacks:
        callback()
