"""The table of standings, a worker's KV feed, and the books of members."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.coordinator.core.feed import KvFeed, Verdict
from services.coordinator.core.load import Load
from services.coordinator.core.membership import (
    TABLE,
    Members,
    Signal,
    Standing,
    Worker,
    after,
)
from services.coordinator.core.messages import Role, WorkerInfo, WorkerStats


def make_worker(name="w", stream=1, address="h:1"):
    info = WorkerInfo(name, Role.DECODE, address, "m", "l", 16, 100, 4, 512)
    return Worker(info, stream, Load(info, WorkerStats()), KvFeed(3.0, 0.0), 1, 0.0, 3.0)


@given(st.lists(st.sampled_from(list(Signal)), max_size=40))
def test_standing(signals):
    """What the numbered rules promise, for any history."""
    standing, history = Standing.GONE, []
    for signal in signals:
        before, standing = standing, after(standing, signal)
        if before is Standing.GONE and signal is not Signal.HELLO:
            assert standing is Standing.GONE, "only a Hello brings a worker in"
        if signal is Signal.LOST:
            assert standing is Standing.GONE
        if before is Standing.DRAINING and signal is not Signal.LOST:
            assert standing is Standing.DRAINING, "draining is for good"
        if signal is Signal.UNREACHABLE:
            assert standing is not Standing.UP
        if signal in (Signal.HELLO, Signal.HEARD):
            assert standing is not Standing.SUSPECT
        history.append(standing)


def test_the_table_has_no_line_that_changes_nothing_by_accident():
    for (standing, signal), then in TABLE.items():
        assert after(standing, signal) is then
    for standing in Standing:
        for signal in Signal:
            if (standing, signal) not in TABLE:
                assert after(standing, signal) is standing


def test_a_signal_tells_whether_something_changed():
    worker = make_worker()
    assert worker.signal(Signal.HELLO)
    assert not worker.signal(Signal.HEARD)
    assert worker.signal(Signal.UNREACHABLE)
    assert not worker.signal(Signal.UNREACHABLE)
    assert worker.signal(Signal.HEARD)


def test_members_are_found_by_each_of_their_names_until_they_are_removed():
    members, worker = Members(), make_worker()
    members.add(worker)
    assert members.get("w") is members.on_stream(1) is members.at_address("h:1") is worker
    assert [*members] == [worker]
    assert members.expired(2.9) == []
    assert members.expired(3.0) == [worker]
    members.remove(worker)
    assert members.get("w") is members.on_stream(1) is members.at_address("h:1") is None
    assert len(members) == 0


def test_a_gap_leads_to_one_resync_and_nothing_counts_before_the_snapshot():
    feed = KvFeed(patience=3.0, asked=0.0)
    assert feed.accept(1, True, 0.0) is Verdict.REPLACE
    assert feed.accept(2, False, 0.1) is Verdict.APPLY
    assert feed.accept(2, False, 0.1) is Verdict.IGNORE
    assert feed.accept(4, False, 0.2) is Verdict.RESYNC
    assert feed.accept(5, False, 0.3) is Verdict.IGNORE
    assert not feed.overdue(3.1)
    assert feed.overdue(3.2)
    assert not feed.overdue(3.3), "asked a moment ago"
    assert feed.accept(1, True, 3.4) is Verdict.REPLACE
    assert not feed.overdue(100.0)
    assert feed.accept(2, False, 3.5) is Verdict.APPLY


@pytest.mark.parametrize("sequence", [1, 2])
def test_what_comes_before_the_first_snapshot_is_void(sequence):
    feed = KvFeed(patience=3.0, asked=0.0)
    assert feed.accept(sequence, False, 0.0) is Verdict.IGNORE
    assert feed.sequence is None


def test_a_worker_may_send_a_snapshot_of_its_own_accord():
    """It does when more has changed than it cares to list; a gap before it does not matter."""
    feed = KvFeed(patience=3.0, asked=0.0)
    for sequence, snapshot, verdict in (
        (1, True, Verdict.REPLACE),
        (2, True, Verdict.REPLACE),
        (3, False, Verdict.APPLY),
        (7, True, Verdict.REPLACE),
        (8, False, Verdict.APPLY),
        (7, True, Verdict.IGNORE),
        (10, False, Verdict.RESYNC),
        (12, True, Verdict.IGNORE),
        (1, True, Verdict.REPLACE),
        (2, False, Verdict.APPLY),
    ):
        assert feed.accept(sequence, snapshot, 0.0) is verdict, sequence


@given(st.lists(st.tuples(st.sampled_from(["kept", "lost", "doubled"]), st.booleans())))
def test_a_feed_follows_any_ordered_stream_with_losses(messages):
    """A worker numbers its messages; some are lost, some come twice; a Resync starts it over."""
    feed, known, truth, sequence = KvFeed(patience=1.0, asked=0.0), None, 0, 0
    for fate, asked_arrives in messages:
        sequence, truth = sequence + 1, truth + 1
        for _ in range({"kept": 1, "lost": 0, "doubled": 2}[fate]):
            verdict = feed.accept(sequence, sequence == 1, 0.0)
            if verdict is Verdict.APPLY:
                assert known == truth - 1, "a change was applied to the wrong state"
            if verdict in (Verdict.APPLY, Verdict.REPLACE):
                known = truth
        if feed.sequence is None and asked_arrives:
            sequence = 0
        if feed.sequence is not None and feed.sequence == sequence:
            assert known == truth
