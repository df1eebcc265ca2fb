"""A pool's tiers at work: blocks are copied there ahead of need, and come back when asked for.

A thread of its own copies out. It takes no reference on what it copies, so it never keeps memory
from the engine: it copies, and then asks whether the block's generation is still what it was. A
block is written only after its generation has grown, under the store's lock; if it has not grown,
what was copied is what was committed. Checksums are not computed on the way out: they were taken
when the bytes were made, and a block that was wrong then or went wrong since is found out by them
when it is read.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import numpy as np

from kvtransfer.errors import OutOfBlocksError, WrongTenantError
from kvtransfer.offload import INLINE_BYTES, Offload
from kvtransfer.store import KvStore
from kvtransfer.tiers.base import Tier, TierStats
from kvtransfer.tiers.books import SpillBooks
from kvtransfer.tiers.chain import Chain

log = logging.getLogger(__name__)

ANNOUNCED_SHARE = 4
"""Keys announced of those that only tiers have, at most, for each block of the pool.

A terabyte of disk has half a million keys of 2 MiB blocks, more than a coordinator can keep of
every worker. A request that comes here for other reasons finds all of them.
"""

_SHARE_IN_BOTH = 4
_SHARE_FOR_PEERS = 2


class Tiers:
    """The tiers of a store, from the top; made before anything is in its pool.

    Of what the tiers hold at most a quarter is kept ready for the pool to evict, which is the whole
    pool where they hold four times as much. `fill` and `restored` are for one event loop.
    """

    def __init__(
        self,
        store: KvStore,
        tiers: Sequence[Tier],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        places = sum(tier.places for tier in tiers)
        self.restored_blocks = 0
        """Blocks that came back to the pool."""
        self._store = store
        self._clock = clock
        self._staging = np.empty(store.block_bytes, np.uint8)
        self._awake = threading.Event()
        self._closing = False
        self._copying_failed = ""
        self._offload = Offload()
        self._copying = threading.Lock()
        self._counting = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="tandem-kv-spill", daemon=True)
        ahead = max(1, min(store.total_blocks, places // _SHARE_IN_BOTH))
        store.attach(self, SpillBooks(ahead, ANNOUNCED_SHARE * store.total_blocks))
        self._chain = Chain(tiers, store.set_tiers)
        self._stop_listening = store.on_change(self.nudge)

    def start(self) -> None:
        """Begins to copy out."""
        self._thread.start()

    def nudge(self) -> None:
        """There may be something to copy out. Quick; from any thread."""
        if not self._awake.is_set():
            self._awake.set()

    def spill(self) -> bool:
        """Copies out what is due next; False if nothing was, or no tier would take it."""
        with self._copying:
            spill = self._store.next_spill() if self._chain.on else None
            if spill is None:
                return False
            np.copyto(self._staging, self._store.memory[spill.block])
            if self._store.unchanged(spill):
                self._chain.put(spill.label, self._staging)
            return True

    async def fill(
        self, keys: Sequence[bytes], blocks: Sequence[int], *, seconds: float = math.inf
    ) -> int:
        """Fills held blocks, one for each key, from the tiers, and commits them.

        Returns how many, counted from the start, have their content now. Nothing is written into
        the others then, nor after a cancel. No block is begun once it has run for `seconds`, not
        counting the wait for a thread: fills share these as prompts would share the engine.
        """
        work = partial(self._fill, keys, blocks, seconds)
        # Even one block is too much for the event loop if it is on a disk.
        return await self._offload.run(work, INLINE_BYTES + 1)

    @asynccontextmanager
    async def restored(
        self, lease_id: str, keys: Sequence[bytes], tenant: str
    ) -> AsyncIterator[None]:
        """See KvStore.restored().

        Nothing is brought back that would take more than half of the blocks that can be had, and
        never more than all of them: then the pool is as it was.
        """
        found = self._store.hold_for_restore(lease_id, keys, tenant)
        lacking = [key for key, block in found.items() if block is None]
        held = [block for block in found.values() if block is not None]
        try:
            if any(label.tenant != tenant for label in map(self._chain.find, lacking) if label):
                raise WrongTenantError.of(lease_id)
            if lacking and len(lacking) <= self._store.available() // _SHARE_FOR_PEERS:
                try:
                    blocks = self._store.allocate(len(lacking))
                except OutOfBlocksError:  # they were taken since they were counted
                    blocks = []
                held += blocks
                await self.fill(lacking[: len(blocks)], blocks)
            yield
        finally:
            self._store.release(held)

    def stats(self) -> tuple[TierStats, ...]:
        """From the top."""
        found = tuple(tier.stats() for tier in self._chain.tiers)
        return tuple(replace(stats, off=stats.off or self._copying_failed) for stats in found)

    def check_integrity(self) -> None:
        """Proves the tiers' books, and that the store knows of what is in them.

        Raises AssertionError.
        """
        with self._copying:
            levels = self._chain.check_integrity()
            known = self._store.in_tiers(list(levels))
        assert known == len(levels), f"the store knows of {known} of {len(levels)} blocks in tiers"

    def close(self) -> None:
        """Stops copying and ends the tiers; nothing may be filled any more. Idempotent, slow."""
        self._closing = True
        self._stop_listening()
        self._awake.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._offload.close()
        self._chain.close()

    def _run(self) -> None:
        while not self._closing:
            self._awake.clear()
            try:
                while not self._closing and self.spill():
                    pass
            except Exception as error:
                log.exception("copying KV blocks to their tiers failed; nothing is copied any more")
                self._copying_failed = f"nothing is copied to it any more: {type(error).__name__}"
                return
            self._awake.wait()

    def _fill(
        self,
        keys: Sequence[bytes],
        blocks: Sequence[int],
        seconds: float,
        stopping: Callable[[], bool],
    ) -> int:
        store, end = self._store, self._clock() + seconds
        for done, (key, block) in enumerate(zip(keys, blocks, strict=True)):
            if stopping() or self._clock() >= end:
                return done
            label = self._chain.read(key, store.memory[block])
            if label is None:
                return done
            store.begin(block, key, label.tenant)
            checksums = np.frombuffer(label.checksums, "<u8").tolist()
            store.pieces_verified(block, range(store.grid.count), checksums)
            store.commit(block)
            with self._counting:
                self.restored_blocks += 1
        return len(keys)
