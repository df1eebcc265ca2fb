"""How many tokens to draft: as many as bring tokens fastest, by what steps have taken. Pure.

A step with S sequences that each check k drafts computes S * (1 + k) rows and brings E(k) tokens to
each, one and as many as are likely to be right. Rows are nearly free while weights are what a step
waits for, and cost their share once they are not: so k is chosen to maximize E(k) / seconds(k), the
latter as measured. Tokens do not depend on it, only when they come.
"""

from __future__ import annotations

import math
from bisect import bisect_left

_NEWEST = 0.2
"""Weight of the newest time in a moving average."""
_LATEST = 300
"""Drafts that the share of right ones is about taken over."""
_HOPE = 0.7
"""Share of right ones before any was checked."""
_TRY_EVERY = 32
"""Choices after which a neighbour of the best length is tried, since times change."""
_FINENESS = 4
"""Times are kept apart for row counts that differ by a factor of 2 ** (1 / this)."""


class Times:
    """Seconds that a step takes by its rows."""

    def __init__(self) -> None:
        self._points: dict[int, tuple[float, float]] = {}

    def note(self, rows: int, seconds: float) -> None:
        """A step with so many rows has taken so long."""
        place = round(_FINENESS * math.log2(rows))
        old_rows, old_seconds = self._points.get(place, (rows, seconds))
        self._points[place] = (
            old_rows + _NEWEST * (rows - old_rows),
            old_seconds + _NEWEST * (seconds - old_seconds),
        )

    def estimate(self, rows: int) -> float:
        """Never less for more rows. In proportion above the greatest count known; 0 if none is."""
        if not self._points:
            return 0.0
        counts, seconds, longest = [], [], 0.0
        for place in sorted(self._points):
            count, took = self._points[place]
            longest = max(longest, took)
            counts.append(count)
            seconds.append(longest)
        at = bisect_left(counts, rows)
        if at == 0:
            return seconds[0]
        if at == len(counts):
            return seconds[-1] * rows / counts[-1]
        share = (rows - counts[at - 1]) / (counts[at] - counts[at - 1])
        return seconds[at - 1] + share * (seconds[at] - seconds[at - 1])


class Acceptance:
    """How often a draft is right, by how many before it were, all of them right."""

    def __init__(self, most: int) -> None:
        self._checked = [0] * most
        self._share = [_HOPE] * most

    def note(self, drafts: int, right: int) -> None:
        """Of so many drafts so many were right."""
        for depth in range(min(drafts, right + 1)):
            self._checked[depth] += 1
            weight = 1.0 / min(self._checked[depth], _LATEST)
            self._share[depth] += weight * ((depth < right) - self._share[depth])

    def tokens(self, drafts: int) -> float:
        """That a step is expected to bring which checks so many drafts."""
        total = chance = share = 1.0
        for depth in range(drafts):
            share = self._share[depth] if self._checked[depth] or depth == 0 else share
            chance *= share
            total += chance
        return total


class DraftLength:
    """Chooses a length for every step, up to `most`."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.forward = Times()
        """Steps without their drafting."""
        self.acceptance = Acceptance(most)
        self._call_seconds = 0.0
        self._choices = 0

    def drafted(self, calls: int, seconds: float) -> None:
        """So many calls of draft() have taken so long together."""
        each = seconds / calls
        old = self._call_seconds or each
        self._call_seconds = old + _NEWEST * (each - old)

    def choose(self, sequences: int, other_rows: int) -> int:
        """For so many sequences, in steps that have so many rows of prompts beside theirs."""
        if not sequences or not self.most:
            return 0
        self._choices += 1
        best = max(range(self.most + 1), key=lambda k: (self._speed(k, sequences, other_rows), k))
        if self._choices % _TRY_EVERY:
            return best
        up = self._choices // _TRY_EVERY % 2 == 1
        other = best + 1 if up else best - 1
        return other if 0 <= other <= self.most else 2 * best - other

    def _speed(self, drafts: int, sequences: int, other_rows: int) -> float:
        """Tokens of a sequence in a second; only good for comparison."""
        rows = sequences * (1 + drafts) + other_rows
        seconds = self.forward.estimate(rows) + max(1, drafts) * self._call_seconds
        return self.acceptance.tokens(drafts) / max(seconds, 1e-9)
