"""Whether this process itself has run: time that it did not is nobody's silence."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

TICK_SECONDS = 0.1
LATE_SECONDS = 0.25
"""A tick as late as this was not kept from running by a moment's work."""


class Awake:
    """Ticks on the event loop. `clock`: seconds, monotonic."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.since = -math.inf
        """Since when it runs without a break."""
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begins to tick."""
        self._wait()

    def stop(self) -> None:
        """Ends it."""
        if self._timer is not None:
            self._timer.cancel()

    def due(self, at: float) -> None:
        """Something that was to run at `at` runs now."""
        now = self._clock()
        if now - at >= LATE_SECONDS:
            self.since = now

    def _wait(self) -> None:
        at = self._clock() + TICK_SECONDS
        self._timer = asyncio.get_running_loop().call_later(TICK_SECONDS, self._tick, at)

    def _tick(self, at: float) -> None:
        self.due(at)
        self._wait()
