"""Whether memory stays flat: resident bytes of every process over many requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from loadtest import environment, plot, session
from loadtest.errors import LoadTestError
from loadtest.options import Load, LoadOptions, Prompts
from loadtest.processes import OWN_NAME, Memory
from loadtest.view import View

SCHEMA = "tandem.bench.memory/1"


@dataclass(frozen=True, slots=True)
class MemoryOptions:
    """Which cluster, and how much it is asked."""

    address: str
    pids: Mapping[str, int]
    seed: int
    requests: int = 2000
    users: int = 8
    input_tokens: str = "uniform:32:160"
    output_tokens: str = "uniform:4:16"
    warm_up_share: float = 0.25
    """Of the requests: growth is counted after them. By then the KV pool should be full of
    cached blocks, since a page of it counts as resident only once it was used."""
    seconds: float = 3600.0
    settings: Mapping[str, str] = field(default_factory=dict)
    """How the cluster was started, for the report."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at all processes."""

    seconds: float
    requests: int
    """Ended so far."""
    memory: Mapping[str, Memory]
    """By process."""


@dataclass(frozen=True, slots=True)
class Growth:
    """Of one process after warm-up."""

    name: str
    rss_after_warm_up_bytes: int
    rss_last_bytes: int
    rss_per_request: float
    """Bytes: slope of the least-squares line through the samples."""
    private_per_request: float
    """The same of private memory: not moved by a KV pool that is not full yet."""


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Growth by process, and what it was computed from."""

    options: MemoryOptions
    environment: environment.Environment
    model: str
    succeeded: int
    errors: dict[str, int]
    growth: tuple[Growth, ...]
    samples: tuple[Sample, ...]


class TooShortError(LoadTestError):
    """The run ended before enough was seen after warm-up."""


async def run(options: MemoryOptions, *, view: View, stop: asyncio.Event) -> MemoryReport:
    """Loads the cluster and watches its memory.

    Raises LoadTestError, CallFailedError. Setting `stop` ends it early, with what was seen.
    """
    samples: list[Sample] = []

    def note(seconds: float, requests: int, memory: dict[str, Memory]) -> None:
        samples.append(Sample(seconds, requests, memory))

    load = Load(users=options.users, requests=options.requests, seconds=options.seconds)
    given = LoadOptions(
        address=options.address,
        seed=options.seed,
        load=load,
        prompts=Prompts(options.input_tokens, options.output_tokens),
        pids=options.pids,
    )
    result = await session.run(given, view=view, stop=stop, on_memory=note)
    counts = result.numbers.counts
    return MemoryReport(
        options=options,
        environment=result.environment,
        model=result.model,
        succeeded=counts.succeeded,
        errors=counts.errors,
        growth=growth(samples, options.warm_up_share * options.requests),
        samples=tuple(samples),
    )


def growth(samples: list[Sample], warm_up_requests: float) -> tuple[Growth, ...]:
    """Of each process that lived to the last sample, the load generator left out.

    Raises TooShortError if fewer than 10 samples, or no more requests, follow the warm-up.
    """
    counted = [s for s in samples if s.requests >= warm_up_requests]
    if len(counted) < 10 or counted[0].requests == counted[-1].requests:
        raise TooShortError(
            f"{len(counted)} samples after {warm_up_requests:g} requests of warm-up are too few to "
            "see growth: ask for more requests"
        )
    requests = np.array([s.requests for s in counted], dtype=np.float64)
    names = [name for name in counted[-1].memory if name != OWN_NAME]
    found = []
    for name in names:
        memory = [s.memory[name] for s in counted]
        rss = _slope(requests, [m.rss_bytes for m in memory])
        private = _slope(requests, [m.private_bytes for m in memory])
        found.append(Growth(name, memory[0].rss_bytes, memory[-1].rss_bytes, rss, private))
    return tuple(found)


def _slope(requests: NDArray[np.float64], sizes: list[int]) -> float:
    return float(np.polyfit(requests, np.array(sizes, dtype=np.float64), 1)[0])


def show(report: MemoryReport, console: Console) -> None:
    """Prints growth by process."""
    warm_up = round(report.options.warm_up_share * report.options.requests)
    title = f"Resident memory after {warm_up} of {report.succeeded} requests"
    table = Table(title=title, title_justify="left", title_style="bold")
    columns = ("", "then, MiB", "at the end, MiB", "growth, bytes/request", "of private memory")
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=not column)
    for g in report.growth:
        then, last = (f"{b / 2**20:.2f}" for b in (g.rss_after_warm_up_bytes, g.rss_last_bytes))
        growths = (f"{slope:+.0f}" for slope in (g.rss_per_request, g.private_per_request))
        table.add_row(g.name, then, last, *growths)
    console.print(table)
    for reason, count in report.errors.items():
        console.print(f"{count} requests failed: {reason}", style="red", markup=False)


def write(report: MemoryReport, path: Path) -> None:
    """As JSON. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": SCHEMA, **asdict(report)}, indent=1) + "\n")


def draw(report: MemoryReport, path: Path) -> None:
    """Resident memory over requests, as PNG. Raises PlotUnavailableError, OSError."""
    drawn, (axes,) = plot.figure(1, f"{report.model}: resident memory")
    for g in report.growth:
        seen = [s for s in report.samples if g.name in s.memory]
        rss = [s.memory[g.name].rss_bytes / 2**20 for s in seen]
        axes.plot([s.requests for s in seen], rss, label=g.name)
    axes.axvline(report.options.warm_up_share * report.options.requests, color="grey", ls=":")
    axes.set(xlabel="requests", ylabel="MiB", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=130)
