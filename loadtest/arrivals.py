"""When requests begin: offsets in seconds from the start of a run, drawn from a seed.

In an open loop they do not depend on what the server does, so a slow server cannot slow the
load down and so hide its own latency (coordinated omission).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

BATCH = 1024
"""Gaps drawn at a time; the draws are the same whatever it is."""


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Arrivals of a Poisson process: endless, increasing; `rate` a second, > 0."""
    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
    now = 0.0
    while True:
        for gap in random.exponential(1 / rate, BATCH):
            now += float(gap)
            yield now


def constant(rate: float) -> Iterator[float]:
    """Evenly spaced arrivals, the first at 0: endless; `rate` a second, > 0."""
    count = 0
    while True:
        yield count / rate
        count += 1


def replay(
    offsets: Sequence[float], *, speed: float = 1.0, jitter_seconds: float = 0.0, seed: int = 0
) -> tuple[list[float], list[int]]:
    """Arrivals of a recorded trace, and which record each of them is.

    `speed` 2 plays it in half the time. `jitter_seconds` (of the trace's own time) spreads
    timestamps that were recorded on a coarse grid: each moves later by less than that, uniformly.
    Returns (increasing offsets that begin at 0, indices into `offsets`).
    """
    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))
    moved = (
        np.asarray(offsets, dtype=np.float64) + random.uniform(0, 1, len(offsets)) * jitter_seconds
    )
    order = np.argsort(moved, kind="stable")
    times = moved[order]
    if len(times):
        times = (times - times[0]) / speed
    return times.tolist(), order.tolist()


def think_time(mean_seconds: float, seed: int, user: int) -> Iterator[float]:
    """How long a user of a closed loop waits between answer and next request: exponential.

    Endless. Exponential and not fixed, since users that wait equally long fall into step.
    """
    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2, user)))
    while True:
        yield float(random.exponential(mean_seconds)) if mean_seconds > 0 else 0.0
