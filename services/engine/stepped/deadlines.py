"""Whether a sequence can still be done in time. Pure; optimistic, so nothing is given up early."""

from __future__ import annotations

from dataclasses import dataclass

from services.engine.api import EngineFault
from services.engine.stepped.rates import Rates
from services.engine.stepped.sequence import Sequence

CLOCKS_DIFFER_BY = 0.005
"""Seconds: a fetch that is given until a deadline may end this much before it."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """By what the engine's steps, of `chunk_tokens` prompt tokens, took at the very least."""

    rates: Rates
    chunk_tokens: int

    def least_seconds(self, tokens: int) -> float:
        """That computing so many prompt tokens takes."""
        return self.rates.least_seconds(tokens, self.chunk_tokens)

    def missed(self, sequence: Sequence, tokens: int, now: float) -> EngineFault | None:
        """Why a sequence with so many prompt tokens to compute can't be met; None if it can."""
        least, left = self.least_seconds(tokens), sequence.deadline - now
        if least < left - CLOCKS_DIFFER_BY:
            return None
        left = max(0.0, left)
        return EngineFault(
            "DEADLINE",
            f"{tokens} prompt tokens are to be computed, which takes {least:.3f} s at least; "
            f"{left:.3f} s are left",
            {"tokens": str(tokens), "least_seconds": f"{least:.3f}", "left_seconds": f"{left:.3f}"},
        )
