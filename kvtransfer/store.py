"""What a worker has of KV: its blocks, the leases on them, and what fetches may read of them.

Callers are the engine's thread, which writes blocks, and the event loop, which serves fetches.
blocks.py has the blocks themselves; the lock is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import takewhile

from kvtransfer.blocks import BlockStore, call_all
from kvtransfer.errors import BlocksNotHeldError, WrongTenantError
from kvtransfer.layout import KvLayout
from kvtransfer.leases import LeaseState, LeaseTable
from kvtransfer.pieces import Piece
from kvtransfer.scratch import SCRATCH_BYTES
from kvtransfer.tiers.base import TierStats
from kvtransfer.watches import Watch, WatchTable, lost


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


class KvStore(BlockStore):
    """`blocks` blocks of one layout, with leases and fetches. Thread-safe; see BlockStore.

    Leased blocks keep their content until the lease ends.
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
        super().__init__(
            layout,
            blocks,
            layers_per_piece=layers_per_piece,
            scratch_bytes=scratch_bytes,
            nonce=nonce,
        )
        self._clock = clock
        self._leases = LeaseTable()
        self._watches = WatchTable()
        self._expired = 0

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
        call_all(wakes)

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
        call_all(wakes)

    def release_lease(self, lease_id: str, why: str = "released") -> bool:
        """Ends a lease, whoever asks and however often; was it live? `why` completes "it was"."""
        with self._lock:
            blocks, wakes = self._end(lease_id, why)
        call_all(wakes)
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
        call_all(wakes)
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

    # Proofs

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

    # All below are called with the lock held.

    def _piece_ready(self, block: int, index: int) -> list[Callable[[], None]]:
        more = self._ready[block] != self.grid.all
        return _disarm(self._watches.piece(block, partial(self._piece, block, index), more=more))

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
            # The prefix's first blocks first: without them the rest is of no use.
            for key in [key for key in lease.blocks if key in watch.unbound]:
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


def _disarm(watches: Iterable[Watch]) -> list[Callable[[], None]]:
    wakes = []
    for watch in watches:
        if watch.armed:
            watch.armed = False
            wakes.append(watch.wake)
    return wakes
