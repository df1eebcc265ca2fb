"""Whether a prompt's start is taken from where it is held, or computed. Pure.

Both ways are predicted: fetching by what fetches took (kvtransfer/bandwidth.py), computing by the
prompt tokens that this engine computes a second. A fetch is given up when it has taken as long as
computing would have, so a wrong prediction at most doubles the wait.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvtransfer.bandwidth import Estimate
from services.engine.api import KvPrefix, PrefixReport

ASSUMED_TOKENS_PER_SECOND = 1000.0
"""Prefill rate of an engine that has not measured its own."""
LEAST_TIMEOUT_SECONDS = 0.5
"""The first fetch from a peer connects to it, which takes NIXL and UCX a quarter of a second."""
LEAST_TIER_SECONDS = 0.1
"""A tier is at hand, but a thread may have to wait for the processor."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was decided about `tokens` prompt tokens that a worker holds."""

    prefix: KvPrefix
    tokens: int
    fetch_seconds: float
    compute_seconds: float
    basis: str
    """What the predictions rest on, in words."""

    @property
    def fetch(self) -> bool:
        """Whether to fetch."""
        return self.fetch_seconds < self.compute_seconds

    @property
    def timeout(self) -> float:
        """Seconds after which the fetch has lost its point."""
        return max(LEAST_TIMEOUT_SECONDS, self.compute_seconds)

    @property
    def words(self) -> str:
        """The decision."""
        return (
            f"{self.tokens} tokens at {self.prefix.worker_id}: fetching takes "
            f"{self.fetch_seconds:.3f} s, computing {self.compute_seconds:.3f} s ({self.basis})"
        )

    def report(self, tokens: int, seconds: float, outcome: str) -> PrefixReport:
        """With what came of it: tokens that came, seconds that it took, and words."""
        return PrefixReport(
            worker_id=self.prefix.worker_id,
            tokens=tokens,
            fetch_seconds=self.fetch_seconds,
            compute_seconds=self.compute_seconds,
            seconds=seconds,
            reason=f"{self.words}: {outcome}",
        )


def judge(prefix: KvPrefix, tokens: int, estimate: Estimate, tokens_per_second: float) -> Verdict:
    """About `tokens` tokens. `tokens_per_second`: as measured, 0 before that."""
    rate = tokens_per_second or ASSUMED_TOKENS_PER_SECOND
    measured = "measured" if tokens_per_second else "assumed"
    return Verdict(
        prefix,
        tokens,
        fetch_seconds=estimate.seconds,
        compute_seconds=tokens / rate,
        basis=f"by {estimate.basis}; {rate:.0f} tokens/s {measured}",
    )


def tier_timeout(tokens: int, tokens_per_second: float) -> float:
    """Seconds after which bringing `tokens` tokens back from a tier has lost its point.

    `tokens_per_second` as in judge().
    """
    return max(LEAST_TIER_SECONDS, tokens / (tokens_per_second or ASSUMED_TOKENS_PER_SECOND))
