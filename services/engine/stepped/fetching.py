"""Fetches of a stepped engine: on the event loop, while the step thread computes others.

A fetch fills blocks of a sequence from this worker's tiers first, then from another worker. What
came of it is a FetchStopped in the inbox, whatever happened: nothing writes into its blocks then.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
from collections.abc import Callable
from dataclasses import replace

from kvtransfer.bandwidth import Bandwidth
from kvtransfer.endpoint import KvEndpoint
from kvtransfer.errors import (
    CorruptBlockError,
    KvError,
    KvSourceLostError,
    RegionDeniedError,
    WrongTenantError,
)
from kvtransfer.store import KvStore
from services.engine.api import EngineFault, KvSource
from services.engine.stepped.inbox import FetchStopped
from services.engine.stepped.prefix import tier_timeout
from services.engine.stepped.scheduler import Fetch
from services.engine.stepped.sequence import Sequence
from services.runtime.settings import KvSettings

log = logging.getLogger(__name__)

_COMPUTED_INSTEAD = (KvSourceLostError, RegionDeniedError, WrongTenantError)
"""Ways in which a prompt's KV may fail to come that say nothing against computing it."""


class Fetching:
    """Of one engine. Belongs to the event loop.

    `rate`: prompt tokens computed in a second. `proceeded`: since when a request waits for its KV
    alone. `put`: takes what is for the step thread.
    """

    def __init__(
        self,
        kv: KvEndpoint,
        store: KvStore,
        settings: KvSettings,
        bandwidth: Bandwidth,
        clock: Callable[[], float],
        *,
        rate: Callable[[], float],
        proceeded: Callable[[str], float | None],
        put: Callable[[FetchStopped], None],
    ) -> None:
        self._kv = kv
        self._store = store
        self._settings = settings
        self._bandwidth = bandwidth
        self._clock = clock
        self._rate = rate
        self._proceeded = proceeded
        self._put = put
        self._running: dict[int, asyncio.Task[FetchStopped]] = {}

    def begin(self, fetch: Fetch) -> None:
        """Returns at once; one without keys only releases its source's lease."""
        if fetch.source is not None and not fetch.keys:  # all of it is cached here
            self._kv.release(fetch.source.address, fetch.source.lease_id)
            return
        task = asyncio.get_running_loop().create_task(self._fetch(fetch))
        self._running[fetch.sequence.serial] = task
        task.add_done_callback(functools.partial(self._fetch_over, fetch))

    def stop(self, serial: int) -> None:
        """Ends a sequence's fetch, if there is one."""
        if serial in self._running:
            self._running[serial].cancel()

    async def close(self) -> None:
        """Ends what is left, as after the step thread has died."""
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    async def _fetch(self, fetch: Fetch) -> FetchStopped:
        """Brings back what the tiers have of it from the start, and fetches the rest.

        Raises the KvErrors that computing does not make up for.
        """
        source, restored = fetch.source, await self._restore(fetch)
        rest = replace(fetch, keys=fetch.keys[restored:], blocks=fetch.blocks[restored:])
        if source is not None and rest.keys:
            stopped = await self._fetch_from(rest, source)
            return replace(stopped, arrived=restored + stopped.arrived, restored=restored)
        if source is not None and not fetch.held_only:
            self._kv.release(source.address, source.lease_id)
        serial = fetch.sequence.serial
        return FetchStopped(serial, arrived=restored, restored=restored, ended=self._clock())

    async def _restore(self, fetch: Fetch) -> int:
        """Fills the first blocks from the tiers; how many. Takes no longer than computing would."""
        here = self._store.in_tiers(fetch.keys)
        if not here or self._store.tiers is None:
            return 0
        rate = self._rate()
        seconds = tier_timeout(here * self._store.layout.block_tokens, rate)
        seconds = min(seconds, self._left(fetch.sequence))
        restored = await self._store.tiers.fill(
            fetch.keys[:here], fetch.blocks[:here], seconds=seconds
        )
        if restored < here:
            log.info(
                "the tiers gave %d of %d blocks, with %.3f s to do so", restored, here, seconds
            )
        return restored

    async def _fetch_from(self, fetch: Fetch, source: KvSource) -> FetchStopped:
        """Moves the blocks; says what came of it. Raises as _fetch does."""
        serial = fetch.sequence.serial
        request, began = fetch.sequence.request, self._clock()
        timeout = self._settings.fetch_timeout_seconds
        if fetch.timeout is not None:
            timeout = fetch.timeout
        try:
            report = await self._kv.fetch(
                source.address,
                source.lease_id,
                fetch.keys,
                fetch.blocks,
                partial_last=fetch.partial_last,
                # The source waits no longer either: it is the call's deadline.
                timeout=min(timeout, self._left(fetch.sequence)),
                held_only=fetch.held_only,
                tenant=request.tenant,
                needed=lambda: began if fetch.held_only else self._proceeded(request.request_id),
            )
        except KvError as error:
            if not (fetch.held_only or isinstance(error, _COMPUTED_INSTEAD)):
                raise
            log.warning("no KV for %s: %s", source.lease_id, error.message)
            complete = getattr(error, "complete", ())
            stopped = FetchStopped(
                serial,
                _leading(complete),
                blocks=sum(complete),
                seconds=self._clock() - began,
                lost=error.reason,
                why=error.message,
                ended=self._clock(),
            )
        else:
            if report.corrupt_blocks:
                log.warning("%s: %d corrupt KV blocks", source.lease_id, report.corrupt_blocks)
            stopped = FetchStopped(
                serial,
                _leading(report.complete),
                transport=report.transport,
                bytes=report.bytes,
                blocks=report.blocks,
                seconds=report.seconds,
                corrupt_blocks=report.corrupt_blocks,
                choice=report.why,
                lost=CorruptBlockError.reason if report.corrupt_blocks else "",
                why=f"{report.corrupt_blocks} blocks were corrupt",
                ended=report.ended,
            )
        # Almost: of two clocks that bound it one may be early.
        in_vain = fetch.timeout is not None and stopped.seconds > 0.9 * fetch.timeout
        if fetch.held_only and (stopped.blocks or in_vain):
            # Nothing was waited for but the bytes: this is what the way there gives. Where not one
            # block came in time, one takes longer than that; by how much is not known.
            size = max(1, stopped.blocks) * self._store.block_bytes
            seconds = stopped.seconds if stopped.blocks else 2 * stopped.seconds
            self._bandwidth.observe(source.address, size, seconds, stopped.ended)
        return stopped

    def _left(self, sequence: Sequence) -> float:
        """Seconds until a sequence's deadline."""
        return max(0.0, sequence.deadline - self._clock())

    def _fetch_over(self, fetch: Fetch, task: asyncio.Task[FetchStopped]) -> None:
        """Also called for a task that was cancelled before it began."""
        serial = fetch.sequence.serial
        del self._running[serial]
        if task.cancelled():
            stopped = FetchStopped(serial, why="stopped")
            if fetch.source is not None and not fetch.held_only:  # It may not have begun.
                self._kv.release(fetch.source.address, fetch.source.lease_id)
        elif (error := task.exception()) is None:
            stopped = task.result()
        elif isinstance(error, KvError):
            fault = EngineFault(error.reason, error.message, error.metadata)
            stopped = FetchStopped(serial, fault=fault, ended=self._clock())
        else:
            log.error("a fetch failed", exc_info=error)
            if fetch.source is not None and not fetch.held_only:  # It may have failed before.
                self._kv.release(fetch.source.address, fetch.source.lease_id)
            fault = EngineFault("ENGINE_FAILED", f"a fetch failed: {type(error).__name__}")
            stopped = FetchStopped(serial, fault=fault, ended=self._clock())
        self._put(stopped)


def _leading(complete: tuple[bool, ...]) -> int:
    return sum(itertools.takewhile(bool, complete))
