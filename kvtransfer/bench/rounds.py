"""Subjects measured in turns: baseline, ours, baseline, ours, so that the machine's moods hit all.

Figures are medians over rounds. A ratio is the median of the rounds' ratios, and its noise half
the distance between their quartiles: half of all rounds lie so close.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

Subject = Callable[[int], Awaitable[None]]
"""Does the work once; the argument grows by one from run to run, whichever subject it is."""

WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Times:
    """Of one subject. Seconds of one run of it, one for each round."""

    wall: tuple[float, ...]
    here: tuple[float, ...]
    """CPU time of this process, all threads."""
    there: tuple[float, ...]
    """CPU time of the other process; zeros without one."""

    @property
    def median(self) -> float:
        """Of wall time."""
        return statistics.median(self.wall)

    @property
    def cpu(self) -> float:
        """Median CPU time of both processes together."""
        return statistics.median(map(sum, zip(self.here, self.there, strict=True)))


@dataclass(frozen=True, slots=True)
class Ratio:
    """How often something fits into the other thing's time: above 1 it is the faster one."""

    value: float
    noise: float


def ratio(baseline: Times, ours: Times) -> Ratio:
    """Baseline's wall time / ours, round by round."""
    each = sorted(b / o for b, o in zip(baseline.wall, ours.wall, strict=True))
    low, _, high = statistics.quantiles(each, n=4)
    return Ratio(statistics.median(each), (high - low) / 2)


async def take_turns(
    subjects: Mapping[str, Subject], rounds: int, other: int | None = None
) -> dict[str, Times]:
    """Runs all subjects once a round, in an order that alternates; warm-up rounds don't count.

    `other` is the process whose CPU time is measured beside this one's.
    """
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in subjects}
    order: Sequence[str] = tuple(subjects)
    runs = itertools.count()
    for number in range(WARM_UP + max(2, rounds)):
        order = order[::-1]
        for name in order:
            before = _now(other)
            await subjects[name](next(runs))
            after = _now(other)
            if number >= WARM_UP:
                wall, here, there = (b - a for a, b in zip(before, after, strict=True))
                found[name].append((wall, here, there))
    return {name: _times(rows) for name, rows in found.items()}


def rounds_for(nbytes: int, most: int, total: int) -> int:
    """So many that about `total` bytes are moved, between 7 and `most`."""
    return max(min(7, most), min(most, total // nbytes))


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used, to the nanosecond where the system is Linux."""
    # clock_getcpuclockid(3): the process's CPU clock has this number.
    return time.clock_gettime(~pid << 3 | 2)


def _times(rows: Sequence[tuple[float, float, float]]) -> Times:
    wall, here, there = zip(*rows, strict=True)
    return Times(wall, here, there)


def _now(other: int | None) -> tuple[float, float, float]:
    there = 0.0 if other is None else cpu_seconds(other)
    return time.perf_counter(), cpu_seconds(os.getpid()), there
