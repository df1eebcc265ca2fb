"""How fast weights are given. Pure."""

from __future__ import annotations

BURST_SECONDS = 0.05
"""What was not used is kept this long, so that a late wake-up costs nothing."""


class Pace:
    """Lets bytes through at a rate that may change at any time."""

    def __init__(self) -> None:
        self._free_at = 0.0

    def wait(self, nbytes: int, rate: float, now: float) -> float:
        """Takes `nbytes` on; how many seconds they have to wait first.

        rate: bytes a second, now; 0: without limit. What was taken on at another rate stands.
        """
        if rate <= 0:
            self._free_at = now
            return 0.0
        start = max(self._free_at, now - BURST_SECONDS)
        self._free_at = start + nbytes / rate
        return max(0.0, start - now)
