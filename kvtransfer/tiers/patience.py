"""Work that may never end, on threads that may be left behind."""

from __future__ import annotations

import errno
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class _Job:
    """Its fields are guarded by the condition of the Patience it belongs to."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.work = work
        self.begun = self.done = False
        self.result: object = None
        self.error: BaseException | None = None


class Patience:
    """Runs work on one of a few threads, and waits for it `seconds` at most. Thread-safe.

    A system call on a disk that has stopped answering can't be interrupted. Its thread is left
    behind, and does not keep the process from ending. The seconds count from when a thread takes
    the work: waiting for a thread says nothing of the disk. Once some work is left behind what no
    thread has taken fails at once, and is never begun.
    """

    def __init__(self, name: str, threads: int, seconds: float) -> None:
        self.lost = False
        """Whether some work was left behind: what it uses must stay as it is."""
        self._seconds = seconds
        self._changed = threading.Condition()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=name, daemon=True) for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises. Raises OSError (ETIMEDOUT) if it takes too long."""
        job = _Job(work)
        self._jobs.put(job)
        with self._changed:
            self._changed.wait_for(lambda: job.begun or self.lost)
            if not (job.begun and self._changed.wait_for(lambda: job.done, self._seconds)):
                self.lost = True
                self._changed.notify_all()
                raise OSError(errno.ETIMEDOUT, f"no answer in {self._seconds:g} s")
        if job.error is not None:
            raise job.error
        return job.result  # type: ignore[return-value]  # it is what `work` returned

    def close(self) -> None:
        """Ends the threads that work is not lost on."""
        for _ in self._threads:
            self._jobs.put(None)
        if not self.lost:
            for thread in self._threads:
                thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._begin(job):
                self._do(job)

    def _begin(self, job: _Job) -> bool:
        with self._changed:
            job.begun = not self.lost
            self._changed.notify_all()
            return job.begun

    def _do(self, job: _Job) -> None:
        try:
            job.result = job.work()
        except BaseException as error:
            job.error = error
        with self._changed:
            job.done = True
            self._changed.notify_all()
