"""What disaggregation costs: one process that does both against prefill and decode apart.

Two clusters run the same engine. They are loaded in turn, never at once, in short rounds with the
same requests; each round gives one ratio, so that whatever else the machine does hits both.
"""

from __future__ import annotations

import asyncio
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loadtest import environment, session
from loadtest.errors import LoadTestError
from loadtest.options import Load, LoadOptions, Prompts
from loadtest.report import Report
from loadtest.tables import MEASURES
from loadtest.view import NoView

SCHEMA = "tandem.bench.disagg/1"

COMPARED = (
    "TTFT p50, ms",
    "TTFT mean, ms",
    "ITL p50, ms",
    "ITL mean, ms",
    "TPOT p50, ms",
    "E2E p50, ms",
    "output tokens/s",
    "CPU ms/request",
)
"""Labels of loadtest.tables.MEASURES."""


@dataclass(frozen=True, slots=True)
class Side:
    """A running cluster."""

    address: str
    """host:port of its frontend."""
    pids: Mapping[str, int]
    """Its processes, whose CPU time is measured."""


@dataclass(frozen=True, slots=True)
class DisaggOptions:
    """What is compared, and under which load."""

    single: Side
    """Its decode worker computes prompts itself."""
    apart: Side
    """One prefill and one decode worker."""
    seed: int
    input_tokens: str = "512"
    output_tokens: str = "64"
    users: tuple[int, ...] = (1, 4)
    """Closed loops, one after the other."""
    rounds: int = 5
    requests: int = 8
    """Of a round, on each side."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """How the clusters were started, for the report."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """One measure at one number of users: apart / single."""

    users: int
    measure: str
    single: float
    """Median over rounds."""
    apart: float
    median: float
    """Of the rounds' ratios."""
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class DisaggReport:
    """All ratios."""

    options: DisaggOptions
    environment: environment.Environment
    model: str
    ratios: tuple[Ratio, ...]
    kv_bytes_per_request: float
    """Handed from prefill to decode, where they are apart."""


class FailedRequestsError(LoadTestError):
    """A round had failed requests, so that its sides did not do the same work."""


async def run(
    options: DisaggOptions, *, say: Callable[[str], None], stop: asyncio.Event
) -> DisaggReport:
    """Loads both clusters in turn and compares them. Raises LoadTestError, CallFailedError.

    Setting `stop` ends it after the round under way, with the rounds so far; before the first is
    over that is a FailedRequestsError.
    """
    before = environment.here()
    ratios: list[Ratio] = []
    apart: list[Report] = []
    for users in options.users:
        pairs: list[tuple[Report, Report]] = []
        for number in range(options.rounds):
            pair = await _round(options, users, number, stop)
            if pair is None:
                break
            pairs.append(pair)
            say(f"{users} users, round {number + 1} of {options.rounds}: {_words(*pair)}")
        if pairs:
            ratios += _ratios(users, pairs)
            apart += [second for _, second in pairs]
    if not apart:
        raise FailedRequestsError("stopped before the first round was over")
    moved = sum(sum(r.numbers.kv.bytes_by_transport.values()) for r in apart)
    requests = sum(r.numbers.counts.succeeded for r in apart)
    return DisaggReport(options, before, apart[0].model, tuple(ratios), moved / requests)


async def _round(
    options: DisaggOptions, users: int, number: int, stop: asyncio.Event
) -> tuple[Report, Report] | None:
    """One run on each side, the other side first every second time; None if stopped."""
    sides = [options.single, options.apart]
    order = (0, 1) if number % 2 == 0 else (1, 0)
    found: dict[int, Report] = {}
    for which in order:
        given = _load(options, sides[which], users, number)
        found[which] = await session.run(given, view=NoView(), stop=stop)
        if stop.is_set():
            return None
        errors = found[which].numbers.counts.errors
        if errors:
            words = found[which].error_examples
            raise FailedRequestsError(f"requests failed at {given.address}: {errors}; {words}")
    return found[0], found[1]


def _load(options: DisaggOptions, side: Side, users: int, number: int) -> LoadOptions:
    """Both sides get the same prompts in a round; no round finds an earlier one's in a cache."""
    return LoadOptions(
        address=side.address,
        seed=options.seed + 1000 * users + number,
        load=Load(
            users=users,
            requests=options.requests * users,
            seconds=600.0,
            warmup=2 if number == 0 else 0,
        ),
        prompts=Prompts(options.input_tokens, options.output_tokens),
        pids=side.pids,
    )


def _ratios(users: int, pairs: list[tuple[Report, Report]]) -> Iterator[Ratio]:
    for measure in MEASURES:
        if measure.label not in COMPARED:
            continue
        both = [(measure.get(a), measure.get(b)) for a, b in pairs]
        values = [(a, b) for a, b in both if a and b is not None]
        if not values:
            continue
        ratios = [b / a for a, b in values]
        yield Ratio(
            users,
            measure.label,
            statistics.median(a for a, _ in values),
            statistics.median(b for _, b in values),
            statistics.median(ratios),
            min(ratios),
            max(ratios),
        )


def _words(single: Report, apart: Report) -> str:
    ratios = {r.measure: r.median for r in _ratios(0, [(single, apart)])}
    return f"TTFT x {ratios['TTFT p50, ms']:.2f}, ITL x {ratios['ITL p50, ms']:.2f}"


def show(report: DisaggReport, console: Console) -> None:
    """Prints the ratios as a table."""
    title = "Prefill and decode apart / in one process"
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("users", "measure", "one process", "apart", "ratio", "lowest", "highest"):
        table.add_column(column, justify="left" if column == "measure" else "right", no_wrap=True)
    for r in report.ratios:
        values = (f"{v:.2f}" for v in (r.single, r.apart))
        bounds = (f"{v:.3f}" for v in (r.median, r.low, r.high))
        table.add_row(str(r.users), r.measure, *values, *bounds)
    console.print(table)
    console.print(f"KV handed over: {report.kv_bytes_per_request / 2**20:.2f} MiB a request")


def write(report: DisaggReport, path: Path) -> None:
    """As JSON. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": SCHEMA, **asdict(report)}, indent=1) + "\n")
