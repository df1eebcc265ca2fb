"""What users saw of each death, and what of that should not have been."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loadtest.deaths_load import Asked, Wait
from loadtest.environment import Environment

SCHEMA = "tandem.bench.deaths/1"
LEAST_UNUSUAL = 0.25
"""Seconds: a shorter wait for a token is nothing out of the ordinary."""

COLUMNS = (
    "what",
    "running",
    "failed",
    "cut",
    "placed again",
    "longest gap",
    "longest first",
    "as usual after",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One harm. Times in seconds."""

    what: str
    running: int
    """Requests when it happened."""
    requests: int
    """That ran at some time from then to its end."""
    failed: int
    cut: int
    """Whose stream ended with their frontend, and who asked the other one."""
    placed_again: int
    longest_gap: float
    """From one token to the next."""
    longest_first: float
    """From the question to the first token."""
    usual_again_after: float
    """From the harm to the end of the last wait that was out of the ordinary; 0: none was."""
    seconds: float
    """From the harm until all had been there again for a while."""


@dataclass(frozen=True, slots=True)
class DeathsReport:
    """What was done, and what came of it."""

    settings: Mapping[str, str]
    environment: Environment
    requests: int
    usual_gap: float
    usual_first: float
    """Longest waits before the first harm."""
    rows: tuple[Row, ...]
    wrong: int
    """Requests that got a token which the undisturbed answer does not have there."""
    failures: tuple[str, ...]
    interrupted: bool = False

    @property
    def violations(self) -> tuple[str, ...]:
        """What should not have been, in words."""
        return tuple(_violations(self))


def _violations(report: DeathsReport) -> Iterator[str]:
    if report.wrong:
        yield f"{report.wrong} requests got tokens that differ"
    for failure, count in Counter(report.failures).items():
        yield f"{count} requests failed: {failure}"
    for row in report.rows:
        if row.cut and not row.what.startswith("frontend"):
            yield f"{row.what}: {row.cut} streams were cut although their frontend lived"


def longest_waits(asked: Iterable[Asked], began: float, ended: float) -> tuple[float, float]:
    """Between tokens, and for the first token: of waits that were not over before or not begun."""
    waits = list(_waits(asked, began, ended))
    gaps = [w.seconds for w in waits if not w.first]
    firsts = [w.seconds for w in waits if w.first]
    return max(gaps, default=0.0), max(firsts, default=0.0)


def unusual_until(asked: Iterable[Asked], began: float, ended: float, usual: float) -> float:
    """When the last wait ended that was out of the ordinary; `began` if none was."""
    bound = max(LEAST_UNUSUAL, 2 * usual)
    ends = (min(w.ended, ended) for w in _waits(asked, began, ended) if w.seconds > bound)
    return max(ends, default=began)


def _waits(asked: Iterable[Asked], began: float, ended: float) -> Iterator[Wait]:
    for request in asked:
        yield from (w for w in request.waits if w.ended > began and w.began < ended)


def rows(report: DeathsReport) -> Iterator[tuple[str, ...]]:
    """The table's cells, in the order of COLUMNS."""
    for row in report.rows:
        again = f"{row.usual_again_after:.1f} s" if row.usual_again_after else "at once"
        yield (
            row.what,
            str(row.running),
            f"{row.failed} of {row.requests}",
            str(row.cut),
            str(row.placed_again),
            f"{1e3 * row.longest_gap:.0f} ms",
            f"{1e3 * row.longest_first:.0f} ms",
            again,
        )


def show(report: DeathsReport, console: Console) -> None:
    """Prints what was done and what came of it."""
    title = (
        f"{report.requests} requests; undisturbed, the longest gap was "
        f"{1e3 * report.usual_gap:.0f} ms, the longest wait for a first token "
        f"{1e3 * report.usual_first:.0f} ms"
    )
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "what" else "right")
    for cells in rows(report):
        table.add_row(*cells)
    console.print(table)
    for words in report.violations:
        console.print(f"violated: {words}", style="red", markup=False)
    if not report.violations:
        console.print("nothing was violated", style="green")


def markdown(report: DeathsReport) -> str:
    """The table as the documentation has it."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *rows(report)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def write(report: DeathsReport, path: Path) -> None:
    """As JSON. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"schema": SCHEMA, **asdict(report), "violations": report.violations}
    path.write_text(json.dumps(found, indent=1) + "\n")
