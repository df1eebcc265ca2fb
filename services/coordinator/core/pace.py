"""The fastest that those who wait were seen to move on: what a place in the queue costs at least.

A mean rate is no bound: room comes in bursts, as a batch ends or a report arrives, and who waits
may give up. So it is seen how little time 1, 2, 4, ... departures in a row took, whatever their
cause; q x n of them take at least q times as long as the fastest n did.
"""

from __future__ import annotations

from collections import deque

LEVELS = 13
"""Departures in a row are looked at up to 2^12."""
ENOUGH = 8
"""Times that n departures must have been seen one after the other."""
WINDOW_SECONDS = 600.0


class Pace:
    """Of one lane. `now` is that of its first departure or before."""

    __slots__ = ("_before", "_least", "_seen", "_seen_before", "_since", "_times")

    def __init__(self, now: float) -> None:
        self._times: deque[float] = deque(maxlen=(1 << LEVELS - 1) + 1)
        self._since = now
        self._least = [float("inf")] * LEVELS
        """Seconds that 2^i departures took, by i."""
        self._before = list(self._least)
        """In the window before."""
        self._seen = 0
        """Departures in this window."""
        self._seen_before = 0

    def count(self, now: float) -> None:
        """One that waited departed, and others wait or waited until then."""
        if now - self._since >= WINDOW_SECONDS:
            fresh = now - self._since < 2 * WINDOW_SECONDS
            self._before = self._least if fresh else [float("inf")] * LEVELS
            self._seen_before = self._seen if fresh else 0
            self._least, self._seen, self._since = [float("inf")] * LEVELS, 0, now
        times, least = self._times, self._least
        self._seen += 1
        for level in range(min(LEVELS, len(times).bit_length())):
            took = now - times[-(1 << level)]
            if took < least[level]:
                least[level] = took
        times.append(now)

    def least_seconds(self, ahead: int) -> float:
        """How long so many departures take at least, as far as was seen; 0: not known."""
        bound = 0.0
        for level in range(min(LEVELS, max(0, ahead).bit_length())):
            if self._seen + self._seen_before < ENOUGH << level:
                break
            least = min(self._least[level], self._before[level])
            if least < float("inf"):
                bound = max(bound, (ahead >> level) * least)
        return bound
