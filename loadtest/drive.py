"""Puts a workload on a server: when requests start, when no more do, and when it is over.

A run is bounded three ways: by requests, by seconds in which requests may start, and by seconds
that those under way then get to finish. It always ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

from loadtest.arrivals import think_time
from loadtest.outcome import INTERRUPTED, UNFINISHED, Outcome, Progress
from loadtest.workload import RequestPlan

Ask = Callable[[RequestPlan, Progress], Awaitable[str]]
"""Makes a request, fills Progress, returns the reason code of its end."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """When a run ends."""

    requests: int
    seconds: float
    """No request starts later than this."""
    finish_seconds: float
    """Requests still running this long after that are cut off, and counted as UNFINISHED."""


class Ended(enum.StrEnum):
    """Why a run started no more requests."""

    REQUESTS = "requests"
    SECONDS = "seconds"
    TRACE = "trace"
    """Every recorded request was made."""
    INTERRUPTED = "interrupted"


class Run:
    """One run; make it, await open() or closed() once, read `outcomes`.

    `request(i)` gives the i-th plan. `stop` ends the run early: requests under way are cut off.
    """

    def __init__(
        self,
        request: Callable[[int], RequestPlan],
        ask: Ask,
        bounds: Bounds,
        *,
        clock: Callable[[], float],
        stop: asyncio.Event,
    ) -> None:
        self._request = request
        self._ask = ask
        self._bounds = bounds
        self._clock = clock
        self._stop = stop
        self._cut_reason = UNFINISHED
        self._tasks: set[asyncio.Task[None]] = set()
        self.started = clock()
        self.made = 0
        """Requests sent so far."""
        self.live: dict[int, Progress] = {}
        """Requests under way, by index."""
        self.outcomes: list[Outcome] = []
        """In order of their ends."""

    async def open(self, arrivals: Iterator[float]) -> Ended:
        """Starts requests at these offsets (seconds, increasing), whatever the server does."""
        self.started = self._clock()
        try:
            ended = await self._arrive(arrivals)
            return await self._finish(ended)
        finally:
            await self._cut()

    async def closed(self, users: int, think_seconds: float, seed: int) -> Ended:
        """Keeps `users` requests under way, each user thinking between answer and request."""
        self.started = self._clock()
        indices = iter(range(self._bounds.requests))
        try:
            for user in range(users):
                self._start(self._user(indices, think_time(think_seconds, seed, user)))
            await self._until_done(self.started + self._bounds.seconds)
            all_made = self.made == self._bounds.requests
            return await self._finish(Ended.REQUESTS if all_made else Ended.SECONDS)
        finally:
            await self._cut()

    async def _arrive(self, arrivals: Iterator[float]) -> Ended:
        for index in range(self._bounds.requests):
            at = next(arrivals, None)
            if at is None:
                return Ended.TRACE
            if at > self._bounds.seconds:
                await self._until(self.started + self._bounds.seconds)
                return Ended.SECONDS
            plan = self._request(index)  # before the wait: drawing tokens takes time
            if not await self._until(self.started + at):
                break
            self._start(self._one(plan, self.started + at))
        return Ended.REQUESTS

    async def _user(self, indices: Iterator[int], thoughts: Iterator[float]) -> None:
        end = self.started + self._bounds.seconds
        while self._clock() < end and not self._stop.is_set():
            index = next(indices, None)
            if index is None:
                return
            plan = self._request(index)
            await self._one(plan, self._clock())
            await self._until(min(self._clock() + next(thoughts), end))

    async def _one(self, plan: RequestPlan, intended: float) -> None:
        progress = Progress(plan.index, intended, len(plan.token_ids))
        self.live[plan.index] = progress
        self.made += 1
        try:
            reason = await self._ask(plan, progress)
        except asyncio.CancelledError:
            self._record(progress, self._cut_reason)
            raise
        self._record(progress, reason)

    def _record(self, progress: Progress, reason: str) -> None:
        del self.live[progress.index]
        self.outcomes.append(progress.end(self._clock(), reason))

    async def _finish(self, ended: Ended) -> Ended:
        """Waits for what is under way, as long as the bounds allow."""
        await self._until_done(self.started + self._bounds.seconds + self._bounds.finish_seconds)
        if self._stop.is_set():
            ended, self._cut_reason = Ended.INTERRUPTED, INTERRUPTED
        return ended

    async def _cut(self) -> None:
        """Ends what is left, which is recorded; raises what is no failure of the server's."""
        for task in self._tasks:
            task.cancel()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(asyncio.create_task(work))

    async def _until(self, when: float) -> bool:
        """Waits until a time; False as soon as the run is stopped."""
        delay = when - self._clock()
        if delay <= 0:
            await asyncio.sleep(0)  # late, but the others must run
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._stop.wait()
        return not self._stop.is_set()

    async def _until_done(self, when: float) -> None:
        """Waits until nothing is under way, a time, or the run is stopped."""
        if not self._tasks:
            return
        done = asyncio.ensure_future(asyncio.wait(self._tasks))
        stopped = asyncio.ensure_future(self._stop.wait())
        delay = max(0.0, when - self._clock())
        try:
            await asyncio.wait({done, stopped}, timeout=delay, return_when="FIRST_COMPLETED")
        finally:
            done.cancel()
            stopped.cancel()
