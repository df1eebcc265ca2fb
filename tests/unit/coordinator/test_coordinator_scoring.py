"""Each scorer by itself, the way between two workers, and the pick."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.coordinator.core import messages as m
from services.coordinator.core import scoring
from services.coordinator.core.feed import KvFeed
from services.coordinator.core.load import Booking, Load
from services.coordinator.core.membership import Worker
from services.coordinator.core.paths import route
from services.coordinator.core.regions import OTHER_REGION_SECONDS, Regions


def worker(name="w", *, role=m.Role.DECODE, info=None, **stats):
    fields = {
        "address": f"{name}:1",
        "model": "m",
        "kv_layout": "l",
        "block_tokens": 16,
        "total_blocks": 512,
        "max_running": 8,
        "context_tokens": 4096,
        **(info or {}),
    }
    known = m.WorkerInfo(worker_id=name, role=role, **fields)
    load = Load(known, m.WorkerStats(**{"free_blocks": 512, **stats}))
    return Worker(known, 1, load, KvFeed(1, 0), 1, 0, 0)


def candidate(name="w", *, cached=0, context=128, info=None, stats=None, **more):
    return scoring.Candidate(worker(name, info=info, **(stats or {})), context, cached, 9, **more)


ALL = {scorer for scorer, _ in (*scoring.DECODE, *scoring.PREFILL)}


class TestScorers:
    @pytest.mark.parametrize(
        ("scorer", "worst", "best"),
        [
            (scoring.batch_room, candidate(stats={"running": 8, "waiting": 2}), candidate()),
            (scoring.block_room, candidate(stats={"free_blocks": 9}), None),
            (scoring.cached_prefix, candidate(), candidate(cached=128)),
            (scoring.affinity, candidate(), candidate(last_of_session=True)),
            (scoring.promptness, None, candidate(prompt_seconds=0.0)),
            (scoring.handover, None, candidate(transfer_seconds=0.0)),
            (scoring.swiftness, None, candidate(itl_seconds=0.0)),
            (scoring.closeness, None, candidate()),
            (scoring.thrift, None, candidate(info={"cost": 2.0}, cheapest=2.0)),
            (scoring.evenness, None, candidate()),
        ],
    )
    def test_the_stated_range_is_reached(self, scorer, worst, best):
        assert worst is None or scorer(worst) == 0.0
        assert best is None or scorer(best) == 1.0

    @given(
        running=st.integers(0, 2**31),
        free=st.integers(0, 2**31),
        cached=st.integers(0, 2**31),
        seconds=st.floats(0, 1e9),
        cost=st.floats(0, 1e9),
        cheapest=st.floats(0, 1e9),
    )
    def test_ranges_hold_for_absurd_reports(self, running, free, cached, seconds, cost, cheapest):
        absurd = candidate(
            cached=cached,
            info={"cost": cost},
            stats={"running": running, "free_blocks": free},
            prompt_seconds=seconds,
            transfer_seconds=seconds,
            itl_seconds=seconds,
            round_trip_seconds=seconds,
            # The least of what some workers cost, this one among them.
            cheapest=min(cost, cheapest),
        )
        for scorer in ALL:
            assert 0.0 <= scorer(absurd) <= 1.0, scorer.__name__

    def test_halves_are_where_they_are_said_to_be(self):
        assert scoring.promptness(candidate(prompt_seconds=1.0)) == 0.5
        assert scoring.handover(candidate(transfer_seconds=1.0)) == 0.5
        assert scoring.swiftness(candidate(itl_seconds=0.05)) == 0.5
        assert scoring.closeness(candidate(round_trip_seconds=0.05)) == 0.5
        assert scoring.thrift(candidate(info={"cost": 4.0}, cheapest=2.0)) == 0.5

    def test_where_costs_are_not_told_they_say_nothing(self):
        assert scoring.thrift(candidate()) == 1.0
        assert scoring.thrift(candidate(cheapest=2.0)) == 1.0


class TestDistances:
    def test_nearness_follows_the_path(self):
        def near(source, sink):
            path = route(worker("source", info=source).info, worker("sink", info=sink).info).path
            return scoring.nearness(candidate(path=path))

        assert near({"host": "a"}, {"host": "a"}) == 1.0
        assert near({"host": "a"}, {"host": "b"}) < 1.0
        assert near({"region": "x"}, {"region": "y"}) == 0.0
        assert scoring.nearness(candidate()) == 0.0

    def test_round_trips_hold_in_both_directions(self):
        regions = Regions({("eu", "us"): 0.09})
        assert regions.round_trip("eu", "us") == regions.round_trip("us", "eu") == 0.09
        assert regions.round_trip("eu", "eu") == regions.round_trip("", "eu") == 0.0
        assert regions.round_trip("eu", "asia") == OTHER_REGION_SECONDS


class TestPick:
    def pick(self, some, draw=lambda: 0.0):
        return scoring.pick([(sum(scoring.score(c, scoring.DECODE)), c) for c in some], draw)[1]

    def test_the_best_wins(self):
        busy, idle = candidate("busy", stats={"running": 7}), candidate("idle")
        assert self.pick([busy, idle]) is idle

    def test_of_equals_the_one_with_fewest_bookings(self):
        booked, free = candidate("booked"), candidate("free", stats={"running": 1})
        booked.worker.load.book(("r", 0), Booking(0.0, 0, 0))
        assert self.pick([booked, free]) is free

    def test_of_two_drawn_the_one_picked_longer_ago(self):
        three = [candidate(name) for name in "abc"]
        for number, one in enumerate(three):
            one.worker.picked = number + 1
        draws = iter([0.99, 0.99])  # c, then b of the other two
        assert self.pick(three, lambda: next(draws)) is three[1]

    def test_coordinators_that_see_the_same_do_not_all_pick_the_same(self):
        import random

        some = [candidate(str(n)) for n in range(16)]
        chance = random.Random(1)
        picked = {self.pick(some, chance.random).worker.worker_id for _ in range(40)}
        assert len(picked) > 8
