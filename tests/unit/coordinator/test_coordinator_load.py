"""Bookings count from the decision until the end or a report that covers them, never longer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.coordinator.core.load import SETTLE_SECONDS, Booking, Load
from services.coordinator.core.messages import Role, WorkerInfo, WorkerStats

INFO = WorkerInfo("w", Role.DECODE, "h:1", "m", "l", 16, 100, 8, 512)


def load(**stats) -> Load:
    return Load(INFO, WorkerStats(**{"free_blocks": 100, **stats}))


def test_a_booking_counts_at_once():
    worker = load(running=3, waiting=1, queued_tokens=50)
    worker.book(("r", 0), Booking(made=0.0, blocks=7, tokens=90))
    assert worker.requests == 5
    assert worker.free_blocks == 93
    assert worker.queued_tokens == 140
    assert worker.room == 8 + 2 - 5


def test_only_a_report_that_comes_late_enough_covers_it():
    worker = load()
    worker.book(("r", 0), Booking(made=10.0, blocks=7, tokens=90))
    worker.report(WorkerStats(free_blocks=100), 10.0 + SETTLE_SECONDS / 2)
    assert worker.requests == 1, "it may not have arrived there yet"
    worker.report(WorkerStats(running=1, free_blocks=93), 10.0 + 1.01 * SETTLE_SECONDS)
    assert (worker.requests, worker.free_blocks, worker.queued_tokens) == (1, 93, 0)


def test_the_end_of_a_covered_attempt_is_credited_until_the_next_report():
    worker = load(running=8, waiting=2, free_blocks=10)
    assert worker.room == 0
    worker.credit(blocks=20)
    assert (worker.requests, worker.room, worker.free_blocks) == (9, 1, 30)
    worker.report(WorkerStats(running=8, waiting=1, free_blocks=28), 1.0)
    assert (worker.requests, worker.free_blocks) == (9, 28)


def test_credits_never_make_more_than_there_is():
    worker = load(running=1, free_blocks=99)
    for _ in range(5):
        worker.credit(blocks=50)
    assert (worker.requests, worker.free_blocks) == (0, 100)


def test_a_worker_that_refused_has_no_room_until_it_reports():
    worker = load()
    worker.refuse()
    assert worker.room == 0
    worker.report(WorkerStats(free_blocks=100), 1.0)
    assert worker.room == 10


ids = st.tuples(st.sampled_from("abc"), st.integers(0, 1))
events = st.lists(
    st.one_of(
        st.tuples(st.just("book"), ids, st.integers(0, 9)),
        st.tuples(st.just("drop"), ids, st.just(0)),
        st.tuples(st.just("report"), ids, st.just(0)),
        st.tuples(st.just("credit"), ids, st.integers(0, 9)),
        st.tuples(st.just("wait"), ids, st.integers(0, 4)),
    )
)


@given(events)
def test_the_books_balance_and_nothing_is_kept_for_ever(events):
    worker, now = load(), 0.0
    for what, attempt, number in events:
        if what == "book":
            worker.book(attempt, Booking(now, number, number))
        elif what == "drop":
            worker.drop(attempt)
            assert attempt not in worker.bookings
        elif what == "credit":
            worker.credit(number)
        elif what == "wait":
            now += number * SETTLE_SECONDS / 2
        else:
            worker.report(WorkerStats(free_blocks=100), now)
        worker.check_integrity()
        assert 0 <= worker.free_blocks <= 100
        assert worker.requests >= 0
    worker.report(WorkerStats(free_blocks=100), now + 1.01 * SETTLE_SECONDS)
    assert not worker.bookings
    assert (worker.requests, worker.free_blocks, worker.queued_tokens) == (0, 100, 0)
