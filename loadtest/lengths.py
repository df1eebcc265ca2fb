"""How long prompts and answers are, in tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from loadtest.errors import LengthsError

ALLOWED = (
    "a number (512), uniform:LOW:HIGH (uniform:16:256), or lognormal:MEDIAN:SIGMA:MAX "
    "(lognormal:400:0.8:4096)"
)


class Lengths(Protocol):
    """A distribution over token counts, all at least 1."""

    @property
    def most(self) -> int:
        """The greatest length there can be."""

    def sample(self, random: np.random.Generator) -> int:
        """One length, tokens."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always the same."""

    tokens: int

    @property
    def most(self) -> int:
        """See Lengths."""
        return self.tokens

    def sample(self, random: np.random.Generator) -> int:
        """The length."""
        return self.tokens


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every length from `low` to `high`, both included, is equally likely."""

    low: int
    high: int

    @property
    def most(self) -> int:
        """See Lengths."""
        return self.high

    def sample(self, random: np.random.Generator) -> int:
        """One length."""
        return int(random.integers(self.low, self.high, endpoint=True))


@dataclass(frozen=True, slots=True)
class LogNormal:
    """exp of a normal variable, mean log(median), deviation sigma; rounded, cut to 1..high."""

    median: float
    sigma: float
    high: int

    @property
    def most(self) -> int:
        """See Lengths."""
        return self.high

    def sample(self, random: np.random.Generator) -> int:
        """One length."""
        drawn = self.median * math.exp(self.sigma * random.standard_normal())
        return max(1, min(round(min(drawn, self.high)), self.high))


LIMIT = 1 << 24
"""More than any context window served."""


def parse(text: str) -> Lengths:
    """The distribution that the text describes (see ALLOWED). Raises LengthsError."""
    kind, *fields = text.strip().lower().split(":")
    try:
        found = _MAKE[kind](fields) if kind in _MAKE else _fixed([kind, *fields])
    except (ValueError, TypeError, OverflowError):
        found = None
    if found is None:
        raise LengthsError(f"{text!r} does not say how long; write {ALLOWED}")
    return found


def _fixed(fields: Sequence[str]) -> Lengths | None:
    (tokens,) = map(int, fields)
    return Fixed(tokens) if 1 <= tokens <= LIMIT else None


def _uniform(fields: Sequence[str]) -> Lengths | None:
    low, high = map(int, fields)
    return Uniform(low, high) if 1 <= low <= high <= LIMIT else None


def _lognormal(fields: Sequence[str]) -> Lengths | None:
    median, sigma, high = fields
    found = LogNormal(float(median), float(sigma), int(high))
    sensible = 1 <= found.median <= found.high <= LIMIT and 0 <= found.sigma <= 10
    return found if sensible else None


_MAKE: dict[str, Callable[[Sequence[str]], Lengths | None]] = {
    "fixed": _fixed,
    "uniform": _uniform,
    "lognormal": _lognormal,
}
