"""Work that may never end, on threads that may be left behind."""

from __future__ import annotations

import errno
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_Job = Callable[[], None]


class Patience:
    """Runs work on one of a few threads, and waits for it `seconds` at most. Thread-safe.

    A system call on a disk that has stopped answering can't be interrupted. Its thread is left
    behind, and does not keep the process from ending.
    """

    def __init__(self, name: str, threads: int, seconds: float) -> None:
        self.lost = False
        """Whether some work was left behind: what it uses must stay as it is."""
        self._seconds = seconds
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=name, daemon=True) for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises. Raises OSError (ETIMEDOUT) if it takes too long."""
        answers: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

        def job() -> None:
            try:
                answers.put((work(), None))
            except BaseException as error:
                answers.put((None, error))

        self._jobs.put(job)
        try:
            result, error = answers.get(timeout=self._seconds)
        except queue.Empty:
            self.lost = True
            raise OSError(errno.ETIMEDOUT, f"no answer in {self._seconds:g} s") from None
        if error is not None:
            raise error
        return result  # type: ignore[return-value]  # it is what `work` returned

    def close(self) -> None:
        """Ends the threads that work is not lost on."""
        for _ in self._threads:
            self._jobs.put(None)
        if not self.lost:
            for thread in self._threads:
                thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
