"""Numbers of a run, computed from its outcomes: pure arithmetic.

Percentiles are exact: over all samples, linearly interpolated between neighbours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from loadtest.outcome import INTERRUPTED, Outcome, Served

PERCENTILES = (50, 90, 95, 99)
CURVE_POINTS = 201
"""Quantiles kept for drawing: every half percent, both ends included."""
TIMELINE_BINS = 60


@dataclass(frozen=True, slots=True)
class Distribution:
    """Samples of one quantity, seconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float
    curve: tuple[float, ...]
    """Quantiles at evenly spaced fractions from 0 to 1: what a plot needs."""


@dataclass(frozen=True, slots=True)
class Slo:
    """What a user is content with; None: no matter."""

    ttft_seconds: float | None = None
    tpot_seconds: float | None = None

    def met_by(self, outcome: Outcome) -> bool:
        """Ended well, and fast enough. A single token has no TPOT, and so no bad one."""
        if not outcome.ok or outcome.ttft is None:
            return False
        first = self.ttft_seconds is None or outcome.ttft <= self.ttft_seconds
        tpot = outcome.tpot
        return first and (self.tpot_seconds is None or tpot is None or tpot <= self.tpot_seconds)


@dataclass(frozen=True, slots=True)
class Goodput:
    """Requests that met the SLO."""

    slo: Slo
    met: int
    share: float
    """Of all that ended, errors included."""
    per_second: float


@dataclass(frozen=True, slots=True)
class Throughput:
    """Of requests that ended well, over the seconds from the run's start to the last end."""

    seconds: float
    requests_per_second: float
    input_tokens_per_second: float
    output_tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Counts:
    """Requests and tokens."""

    ended: int
    succeeded: int
    interrupted: int
    """Cut off by Ctrl-C: neither success nor error, and in no other number."""
    errors: dict[str, int]
    """By reason code."""
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    tokens_per_message: float
    """Above 1, ITL is the gap between groups of tokens; TPOT is not touched by it."""
    replaced: int
    """Requests that needed more than one placement."""
    local_prefills: int
    """Requests whose prompt the decode worker computed."""
    lost_fetches: int = 0
    """KV fetches that did not bring all that they were for; the rest was computed."""


@dataclass(frozen=True, slots=True)
class KvMoved:
    """KV handed from prefill to decode."""

    bytes_by_transport: dict[str, int]
    fetch: Distribution | None
    exposed: Distribution | None
    """What the hand-off added after prefill had ended, for requests that fetched any."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """Throughput over the run, in equal bins."""

    bin_seconds: float
    output_tokens_per_second: tuple[float, ...]
    requests_per_second: tuple[float, ...]
    """Ended well."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """Everything measured from the client's side. None: no sample."""

    counts: Counts
    ttft: Distribution | None
    itl: Distribution | None
    tpot: Distribution | None
    e2e: Distribution | None
    lateness: Distribution | None
    throughput: Throughput
    goodput: Goodput | None
    kv: KvMoved
    timeline: Timeline


def distribution(samples: Iterable[float]) -> Distribution | None:
    """Of all samples; None without any."""
    values = np.sort(np.fromiter(samples, dtype=np.float64))
    if not len(values):
        return None
    p50, p90, p95, p99 = (float(v) for v in np.percentile(values, PERCENTILES))
    curve = np.quantile(values, np.linspace(0, 1, CURVE_POINTS))
    mean = float(values.mean())
    return Distribution(
        len(values), mean, p50, p90, p95, p99, float(values[-1]), tuple(curve.tolist())
    )


def goodput(outcomes: Sequence[Outcome], slo: Slo, seconds: float) -> Goodput:
    """Share and rate of the requests that met the SLO; interrupted ones don't count."""
    counted = [o for o in outcomes if o.reason != INTERRUPTED]
    met = sum(map(slo.met_by, counted))
    return Goodput(slo, met, met / len(counted) if counted else 0.0, _rate(met, seconds))


def numbers(outcomes: Sequence[Outcome], started: float, slo: Slo | None) -> Numbers:
    """Of a run that began at `started`, of the clock that the outcomes' times are of."""
    good = [o for o in outcomes if o.ok]
    seconds = max((o.ended for o in outcomes), default=started) - started
    return Numbers(
        counts=_counts(outcomes, good),
        ttft=distribution(o.ttft for o in good if o.ttft is not None),
        itl=distribution(gap for o in good for gap in o.gaps),
        tpot=distribution(o.tpot for o in good if o.tpot is not None),
        e2e=distribution(o.e2e for o in good),
        lateness=distribution(o.lateness for o in outcomes),
        throughput=Throughput(
            seconds,
            _rate(len(good), seconds),
            _rate(sum(o.prompt_tokens for o in good), seconds),
            _rate(sum(o.output_tokens for o in good), seconds),
        ),
        goodput=None if slo is None else goodput(outcomes, slo, seconds),
        kv=_kv([o.served for o in good if o.served is not None]),
        timeline=_timeline(outcomes, started, seconds),
    )


def _counts(outcomes: Sequence[Outcome], good: Sequence[Outcome]) -> Counts:
    reasons = Counter(o.reason for o in outcomes if not o.ok)
    interrupted = reasons.pop(INTERRUPTED, 0)
    served = [o.served for o in good if o.served is not None]
    output = sum(o.output_tokens for o in good)
    messages = sum(len(o.arrivals) for o in good)
    return Counts(
        ended=len(outcomes) - interrupted,
        succeeded=len(good),
        interrupted=interrupted,
        errors=dict(sorted(reasons.items())),
        input_tokens=sum(o.prompt_tokens for o in good),
        output_tokens=output,
        cached_tokens=sum(s.cached_tokens for s in served),
        tokens_per_message=output / messages if messages else 0.0,
        replaced=sum(s.attempts > 1 for s in served),
        local_prefills=sum(s.local_prefill for s in served),
        lost_fetches=sum(s.lost_fetches for s in served),
    )


def _kv(served: Sequence[Served]) -> KvMoved:
    moved: Counter[str] = Counter()
    for one in served:
        moved.update(one.kv_bytes)
    fetched = [s for s in served if s.kv_bytes]
    return KvMoved(
        dict(sorted(moved.items())),
        distribution(s.kv_seconds for s in fetched),
        distribution(s.kv_exposed_seconds for s in fetched),
    )


def _timeline(outcomes: Sequence[Outcome], started: float, seconds: float) -> Timeline:
    """Tokens count when they came, of failed requests too: this is what the server put out."""
    if seconds <= 0:
        return Timeline(0.0, (), ())
    arrivals = [arrival for o in outcomes for arrival in o.arrivals]
    times = np.array([time for time, _ in arrivals])
    counts = np.array([count for _, count in arrivals], dtype=np.float64)
    ends = np.array([o.ended for o in outcomes if o.ok])
    span = (started, started + seconds)
    width = seconds / TIMELINE_BINS
    tokens, _ = np.histogram(times, TIMELINE_BINS, span, weights=counts)
    requests, _ = np.histogram(ends, TIMELINE_BINS, span)
    return Timeline(width, tuple((tokens / width).tolist()), tuple((requests / width).tolist()))


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
