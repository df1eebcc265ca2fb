"""Where a running cluster is shown: a table kept current on a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from cli import view
from cli.cluster import Event
from services.runtime.client import Status

LIVE_SECONDS = 0.5
PLAIN_SECONDS = 10.0

_STYLES = {"ready": "green", "died": "bold red", "silent": "yellow", "ended": "dim"}


class Screen(Protocol):
    """What a cluster is shown on."""

    period: float
    """Seconds between two calls of show()."""

    def event(self, event: Event) -> None:
        """Something happened to a process."""

    def say(self, words: str) -> None:
        """Something a person should know."""

    def show(self, status: Status | str) -> None:
        """How the cluster does now, or why that is not known."""


class PlainScreen:
    """Lines, for pipes and logs."""

    period = PLAIN_SECONDS

    def event(self, event: Event) -> None:
        """A line that stays."""
        print(f"{event.process}: {event.phase} {event.detail}".rstrip(), flush=True)

    def say(self, words: str) -> None:
        """Words that stay."""
        print(words, flush=True)

    def show(self, status: Status | str) -> None:
        """A line."""
        print(status if isinstance(status, str) else view.summary(status), flush=True)


class LiveScreen:
    """Events scroll; below them stands what is current: who is waited for, then a table."""

    period = LIVE_SECONDS

    def __init__(self, live: Live) -> None:
        self._live = live
        self._starting: list[str] = []

    def event(self, event: Event) -> None:
        """A line that stays."""
        if event.phase == "starting":
            self._starting.append(event.process)
        elif event.process in self._starting:
            self._starting.remove(event.process)
        if self._starting:
            self._live.update(Spinner("dots", f"waiting for {', '.join(self._starting)}"))
        elif event.phase == "stopping":
            self._live.update(Spinner("dots", "running requests may finish"))
        line = Text.assemble(
            (f"{event.process:14}", "bold"),
            (f"{event.phase:9}", _STYLES.get(event.phase, "")),
            event.detail,
        )
        self._live.console.print(line)

    def say(self, words: str) -> None:
        """Words that stay."""
        self._live.console.print(words, markup=False, highlight=False)

    def show(self, status: Status | str) -> None:
        """In place of what was shown before."""
        body = Text(status, style="yellow") if isinstance(status, str) else view.cluster(status)
        self._live.update(Group(Text(), body))


@contextmanager
def opened() -> Iterator[Screen]:
    """The screen that fits standard output. After the end its events and words are lines."""
    console = Console()
    if not console.is_terminal:
        yield PlainScreen()
        return
    with Live(console=console, refresh_per_second=8, transient=True) as live:
        yield LiveScreen(live)
