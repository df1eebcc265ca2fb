"""What is done to workers during a soak: one of them at a time, at random, and all come back."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import random
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

LOOK_SECONDS = 0.2


class Cluster(Protocol):
    """A local cluster that starts processes again when they end."""

    @property
    def pids(self) -> Mapping[str, int]:
        """Of the processes that run."""

    def kill(self, name: str, number: int) -> None:
        """Sends a signal."""


class Harm(enum.StrEnum):
    """What is done to a worker."""

    KILL = "killed"
    """SIGKILL: it is gone from one moment to the next."""
    STOP = "frozen"
    """SIGSTOP, and SIGCONT later: its connections stay open, and nothing comes."""
    DRAIN = "drained"
    """SIGTERM: it ends in good order."""


@dataclass(frozen=True, slots=True)
class Death:
    """Something was done to a worker. Seconds from the start of the load."""

    worker: str
    harm: Harm
    at: float
    back_after: float | None
    """Until all workers were there again; None if they were not in time."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """When and how long. Seconds."""

    mean_pause: float = 10.0
    """Between the return of one worker and the next harm; exponentially distributed."""
    longest_freeze: float = 10.0
    back: float = 90.0
    """A worker that is not back so long after is not coming back."""


class Deaths:
    """Harms workers of `cluster` until told to stop.

    `present` tells the ids of the workers that the coordinator counts on. What dies is started
    again by the cluster itself.
    """

    def __init__(
        self,
        cluster: Cluster,
        present: Callable[[], Awaitable[frozenset[str]]],
        schedule: Schedule,
        *,
        rng: random.Random,
        clock: Callable[[], float],
    ) -> None:
        self.done: list[Death] = []
        self._cluster = cluster
        self._present = present
        self._schedule = schedule
        self._rng = rng
        self._clock = clock

    async def run(self, workers: frozenset[str], stop: asyncio.Event) -> None:
        """Until `stop`; what was begun is finished, so nothing is left frozen."""
        began = self._clock()
        while True:
            pause = self._rng.expovariate(1 / self._schedule.mean_pause)
            if await _told(stop, pause):
                return
            worker = self._rng.choice(sorted(workers))
            harm = self._rng.choice(list(Harm))
            at, known = self._clock(), await self._present()
            await self._harm(worker, harm)
            # One that ended comes back as another one; until it is missed the old one is listed.
            past = frozenset() if harm is Harm.STOP else known
            back = await self._all_back(workers, worker, past)
            self.done.append(Death(worker, harm, at - began, back))

    async def _harm(self, worker: str, harm: Harm) -> None:
        if harm is Harm.STOP:
            self._cluster.kill(worker, signal.SIGSTOP)
            try:
                await asyncio.sleep(self._rng.uniform(0.1, self._schedule.longest_freeze))
            finally:
                self._cluster.kill(worker, signal.SIGCONT)
            return
        pid = self._cluster.pids.get(worker)
        self._cluster.kill(worker, signal.SIGKILL if harm is Harm.KILL else signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._schedule.back):
                while self._cluster.pids.get(worker) == pid:  # noqa: ASYNC110 - no event tells
                    await asyncio.sleep(LOOK_SECONDS)

    async def _all_back(
        self, workers: frozenset[str], harmed: str, past: frozenset[str]
    ) -> float | None:
        since = self._clock()
        while True:
            present = await self._present()
            new = {process_of(id_) for id_ in present - past}
            if harmed in new and workers <= {process_of(id_) for id_ in present}:
                return self._clock() - since
            if self._clock() - since > self._schedule.back:
                return None
            await asyncio.sleep(LOOK_SECONDS)


def process_of(worker_id: str) -> str:
    """A worker's id is the name of its process, a dash and a random suffix."""
    return worker_id.rpartition("-")[0]


async def _told(stop: asyncio.Event, seconds: float) -> bool:
    """Waits so long, or until it is told to stop: True."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stop.wait()
    return stop.is_set()
