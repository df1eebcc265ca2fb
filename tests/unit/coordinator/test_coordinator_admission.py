"""The queue: order, bounds, overtaking, who has to go, and the hint when to try again."""

from __future__ import annotations

import itertools
import math

import pytest
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
from services.coordinator.core.fairness import OUTPUT_WEIGHT, Fairness, Line
from services.coordinator.core.messages import PlaceRequest
from services.coordinator.core.pace import ENOUGH, Pace
from services.coordinator.core.ranking import Ranking


def entry(ticket, model="m", deadline=None, tenant="", priority=0, since=0.0, adapter=""):
    want = PlaceRequest(
        f"r{ticket}", 0, model, (), 10, 10, tenant=tenant, priority=priority, adapter=adapter
    )
    return Waiting(ticket, want, since, deadline)


def tickets(entries):
    return [e.ticket for e in entries]


def head(queue, now=0.0, model="m"):
    return tickets(queue.head(model, now))


def place(queue, ticket, now=0.0, prompt_tokens=10):
    """Takes a request as the core does when it is placed."""
    taken = queue.take(ticket, now)
    return queue.charge(taken, prompt_tokens)


def test_first_in_first_out_in_each_lane():
    queue = Queue(limit=10)
    for ticket in range(6):
        queue.add(entry(ticket, model="ab"[ticket % 2]))
    assert tickets(queue.lane("a")) == [0, 2, 4]
    assert head(queue, model="b") == [1, 3, 5]
    assert queue.remove(2).ticket == 2
    assert queue.remove(2) is None
    assert tickets(queue.lane("a")) == [0, 4]
    assert (queue.waiting("a"), queue.waiting("b"), queue.waiting("c")) == (2, 3, 0)


def test_nothing_is_kept_of_lanes_that_are_empty():
    queue = Queue(limit=10)
    for ticket in range(100):
        queue.add(entry(ticket, model=f"model-{ticket}", priority=ticket, deadline=5.0))
        queue.remove(ticket)
    assert queue.lanes() == []
    assert head(queue, model="model-1") == []
    assert queue.late(9.0) == []
    queue.check_integrity()


def test_higher_priority_goes_first():
    queue = Queue(limit=10)
    for ticket, priority in enumerate([0, 5, -1, 5]):
        queue.add(entry(ticket, priority=priority))
    assert head(queue) == [1, 3, 0, 2]


def test_the_tenant_that_was_served_least_goes_first():
    queue = Queue(limit=20)
    for ticket in range(4):
        queue.add(entry(ticket, tenant="heavy"))
    place(queue, 0)
    queue.add(entry(4, tenant="light"))
    for expected in (1, 4, 2, 3):
        assert head(queue)[0] == expected, "lifted to what heavy has, it ties with it"
        place(queue, expected)


def test_weights_share_in_proportion():
    queue, served = Queue(limit=1000, weights={"big": 3.0}), {"big": 0, "small": 0}
    for ticket in range(400):
        queue.add(entry(ticket, tenant="small" if ticket % 2 else "big"))
    for _ in range(200):
        first = queue.head("m", 0.0)[0]
        served[first.request.tenant] += 1
        place(queue, first.ticket)
    assert served["big"] == pytest.approx(150, abs=3)
    with pytest.raises(ValueError, match="not positive"):
        Queue(limit=1, weights={"none": 0.0})


def test_a_newcomer_of_a_heavy_tenant_is_behind_a_light_one_that_waits():
    queue = Queue(limit=100)
    queue.add(entry(0, tenant="heavy"))
    place(queue, 0, prompt_tokens=10_000)
    for ticket in range(1, 5):
        queue.add(entry(ticket, tenant="light"))
    newcomer = entry(9, tenant="heavy")
    queue.add(newcomer)
    assert head(queue) == [1, 2, 3, 4, 9], "only if none of light's fit"
    assert queue.may_try(newcomer, 0.0)
    place(queue, 9)
    assert [e.overtaken for e in queue.lane("m")] == [1, 1, 1, 1]


def test_one_tenant_does_not_block_the_others_with_what_does_not_fit():
    queue = Queue(limit=100)
    for ticket in range(50):
        queue.add(entry(ticket, tenant="a"))
    queue.add(entry(50, tenant="b"))
    assert 50 in head(queue)


def test_only_few_overtake_one_that_does_not_fit():
    queue = Queue(limit=100)
    queue.add(entry(0))
    for ticket in range(1, MAX_OVERTAKEN + 1):
        queue.add(entry(ticket))
        assert ticket in head(queue)
        queue.take(ticket, 0.0)
    newcomer = entry(999)
    queue.add(newcomer)
    assert head(queue) == [0], "nobody passes it any more"
    assert not queue.may_try(newcomer, 0.0)


def test_newcomers_are_not_tried_while_many_wait():
    queue = Queue(limit=100)
    for ticket in range(LOOKAHEAD):
        newcomer = entry(ticket)
        queue.add(newcomer)
        assert queue.may_try(newcomer, 0.0)
    newcomer = entry(99)
    queue.add(newcomer)
    assert not queue.may_try(newcomer, 0.0)
    urgent = entry(100, priority=1)
    queue.add(urgent)
    assert queue.may_try(urgent, 0.0)
    other = entry(101, model="other")
    queue.add(other)
    assert queue.may_try(other, 0.0)


def test_late_requests_are_taken_out_wherever_they_stand():
    queue = Queue(limit=10)
    queue.add(entry(1, "a", deadline=5.0))
    queue.add(entry(2, "b", deadline=4.0))
    queue.add(entry(3, "b"))
    assert tickets(queue.late(3.9)) == []
    assert tickets(queue.late(4.0)) == [2]
    assert tickets(queue.late(9.0)) == [1]
    assert len(queue) == 1


def test_a_full_queue_lets_go_of_the_lowest_priority_first():
    queue = Queue(limit=2)
    for ticket in (0, 1):
        queue.add(entry(ticket, priority=ticket))
    newcomer = entry(2, priority=0)
    queue.add(newcomer)
    assert queue.push_out(newcomer) is newcomer, "no better than the one that waits"
    newcomer = entry(3, priority=5)
    queue.add(newcomer)
    assert queue.push_out(newcomer).ticket == 0
    assert queue.push_out(newcomer) is None
    newcomer = entry(4, priority=-1)
    queue.add(newcomer)
    assert queue.push_out(newcomer) is newcomer


def test_a_full_queue_lets_go_of_the_latest_of_the_tenant_that_takes_most():
    queue = Queue(limit=4)
    for ticket, tenant in enumerate("aaab"):
        queue.add(entry(ticket, model=f"m{ticket % 2}", tenant=tenant))
    newcomer = entry(4, tenant="b")
    queue.add(newcomer)
    assert queue.push_out(newcomer).ticket == 2
    for number, tenant in enumerate("abab"):
        newcomer = entry(5 + number, tenant=tenant)
        queue.add(newcomer)
        assert queue.push_out(newcomer) is newcomer, "two each: nobody is pushed to and fro"
    newcomer = entry(9, tenant="c")
    queue.add(newcomer)
    assert queue.push_out(newcomer).ticket in (1, 4)


def test_a_newcomer_of_a_tenant_that_takes_as_much_pushes_nobody_out():
    queue = Queue(limit=2)
    for ticket, tenant in enumerate("ab"):
        queue.add(entry(ticket, tenant=tenant))
    newcomer = entry(2, tenant="c")
    queue.add(newcomer)
    assert queue.push_out(newcomer) is newcomer


def test_with_no_place_to_wait_only_what_is_placed_at_once_stays():
    queue = Queue(limit=0)
    newcomer = entry(0)
    queue.add(newcomer)
    assert queue.may_try(newcomer, 0.0)
    assert queue.push_out(newcomer) is newcomer
    assert len(queue) == 0


def test_who_waited_too_long_has_every_other_turn():
    queue = Queue(limit=100, patience=10.0)
    for ticket in range(3):
        queue.add(entry(ticket, priority=-1, since=0.0))
    for ticket in range(3, 20):
        queue.add(entry(ticket, since=5.0))
    placed = []
    for _ in range(6):
        placed.append(head(queue, now=10.0)[0])
        queue.take(placed[-1], 10.0)
    assert placed == [0, 3, 1, 4, 2, 5]


def test_how_long_one_waits_at_least_follows_how_fast_others_moved_on():
    queue = Queue(limit=1000, patience=100.0)
    for ticket in range(200):
        queue.add(entry(ticket, since=0.0))
    newcomer = entry(200, since=0.0)
    queue.add(newcomer)
    assert queue.wait_seconds(newcomer) == 0.0, "not known"
    for ticket in range(136):
        queue.take(ticket, (ticket + 1) / 10)  # 10 a second
    later = entry(201, since=13.6)
    queue.add(later)
    assert queue.ahead(later) == 65
    assert queue.wait_seconds(later) == pytest.approx((65 - LOOKAHEAD + 1) / 10, rel=0.2)
    urgent = entry(202, priority=1, since=13.6)
    queue.add(urgent)
    assert queue.wait_seconds(urgent) == 0.0
    other = entry(203, tenant="other", since=13.6)
    queue.add(other)
    assert queue.ahead(other) == 1, "those of the first tenant may come later"


def test_nobody_is_said_to_wait_longer_than_patience():
    queue = Queue(limit=1000, patience=2.0)
    for ticket in range(300):
        queue.add(entry(ticket, since=0.0))
    for ticket in range(100):
        queue.take(ticket, float(ticket))
    newcomer = entry(300, since=100.0)
    queue.add(newcomer)
    assert queue.wait_seconds(newcomer) == 2.0


def test_a_quiet_time_does_not_make_the_queue_look_slow():
    queue = Queue(limit=1000)
    for hour in range(1000):  # one an hour, each placed at once
        queue.add(entry(hour, since=hour * 3600.0))
        queue.take(hour, hour * 3600.0)
    for ticket in range(2000, 2100):
        queue.add(entry(ticket, since=10.0**7))
    assert queue.wait_seconds(entry(2099, since=10.0**7)) == 0.0


@given(
    st.lists(st.sampled_from([0.0, 0.0, 0.0, 0.01, 0.1, 1.0]), min_size=1, max_size=30),
    st.integers(0, 300),
    st.integers(0, 29),
)
def test_the_least_wait_is_one_when_departures_go_on_as_they_did(gaps, ahead, phase):
    """In a pattern that repeats, whenever in it one comes."""
    pace, now, cycle = Pace(0.0), 0.0, itertools.cycle(gaps)
    for _ in range(ENOUGH * 32 + 300 + phase):
        now += next(cycle)
        pace.count(now)
    came = now
    for _ in range(ahead):
        now += next(cycle)
    assert pace.least_seconds(ahead) <= now - came + 1e-6


def test_the_fastest_pace_is_forgotten_after_a_while():
    pace = Pace(0.0)
    for number in range(100):
        pace.count(number / 100)
    for number in range(100):
        pace.count(700.0 + number)
    assert pace.least_seconds(8) == pytest.approx(0.08)
    for number in range(100):
        pace.count(1400.0 + number)
    assert pace.least_seconds(8) == pytest.approx(8.0)
    assert pace.least_seconds(0) == pace.least_seconds(-9) == 0.0


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "remove", "take", "late", "settle"]),
        st.integers(0, 30),
        st.sampled_from("ab"),
        st.integers(-1, 1),
        st.integers(0, 3),
    ),
    max_size=60,
)


@given(OPERATIONS, st.integers(0, 12))
def test_nobody_is_lost_and_the_order_is_the_one_promised(steps, limit):
    queue, inside, charges, now = Queue(limit, patience=4.0), {}, [], 0.0
    for ticket, (what, number, tenant, priority, seconds) in enumerate(steps):
        now += seconds / 2
        if what == "add":
            new = entry(ticket, "m", now + number, tenant, priority, since=now)
            queue.add(new)
            inside[ticket] = new
            out = queue.push_out(new)
            if out is not None:
                assert out.request.priority <= priority
                del inside[out.ticket]
        elif what == "remove":
            assert (queue.remove(number) is not None) == (inside.pop(number, None) is not None)
        elif what == "take" and inside:
            order = head(queue, now)
            assert order
            chosen = order[number % len(order)]
            charges.append(place(queue, chosen, now, prompt_tokens=number))
            del inside[chosen]
        elif what == "late":
            late = {t for t, e in inside.items() if e.late(now)}
            assert set(tickets(queue.late(now))) == late
            inside = {t: e for t, e in inside.items() if t not in late}
        elif what == "settle" and charges:
            queue.settle(charges.pop(), number, number)
        queue.check_integrity()
        assert tickets(queue.lane("m")) == list(inside)
        assert all(e.overtaken <= MAX_OVERTAKEN for e in queue.lane("m"))
        check_order(queue, list(inside.values()), now)


def check_order(queue, inside, now):
    """Against a sort of everybody, as long as few enough wait for all to be shown."""
    shown = queue.head("m", now)
    assert len(set(tickets(shown))) == len(shown) == len({id(e) for e in shown})
    assert bool(shown) == bool(inside)
    old = [e for e in inside if now - e.since >= 4.0]
    if old or any(e.overtaken >= MAX_OVERTAKEN for e in inside) or len(inside) > LOOKAHEAD // 2:
        return
    keys = [(-e.request.priority, queue.fairness.counter(e.line, e.request.tenant)) for e in shown]
    assert keys == sorted(keys)
    assert len(shown) == len(inside)
    for tenant in "ab":
        for priority in (-1, 0, 1):
            own = [e.ticket for e in shown if e.line.priority == priority]
            own = [
                t for t in own if next(e for e in shown if e.ticket == t).request.tenant == tenant
            ]
            assert own == sorted(own)


@given(
    st.lists(
        st.tuples(
            st.floats(0, 0.5),
            st.sampled_from("abc"),
            st.integers(-2, 2),
            st.integers(0, 2000),
        ),
        min_size=1,
        max_size=80,
    ),
    st.floats(0.5, 8.0),
    st.floats(0.5, 8.0),
)
def test_nobody_waits_longer_than_promised(arrivals, rate, patience):
    queue = Queue(limit=1000, patience=patience)
    coming = []
    at = 0.0
    for ticket, (gap, tenant, priority, tokens) in enumerate(arrivals):
        at += gap
        coming.append((at, entry(ticket, "m", None, tenant, priority, since=at), tokens))
    prompt = {e.ticket: tokens for _, e, tokens in coming}
    before, bound = {}, {}
    for turn in itertools.count(1):
        now = turn / rate
        while coming and coming[0][0] <= now:
            at, new, _ = coming.pop(0)
            before[new.ticket] = queue.waiting("m")
            bound[new.ticket] = at + patience + (2 * before[new.ticket] + 2) / rate
            queue.add(new)
        first = queue.head("m", now)
        if first:
            place(queue, first[0].ticket, now, prompt[first[0].ticket])
            assert now <= bound[first[0].ticket] + 1e-6
        elif not coming:
            break


@given(
    st.lists(
        st.tuples(
            st.integers(1, 500),  # prompt
            st.integers(1, 200),  # max_tokens
            st.floats(0, 1),  # part of it that is generated
            st.integers(0, 5),  # how many dispatches later it ends
        ),
        min_size=20,
        max_size=120,
    ),
    st.sampled_from([{}, {"a": 2.0}, {"c": 0.5}]),
)
def test_tenants_that_wait_are_served_alike_within_the_bound(requests, weights):
    fairness, line = Fairness(weights), Line("m", 0)
    tenants = "abc"
    for tenant in tenants:
        fairness.join(line, tenant)
    running: list = []
    most_charged = most_wrong = 0.0
    for number, (prompt, limit, part, lasts) in enumerate(requests):
        tenant = fairness.next(line, 1)[0]
        charge = fairness.charge(line, tenant, prompt, limit)
        output = int(limit * part)
        weight = fairness.weight(tenant)
        wrong = abs(prompt + OUTPUT_WEIGHT * output - charge.tokens) / weight
        most_charged = max(most_charged, charge.tokens / weight)
        running.append((number + lasts, charge, prompt, output, wrong))
        for name in tenants:
            at_once = sum(w for _, c, _, _, w in running if c.tenant == name)
            most_wrong = max(most_wrong, at_once)
        for done in [r for r in running if r[0] <= number]:
            running.remove(done)
            fairness.settle(done[1], done[2], done[3])
        counters = [fairness.counter(line, name) for name in tenants]
        assert max(counters) - min(counters) <= most_charged + 2 * most_wrong + 1e-6


def test_who_was_away_has_saved_nothing_up():
    fairness, line = Fairness(), Line("m", 0)
    fairness.join(line, "idle")
    fairness.leave(line, "idle")
    fairness.join(line, "busy")
    for _ in range(10):
        fairness.charge(line, "busy", 100, 0)
    fairness.join(line, "idle")
    assert fairness.counter(line, "idle") == fairness.counter(line, "busy") == 1000
    fairness.leave(line, "idle")
    fairness.leave(line, "busy")
    fairness.charge(line, "busy", 500, 0)
    fairness.join(line, "new")
    assert fairness.counter(line, "new") == 1500, "nobody waited: from where the last one is"


def test_the_output_expected_is_what_the_tenant_usually_has():
    fairness, line = Fairness(), Line("m", 0)
    fairness.join(line, "a")
    charge = fairness.charge(line, "a", 10, 500)
    assert charge.tokens == 10 + OUTPUT_WEIGHT * 500, "nothing is known"
    fairness.settle(charge, 4, 50)
    assert fairness.counter(line, "a") == 4 + OUTPUT_WEIGHT * 50
    assert fairness.charge(line, "a", 10, 500).tokens == 10 + OUTPUT_WEIGHT * 50
    assert fairness.charge(line, "a", 10, 20).tokens == 10 + OUTPUT_WEIGHT * 20


def test_counters_are_kept_for_a_bounded_number_of_tenants():
    fairness = Fairness(idle_limit=10)
    charges = []
    for number in range(100):
        line = Line("m", number % 7)
        fairness.join(line, f"t{number}")
        charges.append(fairness.charge(line, f"t{number}", 10, 10))
        fairness.leave(line, f"t{number}")
    known = [n for n in range(100) if fairness.counter(Line("m", n % 7), f"t{n}") is not None]
    assert known == list(range(90, 100))
    for charge in charges:
        fairness.settle(charge, 1, 1)
    assert fairness.counter(Line("m", 0), "t0") is None


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "put", "discard", "pop"]), st.integers(0, 9), st.integers(0, 9)
        ),
        max_size=200,
    )
)
def test_a_ranking_is_a_sort(steps):
    ranking, model = Ranking(), {}
    for number, (what, item, key) in enumerate(steps):
        if what == "put":
            ranking.put(item, key)
            model[item] = (key, number)
        elif what == "discard":
            ranking.discard(item)
            model.pop(item, None)
        else:
            popped = [i for i in sorted(model, key=model.get) if model[i][0] <= key]
            assert ranking.pop_through(key) == popped
            model = {i: k for i, k in model.items() if i not in popped}
        assert ranking.first(99) == sorted(model, key=model.get)
        assert ranking.first(2) == sorted(model, key=model.get)[:2]
        assert ranking.least() == min((k for k, _ in model.values()), default=None)
        assert len(ranking) == len(model)
        assert all(i in ranking for i in model)


def test_a_ranking_forgets_where_items_were():
    ranking = Ranking()
    for number in range(10_000):
        ranking.put(number % 3, -number)
    assert len(ranking._heap) < 100


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
    assert math.isfinite(rate.retry_seconds(10**6, now + 10**6))


def test_who_waits_for_an_adapter_that_is_not_open_is_passed_over():
    def only_b(adapter):
        return adapter in ("", "b")

    queue = Queue(limit=200, patience=30.0)
    for ticket in range(60):  # of many tenants, more than are looked for at first
        queue.add(entry(ticket, tenant=f"t{ticket % 20}", adapter="a"))
    queue.add(entry(60, tenant="u", adapter="b"))
    queue.add(entry(61, tenant="v"))
    assert set(head(queue)) <= set(range(60))
    for now in (0.0, 100.0):  # of those that waited long, too
        assert tickets(queue.head("m", now, only_b)) == [60, 61]
    newcomer = entry(62)
    queue.add(newcomer)
    assert queue.may_try(newcomer, 0.0, only_b)
    queue.take(62, 0.0, only_b)
    passed = {e.ticket: e.overtaken for e in queue.lane("m")}
    assert passed == dict.fromkeys(range(60), 0) | {60: 1, 61: 1}
    queue.check_integrity()
