"""Threads for what llguidance does. It lets go of the interpreter lock while it does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

STACK_BYTES = 2**29
"""The library follows references by recursion, and a stack that is too small ends the process: this
is enough for any that MAX_TEXT_BYTES hold. Memory is taken as it is used."""

MASK_THREADS = 4
EACH = 4
"""Sequences for which a mask thread is worth waking: their masks take some 100 us."""

T = TypeVar("T")

_starting = threading.Lock()


def deep_threads(name: str, count: int = 1) -> ThreadPoolExecutor:
    """So many threads with stacks of STACK_BYTES, which have all begun."""
    executor = ThreadPoolExecutor(count, name)
    here = threading.Barrier(count)
    with _starting:
        before = threading.stack_size(STACK_BYTES)
        try:
            for begun in [executor.submit(here.wait) for _ in range(count)]:
                begun.result()
        finally:
            threading.stack_size(before)
    return executor


class Computing(Generic[T]):
    """What is being computed, by what it was asked as."""

    def __init__(self, shares: list[Future[dict[int, T]]]) -> None:
        self._shares = shares

    def result(self) -> dict[int, T]:
        """Waits for all of it, also if some fails; then raises the first error there was."""
        found: dict[int, T] = {}
        errors = [error for share in self._shares if (error := share.exception()) is not None]
        if errors:
            raise errors[0]
        for share in self._shares:
            found |= share.result()
        return found


class MaskThreads:
    """Computes masks of several sequences at a time, beside what the caller does.

    The threads begin with the first that is asked for: most engines never see a guide.
    """

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None

    def begin(self, asked: Mapping[int, Callable[[], T]]) -> Computing[T]:
        """For each serial what its function gives, which no other thread may call meanwhile."""
        if asked and self._executor is None:
            self._executor = deep_threads("guide-masks", MASK_THREADS)
        jobs = list(asked.items())
        parts = min(MASK_THREADS, -(-len(jobs) // EACH))
        return Computing([self._deep(jobs[part::parts]) for part in range(parts)])

    def _deep(self, jobs: list[tuple[int, Callable[[], T]]]) -> Future[dict[int, T]]:
        assert self._executor is not None
        return self._executor.submit(lambda: {serial: job() for serial, job in jobs})
