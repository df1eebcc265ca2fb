"""Reports drawn: how long first tokens and gaps took, and what came out over time.

Needs matplotlib, which is in the extra `plot`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.errors import PlotUnavailableError
from loadtest.measures import Distribution
from loadtest.report import Report


def check_available() -> None:
    """Raises PlotUnavailableError: ask before a long run, not after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PlotUnavailableError(
            "plots need matplotlib: pip install 'tandem-serving[plot]', or leave the plot out"
        )


def figure(columns: int, title: str) -> tuple[Any, Any]:
    """A figure and its row of axes, drawn without a display. Raises PlotUnavailableError."""
    check_available()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(5 * columns, 4), layout="constrained")
    FigureCanvasAgg(drawn)
    drawn.suptitle(title)
    return drawn, drawn.subplots(1, columns, squeeze=False)[0]


def draw(reports: Sequence[tuple[str, Report]], path: Path) -> None:
    """Writes a PNG of (label, report) pairs laid over one another.

    Raises PlotUnavailableError, OSError.
    """
    drawn, (ttft, itl, through) = figure(3, ", ".join(sorted({r.model for _, r in reports})))
    for label, report in reports:
        _ecdf(ttft, report.numbers.ttft, label)
        _ecdf(itl, report.numbers.itl, label)
        line = report.numbers.timeline
        middles = (np.arange(len(line.output_tokens_per_second)) + 0.5) * line.bin_seconds
        through.plot(middles, line.output_tokens_per_second, label=label)
    ttft.set(title="TTFT", xlabel="ms", xscale="log", ylabel="share of requests", ylim=(0, 1))
    itl.set(title="ITL", xlabel="ms", xscale="log", ylabel="share of gaps", ylim=(0, 1))
    through.set(title="Throughput", xlabel="s", ylabel="output tokens/s", ylim=(0, None))
    for axes in (ttft, itl, through):
        axes.grid(alpha=0.3)
        if len(reports) > 1:
            axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=130)


def _ecdf(axes: Any, found: Distribution | None, label: str) -> None:
    if found is not None:
        axes.plot(1e3 * np.array(found.curve), np.linspace(0, 1, len(found.curve)), label=label)
