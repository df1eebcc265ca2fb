"""A report as tables for a terminal, and two reports side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from loadtest.measures import Distribution
from loadtest.report import Report

LATENCIES = (
    ("TTFT", "ttft"),
    ("ITL", "itl"),
    ("TPOT", "tpot"),
    ("E2E", "e2e"),
    ("lateness", "lateness"),
)
STATISTICS = ("mean", "p50", "p90", "p95", "p99", "max")


def show(report: Report, console: Console) -> None:
    """Prints everything a person wants to know of a run."""
    console.print(_latencies(report))
    console.print(_facts(report))
    if report.processes:
        console.print(_processes(report))
    for reason, words in report.error_examples.items():
        console.print(f"{reason}: {words}", style="red", markup=False, emoji=False)
    for note in report.notes:
        console.print(f"note: {note}", style="yellow", markup=False, emoji=False)


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _latencies(report: Report) -> Table:
    table = _table("Latency, ms", "", "samples", *STATISTICS)
    for label, name in LATENCIES:
        found: Distribution | None = getattr(report.numbers, name)
        if found is None:
            table.add_row(label, "0", *("-" for _ in STATISTICS))
        else:
            values = (f"{1e3 * getattr(found, s):.2f}" for s in STATISTICS)
            table.add_row(label, str(found.count), *values)
    return table


def _facts(report: Report) -> Table:
    table = _table("Run", "", "")
    for name, value in _fact_rows(report):
        table.add_row(name, value)
    return table


def _fact_rows(report: Report) -> Iterator[tuple[str, str]]:
    counts, through = report.numbers.counts, report.numbers.throughput
    yield "model", report.model
    yield "ended by", f"{report.ended_by.value} after {through.seconds:.1f} s"
    yield "requests", f"{counts.succeeded} well of {counts.ended}"
    for reason, count in counts.errors.items():
        yield f"  {reason}", str(count)
    if counts.interrupted:
        yield "  interrupted", str(counts.interrupted)
    yield "requests/s", f"{through.requests_per_second:.3f}"
    yield "input tokens/s", f"{through.input_tokens_per_second:.1f}"
    yield "output tokens/s", f"{through.output_tokens_per_second:.1f}"
    goodput = report.numbers.goodput
    if goodput is not None:
        yield "goodput", f"{goodput.per_second:.3f} requests/s ({100 * goodput.share:.1f} %)"
    cached = 100 * counts.cached_tokens / counts.input_tokens if counts.input_tokens else 0.0
    yield "cached tokens", f"{counts.cached_tokens} of {counts.input_tokens} ({cached:.1f} %)"
    yield "tokens a message", f"{counts.tokens_per_message:.2f}"
    yield "prompts run by decode", str(counts.local_prefills)
    yield "placed again", str(counts.replaced)
    yield "KV fetches lost", str(counts.lost_fetches)
    for transport, moved in report.numbers.kv.bytes_by_transport.items():
        yield f"KV by {transport}", f"{moved / 2**20:.1f} MiB"
    exposed = report.numbers.kv.exposed
    if exposed is not None:
        yield "KV exposed p50, p99", f"{1e3 * exposed.p50:.2f}, {1e3 * exposed.p99:.2f} ms"
    yield "seed", str(report.options.seed)


def _processes(report: Report) -> Table:
    table = _table("Processes", "", "pid", "CPU s", "CPU ms/request", "RSS MiB", "most MiB")
    for one in report.processes:
        each = "-" if one.cpu_ms_per_request is None else f"{one.cpu_ms_per_request:.2f}"
        memory = (f"{b / 2**20:.1f}" for b in (one.rss_last_bytes, one.rss_most_bytes))
        name = f"{one.name} (gone)" if one.gone else one.name
        table.add_row(name, str(one.pid), f"{one.cpu_seconds:.2f}", each, *memory)
    return table


@dataclass(frozen=True, slots=True)
class Measure:
    """One number that two runs are compared by."""

    label: str
    get: Callable[[Report], float | None]
    better: Literal["less", "more"]


def _latency(name: str, statistic: str) -> Callable[[Report], float | None]:
    def get(report: Report) -> float | None:
        found = getattr(report.numbers, name)
        return None if found is None else 1e3 * float(getattr(found, statistic))

    return get


def cpu_ms_per_request(report: Report) -> float | None:
    """Of all measured processes but the load generator."""
    own = [p.cpu_ms_per_request for p in report.processes if p.name != "loadtest"]
    known = [ms for ms in own if ms is not None]
    return sum(known) if known else None


MEASURES = (
    *(
        Measure(f"{label} {statistic}, ms", _latency(name, statistic), "less")
        for label, name in LATENCIES[:4]
        for statistic in ("mean", "p50", "p99")
    ),
    Measure("requests/s", lambda r: r.numbers.throughput.requests_per_second, "more"),
    Measure("output tokens/s", lambda r: r.numbers.throughput.output_tokens_per_second, "more"),
    Measure(
        "goodput, requests/s",
        lambda r: None if r.numbers.goodput is None else r.numbers.goodput.per_second,
        "more",
    ),
    Measure("errors", lambda r: float(sum(r.numbers.counts.errors.values())), "less"),
    Measure("cached tokens", lambda r: float(r.numbers.counts.cached_tokens), "more"),
    Measure("CPU ms/request", cpu_ms_per_request, "less"),
)


def compare(first: Report, second: Report, console: Console) -> None:
    """Prints both runs' numbers and second/first ratios, and what makes them differ."""
    table = _table("Comparison", "", "A", "B", "B/A")
    for measure in MEASURES:
        a, b = measure.get(first), measure.get(second)
        table.add_row(measure.label, _number(a), _number(b), _ratio(a, b, measure.better))
    console.print(table)
    for what, a, b in differences(first, second):
        console.print(f"differs: {what}: {a} | {b}", markup=False, emoji=False, highlight=False)


_NO_DIFFERENCE = ("pids", "rows", "seed")
"""Options that make no difference to what is measured."""


def differences(first: Report, second: Report) -> list[tuple[str, Any, Any]]:
    """Options and surroundings in which two runs differ: (name, first's, second's)."""
    sides = [
        {"model": r.model, **_flat(dataclasses.asdict(r.options)), **_flat(_surroundings(r))}
        for r in (first, second)
    ]
    names = sorted(sides[0].keys() | sides[1].keys())
    values = ((name, sides[0].get(name), sides[1].get(name)) for name in names)
    return [(n, a, b) for n, a, b in values if a != b and not n.startswith(_NO_DIFFERENCE)]


def _surroundings(report: Report) -> dict[str, Any]:
    found = dataclasses.asdict(report.environment)
    del found["load_before"]  # never equal
    return found


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _ratio(a: float | None, b: float | None, better: Literal["less", "more"]) -> str:
    if not a or b is None:
        return "-"
    ratio = b / a
    gain = ratio < 1 if better == "less" else ratio > 1
    colour = "green" if gain else "red" if ratio != 1 else "default"
    return f"[{colour}]{ratio:.3f}[/{colour}]"
