"""The thread that reads with NIXL, for the event loop.

NIXL tells nobody when a read is over, and copies on the thread that asks. So one thread has the
agent to itself: it begins reads, asks after them at short intervals while there are any, and
otherwise sleeps until it is given something to do.

NIXL can't abort a read either. Releasing one that is under way, or forgetting its source, lets it
go on: a source that was frozen and comes back is still answered, into memory that has another
owner by then. What does end it is the end of the agent. So a read that is not wanted any more gets
a moment to end by itself, as nearly all do, and if it doesn't the agent is replaced. Reads from
other sources that are under way are begun again on the new one, which is harmless and unseen.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvtransfer.offload import outlast
from kvtransfer.transports.descriptors import Descriptors
from kvtransfer.transports.nixl_agent import (
    NixlAgent,
    NixlError,
    NixlLostError,
    NixlUnsureError,
)

log = logging.getLogger(__name__)

SHORTEST_PAUSE = 20e-6
LONGEST_PAUSE = 200e-6
"""Between two looks at what is under way, seconds: the first, and what it grows to."""
BUSY_SECONDS = 30e-6
"""A look that took longer found something to copy: there is more to come, and soon."""
SETTLING_SECONDS = 0.2
SETTLING_PAUSE = 2e-3
"""A connection that was given up is looked after so long, so often, to be closed in good order."""
FORGOTTEN_SOURCES = 64
"""UCX keeps a descriptor of each at both ends while the agent lives: then it gets a new one."""


@dataclass(slots=True, eq=False)
class _Job:
    """One read. The thread has it from submission until `over` is done."""

    source: bytes
    work: Sequence[Descriptors]
    over: asyncio.Future[None]
    unwanted: bool = False
    """Set by the event loop: its deadline passed, or its task was cancelled."""
    handles: list[int] = field(default_factory=list)
    """Of the parts that are under way."""
    failure: NixlError | None = None
    give_up_at: float | None = None


@dataclass(frozen=True, slots=True)
class _Forget:
    source: bytes


class _Stop:
    """Ends the thread."""


class _Wake:
    """Makes it look at once."""


_Todo = _Job | _Forget | _Stop | _Wake


class NixlReads:
    """Reads by an agent that `make` makes, with its memory registered. For one event loop.

    A source is named by the metadata of its agent. `grace` is how many seconds a read that is not
    wanted any more may take to end before the agent is replaced.
    """

    def __init__(self, make: Callable[[], NixlAgent], grace: float) -> None:
        self.replaced = 0
        """Agents that had to be replaced."""
        self._make = make
        self._grace = grace
        self._todo: queue.SimpleQueue[_Todo] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = False
        # The thread's own:
        self._agent: NixlAgent | None = None
        self._names: dict[bytes, str] = {}
        self._lost: set[bytes] = set()
        self._jobs: list[_Job] = []
        self._unsure = False
        self._forgotten = 0
        self._settled_at = 0.0

    async def start(self) -> None:
        """Makes the agent. Raises NixlError."""
        self._loop = asyncio.get_running_loop()
        started: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(
            target=self._run, args=(started,), name="tandem-kv-nixl", daemon=True
        )
        self._thread.start()
        await started

    async def close(self) -> None:
        """Ends the thread; nothing is read any more. Idempotent."""
        if self._thread is not None:
            self._todo.put(_Stop())
            await asyncio.to_thread(self._thread.join)

    async def read(self, source: bytes, work: Sequence[Descriptors], timeout: float) -> None:
        """Reads; raises NixlError. However it ends, nothing is written to afterwards."""
        job = _Job(source, work, asyncio.get_running_loop().create_future())
        self._todo.put(job)
        if self._ended:
            job.over.cancel()
            raise NixlError("it is closed")
        try:
            done, _ = await asyncio.wait([job.over], timeout=timeout)
        except asyncio.CancelledError:
            await self._give_up(job)
            raise
        if not done:
            await self._give_up(job)
        job.over.result()

    def forget(self, source: bytes) -> None:
        """Closes the connection to a source that nothing is being read from."""
        self._todo.put(_Forget(source))

    async def _give_up(self, job: _Job) -> None:
        job.unwanted = True
        self._todo.put(_Wake())
        await outlast(job.over)

    # From here on everything is the thread's.

    def _run(self, started: asyncio.Future[None]) -> None:
        try:
            self._agent = self._make()
            self._tell(started, None)
            self._work()
        except NixlError as error:
            self._tell(started, error)
        except Exception as error:
            log.exception("the thread that reads with NIXL failed")
            # Who waits for the start must hear of it whatever was wrong: a changed package, say.
            self._tell(started, NixlError(f"{type(error).__name__}: {error}"))
        self._end()

    def _work(self) -> None:
        pause = SHORTEST_PAUSE
        while True:
            todo = self._next(pause)
            if isinstance(todo, _Stop):
                return
            if isinstance(todo, _Job):
                self._jobs.append(todo)
                self._begin(todo)
            elif isinstance(todo, _Forget):
                self._forget(todo.source)
            began = time.perf_counter()
            moved = self._look() or todo or time.perf_counter() - began > BUSY_SECONDS
            pause = SHORTEST_PAUSE if moved else min(1.5 * pause, LONGEST_PAUSE)
            if self._forgotten >= FORGOTTEN_SOURCES and not self._jobs:
                self._drop_agent()

    def _next(self, pause: float) -> _Todo | None:
        """What is to be done; None after a pause if there is nothing new.

        The queue is never waited at with a timeout, since in CPython 3.11 one that is short may
        wait forever.
        """
        settling = time.monotonic() < self._settled_at
        if not self._jobs and not settling:
            return self._todo.get()
        with contextlib.suppress(queue.Empty):
            return self._todo.get_nowait()
        if not self._jobs and self._agent is not None:
            self._agent.progress()
        time.sleep(pause if self._jobs else SETTLING_PAUSE)
        return None

    def _begin(self, job: _Job) -> None:
        try:
            if self._agent is None:
                self._agent = self._make()
            name = self._name(self._agent, job.source)
            for work in job.work:
                job.handles.append(self._agent.read(name, work))
        except NixlError as error:
            self._failed(job, error)

    def _name(self, agent: NixlAgent, source: bytes) -> str:
        """Of a source's agent, which is made known if it isn't."""
        if source in self._lost:
            raise NixlLostError("the connection broke")
        name = self._names.get(source)
        if name is None:
            name = self._names[source] = agent.load(source)
        return name

    def _look(self) -> bool:
        """Moves on what is under way and tells of what is over; whether anything was."""
        if not self._jobs:
            return False
        for job in self._jobs:
            job.handles = [handle for handle in job.handles if not self._is_over(job, handle)]
        if self._unsure or any(self._is_stuck(job) for job in self._jobs):
            self._replace()
        over = [job for job in self._jobs if not job.handles]
        self._jobs = [job for job in self._jobs if job.handles]
        for job in over:
            if job.source in self._lost:
                self._forget(job.source)
            self._tell(job.over, job.failure)
        return bool(over)

    def _is_over(self, job: _Job, handle: int) -> bool:
        assert self._agent is not None, "what is under way belongs to an agent"
        try:
            if not self._agent.ended(handle):
                return False
        except NixlError as error:
            self._failed(job, error)
        with contextlib.suppress(NixlError):
            self._agent.release(handle)
        return True

    def _is_stuck(self, job: _Job) -> bool:
        """Whether a read that nobody wants, or that failed in part, has had its time to end."""
        if not job.handles or not (job.unwanted or job.failure):
            return False
        now = time.monotonic()
        if job.give_up_at is None:
            job.give_up_at = now + self._grace
        return now >= job.give_up_at

    def _failed(self, job: _Job, error: NixlError) -> None:
        job.failure = job.failure or error
        self._unsure |= isinstance(error, NixlUnsureError)
        if isinstance(error, NixlLostError) and job.source in self._names:
            self._lost.add(job.source)

    def _forget(self, source: bytes) -> None:
        if any(job.source == source for job in self._jobs):
            return
        self._lost.discard(source)
        name = self._names.pop(source, None)
        if name is not None and self._agent is not None:
            with contextlib.suppress(NixlError):
                self._agent.forget(name)
            self._forgotten += 1
            self._settled_at = time.monotonic() + SETTLING_SECONDS

    def _replace(self) -> None:
        """Ends everything that is under way, and begins again what is wanted."""
        self.replaced += 1
        self._drop_agent()
        again = [job for job in self._jobs if not (job.unwanted or job.failure)]
        log.warning(
            "a read by NIXL did not end: its agent is replaced, %d other reads begin again",
            len(again),
        )
        for job in self._jobs:
            job.handles.clear()
            if job in again:
                self._begin(job)
            elif job.failure is None:
                job.failure = NixlError("the source did not answer in time")

    def _drop_agent(self) -> None:
        agent, self._agent = self._agent, None
        self._names.clear()
        self._lost.clear()
        self._unsure = False
        self._forgotten = 0
        if agent is None:
            return
        for job in self._jobs:
            for handle in job.handles:
                with contextlib.suppress(NixlError):
                    agent.release(handle)
        agent.close()

    def _end(self) -> None:
        self._ended = True
        self._drop_agent()
        with contextlib.suppress(queue.Empty):
            while True:
                todo = self._todo.get_nowait()
                if isinstance(todo, _Job):
                    self._jobs.append(todo)
        for job in self._jobs:
            self._tell(job.over, NixlError("it is closed"))

    def _tell(self, over: asyncio.Future[None], error: NixlError | None) -> None:
        assert self._loop is not None
        # A loop that is gone has nobody to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(_settle, over, error)


def _settle(over: asyncio.Future[None], error: NixlError | None) -> None:
    if over.done():
        return
    if error is None:
        over.set_result(None)
    else:
        over.set_exception(error)
