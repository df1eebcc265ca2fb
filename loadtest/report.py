"""The report of a load test: what was asked, where, and what came of it; as JSON and back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from loadtest.drive import Ended
from loadtest.environment import Environment
from loadtest.errors import ReportError
from loadtest.measures import Numbers
from loadtest.options import LoadOptions
from loadtest.outcome import Outcome
from loadtest.processes import ProcessUsage

SCHEMA = "tandem.loadtest/1"
"""The number goes up when a reader of the old form would misread the new one."""


@dataclass(frozen=True, slots=True)
class Row:
    """One request; times are seconds from the run's start."""

    index: int
    intended: float
    lateness: float
    ttft: float | None
    tpot: float | None
    e2e: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """A load test, over."""

    schema: str
    created: str
    """ISO 8601, UTC."""
    model: str
    ended_by: Ended
    options: LoadOptions
    environment: Environment
    numbers: Numbers
    processes: tuple[ProcessUsage, ...]
    notes: tuple[str, ...]
    """What a reader should know: cut lengths, processes that could not be measured."""
    error_examples: dict[str, str]
    """What the first error of each reason said."""
    rows: tuple[Row, ...] | None = None


_ADAPTER = TypeAdapter(Report)


def row(outcome: Outcome, started: float) -> Row:
    """One request of a run that began at `started`."""
    return Row(
        index=outcome.index,
        intended=outcome.intended - started,
        lateness=outcome.lateness,
        ttft=outcome.ttft,
        tpot=outcome.tpot,
        e2e=outcome.e2e,
        prompt_tokens=outcome.prompt_tokens,
        output_tokens=outcome.output_tokens,
        cached_tokens=outcome.served.cached_tokens if outcome.served else 0,
        reason=outcome.reason,
    )


def to_json(report: Report) -> str:
    """The report as indented JSON, every number as exact as it was."""
    return _ADAPTER.dump_json(report, indent=1).decode() + "\n"


def write(report: Report, path: Path) -> None:
    """Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(report), encoding="utf-8")


def read(path: Path) -> Report:
    """A report that was written. Raises ReportError."""
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ReportError(f"{path}: {error}") from None
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise ReportError(f"{path}: schema {schema!r}; expected {SCHEMA!r}")
    try:
        return _ADAPTER.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ReportError(f"{path}: {where}: {first['msg']}") from None
