"""The median of many figures of which one at a time changes."""

from __future__ import annotations

import math

PER_DOUBLING = 8
"""Steps to a factor of two: a figure is known to 9 %."""
LEAST, MOST = -40, 40
"""Powers of two between which figures are told apart."""


class Median:
    """Of positive figures, coarse: the lower one of an even number. O(1) amortized, 5 kB.

    A histogram with logarithmic steps, and a finger on the step that the median is in.
    """

    __slots__ = ("_at", "_below", "_counts", "_total")

    def __init__(self) -> None:
        self._counts = [0] * ((MOST - LEAST) * PER_DOUBLING + 1)
        self._total = 0
        self._at = 0
        self._below = 0

    def __len__(self) -> int:
        return self._total

    def replace(self, old: float, new: float) -> None:
        """One figure changes; 0 is none: before it is known, or when it is withdrawn."""
        for figure, by in ((old, -1), (new, 1)):
            if figure > 0:
                step = _step(figure)
                self._counts[step] += by
                self._total += by
                if step < self._at:
                    self._below += by

    def value(self) -> float:
        """The median; 0 if there are no figures."""
        if not self._total:
            return 0.0
        middle = (self._total - 1) // 2
        while self._below > middle:
            self._at -= 1
            self._below -= self._counts[self._at]
        while self._below + self._counts[self._at] <= middle:
            self._below += self._counts[self._at]
            self._at += 1
        return float(2.0 ** (self._at / PER_DOUBLING + LEAST))


def _step(figure: float) -> int:
    step = round((math.log2(figure) - LEAST) * PER_DOUBLING)
    return min(max(step, 0), (MOST - LEAST) * PER_DOUBLING)
