"""Counters and spans of fetches."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvtransfer.errors import KvSourceLostError, RegionDeniedError
from kvtransfer.observe import MAX_PEERS, FetchStats, Figures, failed
from kvtransfer.observer import Observer, not_needed
from kvtransfer.report import FetchReport


class TestStats:
    def test_sums_by_transport_and_by_peer(self):
        stats = FetchStats()
        stats.add("shm", "a:1", Figures(fetches=1, bytes=10, blocks=2), "best")
        stats.add("shm", "b:1", Figures(fetches=1, bytes=30, blocks=1), "still best")
        stats.add("tcp", "a:1", Figures(fetches=1, bytes=5))
        shm, tcp = stats.transports
        assert (shm.transport, shm.peer, shm.why) == ("shm", "", "still best")
        assert shm.figures == Figures(fetches=2, bytes=40, blocks=3)
        assert tcp.figures.bytes == 5
        peers = [(p.transport, p.peer, p.figures.bytes, p.why) for p in stats.peers()]
        assert peers == [
            ("shm", "b:1", 30, "still best"),
            ("shm", "a:1", 10, "best"),
            ("tcp", "a:1", 5, ""),
        ]
        assert stats.peers(1) == stats.peers()[:1]
        assert stats.total == Figures(fetches=3, bytes=45, blocks=3)

    def test_peers_are_bounded_and_sums_are_not_touched_by_it(self):
        stats = FetchStats()
        for i in range(MAX_PEERS + 5):
            stats.add("shm", f"{i}", Figures(fetches=1))
        names = {p.peer for p in stats.peers()}
        assert len(names) == MAX_PEERS
        assert names.isdisjoint({"0", "4"})
        assert stats.total.fetches == MAX_PEERS + 5

    @pytest.mark.parametrize(
        ("reason", "cause", "counted"),
        [
            ("KV_SOURCE_LOST", "STALE", "stale"),
            ("KV_SOURCE_LOST", "LEASE_LOST", "expired"),
            ("KV_SOURCE_LOST", "BLOCKS_NOT_HELD", "refused"),
            ("KV_REGION_DENIED", "", "refused"),
            ("LAYOUT_MISMATCH", "", "refused"),
            ("KV_SOURCE_LOST", "UNAVAILABLE", "lost"),
            ("KV_SOURCE_LOST", "TIMEOUT", "lost"),
        ],
    )
    def test_each_failure_counts_once(self, reason, cause, counted):
        assert failed(reason, cause) == Figures(fetches=1, **{counted: 1})


@pytest.fixture
def spans(monkeypatch):
    """Finished spans, and a provider of this test's own."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return exporter.get_finished_spans


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


REPORT = FetchReport(
    transport="shm",
    why="shm is the best offered",
    bytes=4096,
    complete=(True, True),
    corrupt_blocks=0,
    started=100.0,
    first_bytes=100.5,
    ended=102.0,
)


def fetched(seen, report=REPORT) -> None:
    seen.transport, seen.why, seen.bytes = report.transport, report.why, report.bytes
    seen.blocks, seen.corrupt = report.blocks, report.corrupt_blocks
    seen.report = report


def test_a_fetch_is_counted_and_has_a_span(spans):
    observer = Observer(Clock())
    with observer.fetch("h:1", "lease", 2, lambda: 101.25, held_only=True) as seen:
        fetched(seen)
    (span,) = spans()
    assert span.name == "kv.fetch"
    assert span.kind is trace.SpanKind.CLIENT
    assert span.status.is_unset
    assert dict(span.attributes) == {
        "kv.peer": "h:1",
        "kv.lease": "lease",
        "kv.blocks.wanted": 2,
        "kv.held_only": True,
        "kv.transport": "shm",
        "kv.why": "shm is the best offered",
        "kv.bytes": 4096,
        "kv.blocks": 2,
        "kv.corrupt": 0,
        "kv.reread": 0,
        "kv.exposed_seconds": 0.75,
    }
    (traffic,) = observer.stats.transports
    assert traffic.figures == Figures(
        fetches=1, bytes=4096, blocks=2, seconds=2.0, exposed_seconds=0.75
    )


@pytest.mark.parametrize(("needed", "exposed"), [(None, 0.0), (50.0, 2.0), (103.0, 0.0)])
def test_exposed_is_what_lies_after_the_need_began(needed, exposed):
    observer = Observer(Clock())
    with observer.fetch("h:1", "lease", 2, lambda: needed, held_only=False) as seen:
        fetched(seen)
    assert observer.stats.total.exposed_seconds == exposed


@pytest.mark.parametrize(
    ("error", "counted"),
    [
        (KvSourceLostError("gone", cause="UNAVAILABLE"), "lost"),
        (RegionDeniedError("not there"), "refused"),
    ],
)
def test_an_error_is_the_spans_status_and_what_came_before_it_counts(spans, error, counted):
    clock = Clock()
    observer = Observer(clock)

    def fetch() -> None:
        with observer.fetch("h:1", "lease", 2, not_needed, held_only=False) as seen:
            seen.transport, seen.bytes, seen.blocks = "tcp", 2048, 1
            clock.now += 3
            raise error

    with pytest.raises(type(error)):
        fetch()
    (span,) = spans()
    assert span.status.status_code is trace.StatusCode.ERROR
    assert span.status.description == error.message
    assert span.attributes["error.type"] == error.reason
    assert (span.attributes["kv.transport"], span.attributes["kv.bytes"]) == ("tcp", 2048)
    assert not span.events
    whole = Figures(fetches=1, bytes=2048, blocks=1, seconds=3.0)
    assert observer.stats.total == dataclasses.replace(whole, **{counted: 1})


async def test_a_cancellation_is_no_error(spans):
    observer = Observer(Clock())
    began = asyncio.Event()

    async def fetch() -> None:
        with observer.fetch("h:1", "lease", 2, not_needed, held_only=False):
            began.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(fetch())
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert spans()[0].status.is_unset
    assert observer.stats.total == Figures(fetches=1)


def test_without_an_sdk_nothing_is_needed():
    observer = Observer(Clock())
    with observer.fetch("h:1", "lease", 2, not_needed, held_only=False) as seen:
        fetched(seen)
    assert observer.stats.total.bytes == 4096
