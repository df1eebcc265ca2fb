"""What was measured, as a report: rows of ours beside a baseline."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass

from kvtransfer.bench.rounds import Times, ratio

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one subject: medians over rounds."""

    seconds: float
    """Wall time of one run."""
    gb_per_second: float
    cpu_ms_per_gib: float
    """CPU time of both processes, all threads."""
    cpu_us_per_block: float


@dataclass(frozen=True, slots=True)
class Row:
    """One piece of work, done by us and, if there is one, by the baseline."""

    subject: str
    work: str
    nbytes: int
    blocks: int
    ours: Figures
    against: str = ""
    """The baseline, in words."""
    baseline: Figures | None = None
    ratio: float | None = None
    """Time of the baseline / ours: above 1 we are faster. Median of the rounds' ratios."""
    noise: float | None = None
    """Half the distance between the quartiles of those."""
    target: float | None = None


@dataclass(frozen=True, slots=True)
class Share:
    """Where the time of a fetch goes, milliseconds: each stage measured alone."""

    subject: str
    work: str
    total_ms: float
    read_ms: float
    checksum_ms: float
    rest_ms: float
    """gRPC, negotiation, books, commit."""


@dataclass(frozen=True, slots=True)
class Registration:
    """What it costs to make memory known to a transport, once, at the start."""

    subject: str
    ms_per_gib: float
    start_ms: float
    """What does not depend on the size."""
    connect_ms: float
    """A sink's first connection, the mapping of memory included."""
    fetch_ms: float
    """One fetch of `fetch_mib`, read only."""
    fetch_mib: float
    fetches_to_one_percent: int
    """So many such fetches until registering a GiB and connecting are 1 % of the time spent."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Where it was measured."""

    cores: int
    system: str
    python: str
    load: float
    """Of the last minute, before the first measurement: other work makes noise."""


@dataclass(frozen=True, slots=True)
class Report:
    """A run of the benchmark."""

    machine: Machine
    options: Mapping[str, object]
    rows: tuple[Row, ...]
    shares: tuple[Share, ...]
    registrations: tuple[Registration, ...]
    absent: Mapping[str, str]
    """What could not be measured, and why."""


def figures(times: Times, nbytes: int, blocks: int) -> Figures:
    """Of a subject that moves `nbytes` in `blocks` in one run."""
    return Figures(
        seconds=times.median,
        gb_per_second=nbytes / times.median / 1e9,
        cpu_ms_per_gib=1e3 * times.cpu * GIB / nbytes,
        cpu_us_per_block=1e6 * times.cpu / blocks,
    )


def row(
    subject: str,
    work: str,
    nbytes: int,
    blocks: int,
    ours: Times,
    *,
    against: str = "",
    baseline: Times | None = None,
    target: float | None = None,
) -> Row:
    """A row of measured times."""
    mine = figures(ours, nbytes, blocks)
    if baseline is None:
        return Row(subject, work, nbytes, blocks, mine)
    found = ratio(baseline, ours)
    theirs = figures(baseline, nbytes, blocks)
    return Row(
        subject, work, nbytes, blocks, mine, against, theirs, found.value, found.noise, target
    )


def machine() -> Machine:
    """Where this runs."""
    cores = len(os.sched_getaffinity(0))
    return Machine(cores, platform.platform(), platform.python_version(), os.getloadavg()[0])


def size_words(nbytes: int) -> str:
    """As in 64 KiB, 16 MiB."""
    return f"{nbytes // 2**10} KiB" if nbytes < 2**20 else f"{nbytes / 2**20:g} MiB"
