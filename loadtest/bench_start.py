"""`tandem bench start`: from a worker's exec to its first token, phase by phase.

The phases come from the worker's own log (services.runtime.milestones); exec is when the operating
system says that the process began, and the first token when a client has it.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from loadtest import environment
from services.runtime import milestones

FIRST_TOKEN = "first token"
_SPENT_ON = {
    milestones.PROCESS: "interpreter, command line",
    milestones.SERVICES: "imports of services",
    milestones.FETCHED: "files fetched from a worker",
    milestones.ENGINE: "imports of the engine, torch",
    milestones.WEIGHTS: "weights: read, laid out",
    milestones.RULES: "rules of linear layers",
    milestones.TRIED: "kernels loaded, digest",
    milestones.WARM: "pool, warming up",
    milestones.READY: "listening, registration",
    FIRST_TOKEN: "first token",
}


@dataclass(frozen=True, slots=True)
class Start:
    """One start: seconds spent on the way to each milestone, on the clock and of CPU."""

    phases: dict[str, float]
    cpu: dict[str, float]


@dataclass(frozen=True, slots=True)
class StartReport:
    """Starts of a worker, the first one apart: it may have had to compile and probe.

    fetched: starts of another one that had no files and fetched `fetched_bytes` from the first.
    """

    model: str
    threads: int
    environment: environment.Environment
    starts: tuple[Start, ...]
    fetched: tuple[Start, ...] = ()
    fetched_bytes: int = 0

    @property
    def usual(self) -> Sequence[Start]:
        """All but the first, if there are more."""
        return self.starts[1:] or self.starts


@dataclass(frozen=True, slots=True)
class Reached:
    """When a milestone was, in seconds since 1970, and the process' CPU time by then."""

    at: float
    cpu: float


def milestones_of(lines: Iterable[str], since: float) -> dict[str, Reached]:
    """The last of each milestone, from a log of JSON lines."""
    found = {}
    for line in lines:
        try:
            record = json.loads(line)
            at = datetime.fromisoformat(record["time"]).timestamp()
            known = milestones.parsed(record["message"])
        except (ValueError, KeyError, TypeError):
            continue  # not a record of ours
        # The log's clock has milliseconds, the start of a process hundredths.
        if known is not None and record.get("logger") == milestones.LOGGER and at > since - 0.05:
            found[known[0]] = Reached(at, known[1])
    return found


def start_of(reached: Mapping[str, Reached], began: float, first_token: float) -> Start:
    """Phases, from `began` on. first_token: how long it took once the worker was ready."""
    phases, cpu, last = {}, {}, Reached(began, 0.0)
    for milestone in milestones.MILESTONES:
        if milestone in reached:
            now = reached[milestone]
            phases[milestone], cpu[milestone] = max(0.0, now.at - last.at), now.cpu - last.cpu
            last = now
    phases[FIRST_TOKEN] = first_token
    return Start(phases, cpu)


def show(report: StartReport, console: Console) -> None:
    """Prints seconds by phase: the first start, the next ones, those that fetched files."""
    first, usual = report.starts[0], report.usual
    table = Table(
        title=f"{report.model}, {report.threads} threads: seconds from exec to first token, "
        f"medians of {len(usual)}",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("phase", no_wrap=True)
    columns = {"first": (first,), "next": usual}
    if report.fetched:
        columns["fetched"] = report.fetched
    for column in columns:
        table.add_column(column, justify="right")
        table.add_column("CPU", justify="right")
    for milestone, words in _SPENT_ON.items():
        if any(milestone in starts[0].phases for starts in columns.values()):
            cells = [_seconds(milestone, starts) for starts in columns.values()]
            table.add_row(words, *itertools.chain(*cells))
    table.add_section()
    table.add_row("all", *itertools.chain(*(_seconds(None, s) for s in columns.values())))
    console.print(table)
    if report.fetched:
        console.print(_rate(report), highlight=False)


def _rate(report: StartReport) -> str:
    """How fast files came."""
    seconds = statistics.median(s.phases[milestones.FETCHED] for s in report.fetched)
    size = report.fetched_bytes / 1e6
    return (
        f"{size:.0f} MB of files came from a worker in {seconds:.2f} s: {size / seconds:.0f} MB/s"
    )


def _seconds(milestone: str | None, starts: Sequence[Start]) -> tuple[str, str]:
    """Medians, on the clock and of CPU; of None: the whole start. Empty if none has it."""
    if milestone is not None and not any(milestone in s.phases for s in starts):
        return "", ""

    def median(of: Callable[[Start], Mapping[str, float]]) -> str:
        values = [
            sum(of(s).values()) if milestone is None else of(s).get(milestone, 0.0) for s in starts
        ]
        return f"{statistics.median(values):.2f}"

    return median(lambda s: s.phases), "" if milestone == FIRST_TOKEN else median(lambda s: s.cpu)


def write(report: StartReport, path: Path) -> None:
    """Writes everything as JSON. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(report), indent=1) + "\n")
