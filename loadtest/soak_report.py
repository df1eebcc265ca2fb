"""What a soak was told, what came of it, and what of that should not have been."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loadtest import environment, soak_load
from loadtest.soak_deaths import Death, Schedule
from loadtest.soak_load import Shares, Tally
from loadtest.soak_memory import Identity, Trend

SCHEMA = "tandem.bench.soak/1"


@dataclass(frozen=True, slots=True)
class SoakOptions:
    """Which cluster, how much, how long."""

    frontend: str
    coordinator: str
    """host:port of both."""
    workers: tuple[str, ...]
    """Names of the processes that may be harmed; at least two of each role."""
    seed: int
    minutes: float = 20.0
    """Of load and deaths; taking the answers before and looking for rests after comes on top."""
    users: int = 4
    questions: int = 48
    input_tokens: str = "uniform:8:320"
    output_tokens: str = "uniform:4:48"
    prefix: tuple[float, int, int] = (0.5, 96, 4)
    """Share of the prompts with a common prefix, its tokens, how many there are."""
    shares: Shares = field(default_factory=Shares)
    schedule: Schedule = field(default_factory=Schedule)
    timeout_seconds: float = 120.0
    """Of a request that nobody gives up."""
    quiet_seconds: float = 90.0
    """For everything to be given back; longer than a lease."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """How the cluster was started, for the report."""


@dataclass(frozen=True, slots=True)
class SoakReport:
    """What was done, and what came of it."""

    options: SoakOptions
    environment: environment.Environment
    model: str
    seconds: float
    """Of load."""
    tally: Tally
    deaths: tuple[Death, ...]
    rest: tuple[str, ...]
    """What workers still had at the end."""
    quiet_after: float | None
    """Seconds from the last request's end until all was given back; None: it was not."""
    memory: tuple[Trend, ...]
    seen: tuple[Identity, ...]
    """Every process that there was."""
    bad_ends: tuple[str, ...] = ()
    """Processes that did not end in good order, or were left behind."""
    interrupted: bool = False

    @property
    def violations(self) -> tuple[str, ...]:
        """What should not have been, in words."""
        return tuple(_violations(self))


def _violations(report: SoakReport) -> Iterator[str]:
    tally = report.tally
    if tally.wrong:
        yield f"{tally.wrong} requests differed: {'; '.join(tally.wrong_examples)}"
    for reason, count in tally.failed.items():
        yield f"{count} requests failed with {reason}: {tally.failures[reason]}"
    if not tally.answered:
        yield "no request was answered"
    for death in report.deaths:
        if death.back_after is None:
            yield f"{death.worker}, {death.harm} at {death.at:.0f} s, did not come back"
    yield from report.rest
    for trend in report.memory:
        if trend.flat is False:
            yield f"memory of {trend.name} grows by {trend.bytes_per_minute / 2**20:.2f} MiB/min"
    yield from report.bad_ends


def ended(report: SoakReport, bad_ends: tuple[str, ...]) -> SoakReport:
    """The report, once the cluster has ended."""
    return replace(report, bad_ends=bad_ends)


def show(report: SoakReport, console: Console) -> None:
    """Prints what was done and what came of it."""
    title = f"Soak of {report.model}, {report.seconds / 60:.1f} minutes, seed {report.options.seed}"
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    for name, value in soak_load.words(report.tally).items():
        table.add_row(name, value)
    harms = [
        f"{sum(d.harm is h for d in report.deaths)} {h}" for h in {d.harm for d in report.deaths}
    ]
    table.add_row("workers harmed", f"{len(report.deaths)}: {', '.join(sorted(harms))}")
    back = [d.back_after for d in report.deaths if d.back_after is not None]
    table.add_row("longest until back", f"{max(back):.1f} s" if back else "-")
    quiet = report.quiet_after
    table.add_row("nothing held after", "never" if quiet is None else f"{quiet:.1f} s")
    console.print(table)
    console.print(_memory(report.memory))
    for words in report.violations:
        console.print(f"violated: {words}", style="red", markup=False)
    if not report.violations:
        console.print("nothing was violated", style="green")


def _memory(trends: tuple[Trend, ...]) -> Table:
    title = "Private memory of the last processes, from a quarter of their time on"
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("", "seconds", "MiB", "at the end", "MiB/min", ""):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for trend in trends:
        verdict = {True: "flat", False: "grows", None: "too short"}[trend.flat]
        sizes = (f"{size / 2**20:.1f}" for size in (trend.first_bytes, trend.last_bytes))
        growth = f"{trend.bytes_per_minute / 2**20:+.2f}"
        table.add_row(trend.name, f"{trend.seconds:.0f}", *sizes, growth, verdict)
    return table


def write(report: SoakReport, path: Path) -> None:
    """As JSON. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"schema": SCHEMA, **asdict(report), "violations": report.violations}
    path.write_text(json.dumps(found, indent=1) + "\n")
