"""Work on bytes, kept off the event loop where it is long enough to be felt there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

INLINE_BYTES = 256 * 1024
"""Copying or hashing this much takes tens of microseconds, which is what a thread would cost."""


class Offload:
    """A few threads for copies and checksums, which run without the interpreter's lock."""

    def __init__(self, threads: int = 2) -> None:
        self._executor = ThreadPoolExecutor(threads, "tandem-kv")

    async def run(self, work: Callable[[Callable[[], bool]], T], nbytes: int) -> T:
        """Runs `work`, which handles `nbytes`, and returns what it returns.

        When this is cancelled `work` has come to its end, or never began: it does not go on
        unseen. It should ask the function it is given every few MiB whether it may stop early.
        """
        if nbytes <= INLINE_BYTES:
            return work(_go_on)
        stopping = False
        job = self._executor.submit(work, lambda: stopping)
        try:
            return await asyncio.wrap_future(job)
        except asyncio.CancelledError:
            stopping = True
            await outlast(asyncio.wrap_future(job))
            raise

    def close(self) -> None:
        """Waits for what runs."""
        self._executor.shutdown(wait=True, cancel_futures=True)


def _go_on() -> bool:
    return False


async def outlast(job: asyncio.Future[T]) -> None:
    """Waits for a job to end, through any further cancellation."""
    while not job.done():
        try:
            await asyncio.wait([job])
        except asyncio.CancelledError:
            continue
    if not job.cancelled():
        job.exception()  # Seen here, or asyncio would report it as never retrieved.
