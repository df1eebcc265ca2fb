"""How far regions are apart."""

from __future__ import annotations

from collections.abc import Mapping

OTHER_REGION_SECONDS = 0.06
"""Round trip between two regions of which nothing else is known: one continent's width."""


class Regions:
    """Round-trip times between regions, by pairs of labels in either order; seconds."""

    def __init__(self, seconds: Mapping[tuple[str, str], float] | None = None) -> None:
        given = dict(seconds or {})
        self._seconds = given | {(b, a): s for (a, b), s in given.items()}

    def round_trip(self, here: str, there: str) -> float:
        """Seconds; 0 within a region, and where a side has no label."""
        if here == there or not here or not there:
            return 0.0
        return self._seconds.get((here, there), OTHER_REGION_SECONDS)
