"""What a person sees while a load test runs: a live panel, or plain lines without a terminal."""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from loadtest.drive import Run
from loadtest.options import Load

REDRAWS_PER_SECOND = 4
PLAIN_SECONDS = 5.0
"""Between lines where there is no terminal."""


class View(Protocol):
    """A context manager that is told how the run stands."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def update(self, run: Run) -> None:
        """Called several times a second, and once at the end."""


class SoFar:
    """Running figures of a run, each outcome looked at once."""

    def __init__(self) -> None:
        self._seen = 0
        self._ttft = array("d")
        self._gaps = array("d")
        self._tokens = 0
        self.succeeded = 0
        self.errors: Counter[str] = Counter()

    def take(self, run: Run) -> None:
        """Adds what ended since the last time."""
        for outcome in run.outcomes[self._seen :]:
            if outcome.ok:
                self.succeeded += 1
                if outcome.ttft is not None:
                    self._ttft.append(outcome.ttft)
                self._gaps.extend(outcome.gaps)
                self._tokens += outcome.output_tokens
            else:
                self.errors[outcome.reason] += 1
        self._seen = len(run.outcomes)

    def tokens(self, run: Run) -> int:
        """Output tokens so far, of requests under way too."""
        under_way = sum(count for p in run.live.values() for _, count in p.arrivals)
        return self._tokens + under_way

    def latencies(self) -> list[tuple[str, str]]:
        """(name, "p50 and p99") of TTFT and ITL of the requests that ended."""
        return [("TTFT", _span(self._ttft)), ("ITL", _span(self._gaps))]


class NoView:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def update(self, run: Run) -> None:
        """Nothing."""


class LiveView(NoView):
    """A panel that redraws itself, for a terminal."""

    def __init__(self, console: Console, load: Load, clock: Callable[[], float]) -> None:
        self._load = load
        self._clock = clock
        self._so_far = SoFar()
        self._live = Live(console=console, refresh_per_second=REDRAWS_PER_SECOND, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def update(self, run: Run) -> None:
        """Redraws."""
        self._so_far.take(run)
        seconds = self._clock() - run.started
        done = len(run.outcomes)
        progress = max(done / self._load.requests, min(1.0, seconds / self._load.seconds))
        grid = Table.grid(padding=(0, 2))
        grid.add_row("", ProgressBar(total=1.0, completed=min(progress, 1.0), width=50))
        for name, value in _facts(self._so_far, run, seconds, self._load):
            grid.add_row(f"[dim]{name}[/dim]", value)
        for reason, count in self._so_far.errors.most_common():
            grid.add_row(f"[red]{reason}[/red]", str(count))
        self._live.update(grid)


class PlainView(NoView):
    """A line every few seconds, for logs and pipes."""

    def __init__(self, console: Console, load: Load, clock: Callable[[], float]) -> None:
        self._console = console
        self._load = load
        self._clock = clock
        self._so_far = SoFar()
        self._next = clock() + PLAIN_SECONDS

    def update(self, run: Run) -> None:
        """A line, if it is time."""
        if self._clock() < self._next:
            return
        self._next = self._clock() + PLAIN_SECONDS
        self._so_far.take(run)
        seconds = self._clock() - run.started
        facts = _facts(self._so_far, run, seconds, self._load)
        errors = [(reason, str(n)) for reason, n in self._so_far.errors.most_common()]
        line = ", ".join(f"{name} {value}" for name, value in facts + errors)
        self._console.print(line, soft_wrap=True, highlight=False)


def view_for(console: Console, load: Load) -> View:
    """The right one for where the console's output goes."""
    kind = LiveView if console.is_terminal else PlainView
    return kind(console, load, time.perf_counter)


def _facts(so_far: SoFar, run: Run, seconds: float, load: Load) -> list[tuple[str, str]]:
    per_second = 1 / seconds if seconds > 0 else 0.0
    return [
        ("seconds", f"{seconds:.0f} of at most {load.seconds:g}"),
        ("requests", f"{len(run.outcomes)} of {load.requests} ended, {len(run.live)} in flight"),
        (
            "rate",
            f"{so_far.succeeded * per_second:.2f} requests/s, "
            f"{so_far.tokens(run) * per_second:.0f} output tokens/s",
        ),
        *so_far.latencies(),
    ]


def _span(samples: array[float]) -> str:
    if not samples:
        return "none yet"
    low, high = np.percentile(np.frombuffer(samples), (50, 99))
    return f"p50 {1e3 * low:.1f} ms, p99 {1e3 * high:.1f} ms"
