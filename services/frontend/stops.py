"""Stop strings, found exactly where they end, however the text is cut into pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets text through up to the first stop string, holding back what may begin one.

    The first one is the one that ends first; of several that end together, the one that begins
    first. Each is followed by a Knuth-Morris-Pratt automaton, so a character costs the same
    wherever the text is cut.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._borders = tuple(_borders(stop) for stop in self._stops)
        self._matched = [0] * len(self._stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Text that is final now: it is part of no stop string. Nothing more once `found`."""
        if self.found:
            return ""
        held = self._held + text
        for at, character in enumerate(text, start=len(self._held) + 1):
            longest = self._step(character)
            if longest:
                self.found = True
                self._held = ""
                return held[: at - longest]
        keep = max(self._matched, default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _step(self, character: str) -> int:
        """Length of the longest stop string that this character completes, or 0."""
        longest = 0
        for i, stop in enumerate(self._stops):
            count, borders = self._matched[i], self._borders[i]
            while count and stop[count] != character:
                count = borders[count - 1]
            if stop[count] == character:
                count += 1
            self._matched[i] = count
            if count == len(stop):
                longest = max(longest, count)
        return longest


def _borders(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper prefix that is its suffix."""
    borders = [0] * len(stop)
    count = 0
    for i in range(1, len(stop)):
        while count and stop[i] != stop[count]:
            count = borders[count - 1]
        if stop[i] == stop[count]:
            count += 1
        borders[i] = count
    return borders
