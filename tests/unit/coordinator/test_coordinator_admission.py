"""The queue: order, bounds, overtaking, and the hint when to try again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.coordinator.core.admission import (
    LOOKAHEAD,
    MAX_OVERTAKEN,
    RATE_SECONDS,
    PlacementRate,
    Queue,
    Waiting,
)
from services.coordinator.core.messages import PlaceRequest


def entry(ticket, model="m", deadline=None):
    return Waiting(ticket, PlaceRequest(f"r{ticket}", 0, model, (), 10, 10), 0.0, deadline)


def tickets(entries):
    return [e.ticket for e in entries]


def test_first_in_first_out_in_each_lane():
    queue = Queue(limit=10)
    for ticket in range(6):
        queue.add(entry(ticket, model="ab"[ticket % 2]))
    assert tickets(queue.lane("a")) == [0, 2, 4]
    assert tickets(queue.head("b")) == [1, 3, 5]
    assert queue.remove(2).ticket == 2
    assert queue.remove(2) is None
    assert tickets(queue.lane("a")) == [0, 4]
    assert len(queue) == 5


def test_empty_lanes_are_forgotten():
    queue = Queue(limit=10)
    for ticket in range(5):
        queue.add(entry(ticket, model=f"model-{ticket}"))
        queue.remove(ticket)
    assert queue.lanes() == []
    assert tickets(queue.lane("model-1")) == []


def test_the_bound_is_over_all_lanes():
    queue = Queue(limit=2)
    queue.add(entry(1, "a"))
    assert not queue.full
    queue.add(entry(2, "b"))
    assert queue.full
    assert Queue(limit=0).full


def test_one_that_was_overtaken_often_enough_is_next():
    queue = Queue(limit=100)
    queue.add(entry(0))
    for ticket in range(1, 1 + MAX_OVERTAKEN):
        queue.add(entry(ticket))
        assert ticket in tickets(queue.head("m"))
        assert queue.open_to_newcomers("m")
        queue.overtake(ticket)
    queue.add(entry(999))
    assert tickets(queue.head("m")) == [0], "nobody passes it any more"
    assert not queue.open_to_newcomers("m")


def test_newcomers_that_never_waited_count_as_overtaking():
    queue = Queue(limit=100)
    queue.add(entry(0))
    for _ in range(MAX_OVERTAKEN):
        assert queue.open_to_newcomers("m")
        queue.newcomer_placed("m")
    assert not queue.open_to_newcomers("m")
    assert queue.open_to_newcomers("other")


def test_a_long_lane_is_closed_to_newcomers():
    queue = Queue(limit=100)
    for ticket in range(LOOKAHEAD):
        assert queue.open_to_newcomers("m")
        queue.add(entry(ticket))
    assert not queue.open_to_newcomers("m")


def test_late_ones_are_found_in_every_lane():
    queue = Queue(limit=10)
    queue.add(entry(1, "a", deadline=5.0))
    queue.add(entry(2, "b", deadline=4.0))
    queue.add(entry(3, "b"))
    assert tickets(queue.late(3.9)) == []
    assert tickets(queue.late(4.0)) == [2]
    assert sorted(tickets(queue.late(9.0))) == [1, 2]


@given(st.lists(st.tuples(st.sampled_from(["add", "remove", "overtake"]), st.integers(0, 20))))
def test_no_request_is_overtaken_without_bound_or_lost(steps):
    queue, inside, order = Queue(limit=1000), set(), []
    for step, number in steps:
        if step == "add" and number not in inside:
            queue.add(entry(number))
            inside.add(number)
            order.append(number)
        elif step == "remove":
            removed = queue.remove(number)
            assert (removed is not None) == (number in inside)
        elif step == "overtake" and number in tickets(queue.head("m")):
            assert queue.overtake(number).ticket == number
        else:
            continue
        if step != "add":
            inside.discard(number)
            order = [n for n in order if n != number]
        assert tickets(queue.lane("m")) == order
        assert all(e.overtaken <= MAX_OVERTAKEN for e in queue.lane("m"))
    assert len(queue) == len(order)


def test_the_hint_follows_the_measured_rate():
    rate = PlacementRate(0.0)
    assert rate.retry_seconds(1000, 0.0) == 1.0, "nothing is known yet"
    now = 0.0
    for _ in range(10 * int(RATE_SECONDS) * 10):  # 10 a second, for long
        now += 0.1
        rate.count(now)
    assert 4.5 < rate.retry_seconds(100, now) < 5.5
    assert rate.retry_seconds(2, now) == 1.0
    assert rate.retry_seconds(10**6, now) == 30.0
