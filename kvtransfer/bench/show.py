"""Reports as tables and as a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kvtransfer.bench.figures import Registration, Report, Row, Share

_NEEDS_PLOT = "plots need matplotlib: pip install 'tandem-serving[plot]', or leave the plot out"


class PlotUnavailableError(Exception):
    """matplotlib is not installed."""


def check_plot() -> None:
    """Raises PlotUnavailableError: ask before a long run, not after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PlotUnavailableError(_NEEDS_PLOT)


def text(report: Report) -> str:
    """All tables."""
    compared = [row for row in report.rows if row.baseline is not None]
    alone = [row for row in report.rows if row.baseline is None]
    where = report.machine
    parts = [
        f"{where.cores} cores, {where.system}, Python {where.python}, load {where.load:.1f}; "
        "medians; CPU: both processes; noise: half of all rounds' ratios lie so close"
    ]
    parts += [_comparison(compared)] if compared else []
    parts += [_fetches(alone)] if alone else []
    parts += [_shares(report.shares)] if report.shares else []
    parts += [_registrations(report.registrations)] if report.registrations else []
    parts += ["\n".join(f"not measured: {what}: {why}" for what, why in report.absent.items())]
    return "\n\n".join(part for part in parts if part)


def _comparison(rows: Sequence[Row]) -> str:
    head = ("", "", "GB/s", "against", "GB/s", "ratio", "noise", "target", "CPU ms/GiB", "against")
    lines = []
    for row in rows:
        assert row.baseline is not None
        assert row.ratio is not None
        missed = "" if row.target is None or row.ratio >= row.target else " missed"
        lines.append(
            (
                row.subject,
                row.work,
                f"{row.ours.gb_per_second:.2f}",
                row.against,
                f"{row.baseline.gb_per_second:.2f}",
                f"{row.ratio:.2f}",
                f"{row.noise:.2f}",
                "" if row.target is None else f"{row.target:.2f}{missed}",
                f"{row.ours.cpu_ms_per_gib:.0f}",
                f"{row.baseline.cpu_ms_per_gib:.0f}",
            )
        )
    return _table(head, lines)


def _fetches(rows: Sequence[Row]) -> str:
    head = ("", "", "ms", "GB/s", "CPU ms/GiB", "CPU us/block")
    return _table(
        head,
        [
            (
                row.subject,
                row.work,
                f"{1e3 * row.ours.seconds:.2f}",
                f"{row.ours.gb_per_second:.2f}",
                f"{row.ours.cpu_ms_per_gib:.0f}",
                f"{row.ours.cpu_us_per_block:.0f}",
            )
            for row in rows
        ],
    )


def _shares(shares: Sequence[Share]) -> str:
    head = ("where the time goes", "", "ms", "read", "checksum", "gRPC and the rest")
    return _table(
        head,
        [
            (
                share.subject,
                share.work,
                f"{share.total_ms:.2f}",
                *(
                    f"{part:.2f} ({part / share.total_ms:.0%})"
                    for part in (share.read_ms, share.checksum_ms, share.rest_ms)
                ),
            )
            for share in shares
        ],
    )


def _registrations(found: Sequence[Registration]) -> str:
    head = ("registration", "start, ms", "ms/GiB", "connect, ms", "fetches until it is 1 %")
    return _table(
        head,
        [
            (
                r.subject,
                f"{r.start_ms:.1f}",
                f"{r.ms_per_gib:.1f}",
                f"{r.connect_ms:.1f}",
                f"{r.fetches_to_one_percent} of {r.fetch_mib:g} MiB",
            )
            for r in found
        ],
    )


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Columns as wide as they must be; the words of the first two to the left."""
    rows = [head, *lines]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    numbers = [all(_is_number(row[i]) for row in rows[1:]) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numbers, strict=True)
        ).rstrip()
        for row in rows
    )


def _is_number(cell: str) -> bool:
    return not cell or cell[0].isdigit()


def draw(report: Report, path: Path) -> None:
    """Ratios to the baselines over the size of a read, and GB/s, as PNG.

    Raises PlotUnavailableError, OSError.
    """
    check_plot()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"KV between two processes of one host, {report.machine.cores} cores")
    speeds, ratios = figure.subplots(1, 2)
    for subject in dict.fromkeys(row.subject for row in report.rows):
        rows = [r for r in report.rows if r.subject == subject and r.baseline and r.blocks == 1]
        if len(rows) > 1:
            _lines(speeds, ratios, subject, rows)
    speeds.set(
        title="read, GB/s (dotted: the baseline)", xscale="log", xlabel="MiB", ylim=(0, None)
    )
    ratios.set(title="speed / speed of the baseline", xscale="log", xlabel="MiB", ylim=(0, None))
    ratios.axhline(0.9, color="grey", ls=":")
    for axes in (speeds, ratios):
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _lines(speeds: Any, ratios: Any, subject: str, rows: Sequence[Row]) -> None:
    sizes = [row.nbytes / 2**20 for row in rows]
    (line,) = speeds.plot(sizes, [r.ours.gb_per_second for r in rows], marker="o", label=subject)
    base = [r.baseline.gb_per_second for r in rows if r.baseline]
    speeds.plot(sizes, base, ls=":", color=line.get_color())
    ratios.errorbar(
        sizes,
        [r.ratio for r in rows],
        yerr=[r.noise for r in rows],
        marker="o",
        capsize=3,
        color=line.get_color(),
        label=subject,
    )
