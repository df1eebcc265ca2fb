"""Watches fetches: counts each (observe.py) and makes a span of it, by OpenTelemetry's API.

Where no SDK is set up spans cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from kvtransfer.errors import KvError
from kvtransfer.observe import FetchStats, Figures, failed
from kvtransfer.report import FetchReport

SPAN = "kv.fetch"

Needed = Callable[[], float | None]
"""Since when a request waits for nothing but the fetch, by the endpoint's clock; None: not yet."""


def not_needed() -> float | None:
    """Nobody waits."""
    return None


@dataclass(slots=True)
class Seen:
    """What became known of one fetch, filled in while it goes on."""

    transport: str = ""
    why: str = ""
    bytes: int = 0
    blocks: int = 0
    corrupt: int = 0
    reread: int = 0
    report: FetchReport | None = None
    """Set if it ended well."""

    def attributes(self, exposed_seconds: float) -> dict[str, str | int | float]:
        """Of the span."""
        return {
            "kv.transport": self.transport,
            "kv.why": self.why,
            "kv.bytes": self.bytes,
            "kv.blocks": self.blocks,
            "kv.corrupt": self.corrupt,
            "kv.reread": self.reread,
            "kv.exposed_seconds": exposed_seconds,
        }

    def figures(self, seconds: float, exposed_seconds: float) -> Figures:
        """Of the counters, but for how the fetch ended."""
        return Figures(
            bytes=self.bytes,
            blocks=self.blocks,
            seconds=seconds,
            exposed_seconds=exposed_seconds,
            corrupt=self.corrupt,
            reread=self.reread,
        )


class Observer:
    """One endpoint's."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.stats = FetchStats()
        self._clock = clock

    @contextmanager
    def fetch(
        self, peer: str, lease_id: str, wanted: int, needed: Needed, *, held_only: bool
    ) -> Iterator[Seen]:
        """Around one fetch of `wanted` blocks.

        A KvError counts and ends the span with status ERROR and its reason as "error.type". A
        cancellation is counted by what had arrived, and is no error.
        """
        seen, began = Seen(), self._clock()
        with trace.get_tracer("tandem.kvtransfer").start_as_current_span(
            SPAN,
            kind=SpanKind.CLIENT,
            attributes={
                "kv.peer": peer,
                "kv.lease": lease_id,
                "kv.blocks.wanted": wanted,
                "kv.held_only": held_only,
            },
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            end = Figures(fetches=1)
            try:
                yield seen
            except Exception as error:
                _set_error(span, error)
                if isinstance(error, KvError):
                    end = failed(error.reason, error.metadata.get("cause", ""))
                raise
            finally:
                ended = self._clock() if seen.report is None else seen.report.ended
                since = needed()
                exposed = 0.0 if since is None else max(0.0, ended - max(since, began))
                span.set_attributes(seen.attributes(exposed))
                figures = seen.figures(max(0.0, ended - began), exposed).plus(end)
                self.stats.add(seen.transport, peer, figures, seen.why)


def _set_error(span: Span, error: Exception) -> None:
    reason = error.reason if isinstance(error, KvError) else type(error).__name__
    span.set_attribute("error.type", reason)
    span.set_status(Status(StatusCode.ERROR, str(error)))
