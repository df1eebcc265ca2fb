"""What prompts of a length take, from the placement to the first token: usually, and at best.

A worker's rate says little of either: after an hour of short prompts it is low, since each step has
its fixed cost, and a long prompt will do much better. Figures by length need no model.
"""

from __future__ import annotations

PER_DOUBLING = 4
SIZES = 24 * PER_DOUBLING
"""Steps of length: to 16M tokens."""
ENOUGH = 8
WINDOW_SECONDS = 600.0


USUAL_MEMORY = 0.05


class Usual:
    """What prompts take that have so many tokens to compute, a moving average of seconds."""

    __slots__ = ("_seconds",)

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def add(self, tokens: int, seconds: float) -> float:
        """A prompt took so long: times what was usual for its length; 0 for the first one."""
        step = _step(tokens)
        usual = self._seconds.get(step, 0.0)
        self._seconds[step] = usual + USUAL_MEMORY * (seconds - usual) if usual else seconds
        return seconds / usual if usual else 0.0


class Fastest:
    """Seconds that no prompt with so many tokens to compute, or fewer, has beaten; or other work.

    A prompt takes no less than a shorter one. So what the fastest of at least ENOUGH shorter ones
    took, in the last WINDOW_SECONDS or two, is the least that it will take.
    """

    __slots__ = ("_before", "_bounds", "_now", "_since")

    def __init__(self, now: float) -> None:
        self._since = now
        self._now: dict[int, list[float]] = {}
        """By step of length: how many were seen, and the least seconds."""
        self._before: dict[int, list[float]] = {}
        """The window before."""
        self._bounds: list[float] | None = None

    def add(self, tokens: int, seconds: float, now: float) -> None:
        """A prompt of so many computed tokens (at least 1) had its first token after so long."""
        if now - self._since >= WINDOW_SECONDS:
            fresh = now - self._since < 2 * WINDOW_SECONDS
            self._before, self._now = (self._now if fresh else {}), {}
            self._since, self._bounds = now, None
        seen = self._now.setdefault(_step(tokens), [0, seconds])
        seen[0] += 1
        if seconds < seen[1] or seen[0] <= ENOUGH:
            seen[1] = min(seen[1], seconds)
            self._bounds = None

    def least(self, tokens: int) -> float:
        """Seconds that so many tokens were never seen to take less than; 0: not known."""
        if self._bounds is None:
            self._bounds = self._rebuilt()
        return self._bounds[_step(tokens)]

    def _rebuilt(self) -> list[float]:
        bounds, bound = [], 0.0
        for step in range(SIZES):
            bounds.append(bound)
            windows = [w[step] for w in (self._now, self._before) if step in w]
            if sum(count for count, _ in windows) >= ENOUGH:
                # It bounds longer ones: those of the same step may be shorter than any seen. And a
                # longer one that was faster after all shows that the bound was not one.
                bound = max(bound, min(seconds for _, seconds in windows))
        fastest = float("inf")
        for step in reversed(range(SIZES)):
            for window in (self._now, self._before):
                if step in window:
                    fastest = min(fastest, window[step][1])
            bounds[step] = min(bounds[step], fastest)
        return bounds


def _step(tokens: int) -> int:
    """The logarithm, rounded down; exact enough as long as it never falls."""
    doublings = tokens.bit_length() - 1
    rest = (tokens * PER_DOUBLING >> doublings) - PER_DOUBLING
    return min(SIZES - 1, doublings * PER_DOUBLING + rest)
