"""Experts move when that gains more than it costs, and only then."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from services.coordinator.core import messages as m
from services.coordinator.core.expert_plans import ExpertPlanner, ExpertRules, ExpertStatus
from services.coordinator.core.experts import balancedness, place_experts

SHAPE = m.ExpertShape(
    layers=3, logical=16, physical=24, groups=4, hosts=2, gpus=8, expert_bytes=44_000_000
)
RULES = ExpertRules(plan_seconds=10.0, tokens_each=100.0, expert_share=0.3)
IN_ORDER = m.ExpertMap(tuple([*range(16), *range(8)] * SHAPE.layers))


def zipf(shape=SHAPE, tokens=1_000_000):
    """Layer by layer the same, the hottest expert first."""
    share = 1 / np.arange(1, shape.logical + 1)
    return tuple((share / share.sum() * tokens).astype(int).tolist() * shape.layers)


def report(tokens=(), where=None):
    return m.WorkerStats(expert_tokens=tuple(tokens), expert_map=where)


class Watch:
    """A planner and one worker that it watches."""

    def __init__(self, rules=RULES, shape=SHAPE, where=IN_ORDER):
        self.planner, self.shape, self.now = ExpertPlanner(rules), shape, 1000.0
        assert self.observe(where=where) is None

    def observe(self, tokens=(), where=None):
        return self.planner.observe("w", self.shape, report(tokens, where), self.now)

    def after(self, seconds, tokens=(), where=None):
        self.now += seconds
        return self.observe(tokens, where)


def evenness(tokens, where, shape=SHAPE):
    loads = np.array(tokens, float).reshape(shape.layers, shape.logical)
    placed = np.array(where.physical_to_logical).reshape(shape.layers, shape.physical)
    return balancedness(loads, placed, shape.gpus)


def test_a_skewed_load_gets_a_plan_that_evens_it():
    watch = Watch()
    assert watch.after(1, zipf()) is None, "it is not time to look yet"
    plan = watch.after(10)
    assert plan is not None
    assert plan.map.plan == 1
    assert (evenness(zipf(), plan.map) > evenness(zipf(), IN_ORDER) + 0.15).all()
    assert 0.01 < plan.gain < RULES.expert_share
    assert plan.stall_seconds > 0
    assert plan.why.startswith("experts of 3 of 3 layers: mean over maximum GPU load from 0.")
    assert f"{len(plan.moves)} copies" in plan.why


def test_the_moves_make_the_map():
    watch = Watch()
    plan = watch.after(10, zipf())
    old = np.array(IN_ORDER.physical_to_logical).reshape(3, -1)
    new = old.copy()
    for move in plan.moves:
        assert old[move.layer, move.from_place] == move.expert
        new[move.layer, move.to_place] = move.expert
    assert tuple(new.ravel().tolist()) == plan.map.physical_to_logical


def test_nothing_is_planned_before_the_map_is_known():
    watch = Watch(where=None)
    assert watch.after(100, zipf()) is None
    assert watch.after(100, zipf(), IN_ORDER) is not None


def test_too_few_tokens_say_nothing():
    few = zipf(tokens=99 * SHAPE.logical)
    watch = Watch()
    assert watch.after(10, few) is None
    assert watch.after(10, few) is not None, "with those before they are enough"


def test_old_tokens_fade():
    watch = Watch()
    assert watch.after(5, zipf(tokens=150 * SHAPE.logical)) is None
    assert watch.after(RULES.half_life_seconds) is None, "half of them are left"


def test_recent_tokens_count_for_more_than_old_ones():
    watch = Watch()
    watch.after(1, zipf(tokens=10_000))
    turned = tuple(np.array(zipf(tokens=10_000)).reshape(3, -1)[:, ::-1].ravel().tolist())
    plan = watch.after(10 * RULES.half_life_seconds, turned)
    assert (evenness(turned, plan.map) > evenness(zipf(), plan.map) + 0.1).all()


def test_what_chance_does_to_an_even_load_is_left_alone():
    shape = m.ExpertShape(4, 256, 256, 8, 4, 32, 44_000_000)
    rules = ExpertRules(plan_seconds=10.0)
    placed = m.ExpertMap(tuple([*range(256)] * 4))
    for seed in range(20):
        draw = np.random.default_rng(seed)
        tokens = draw.poisson(rules.tokens_each, 4 * 256) + 5  # never just too few
        assert Watch(rules, shape, placed).after(10, tokens.tolist()) is None


def test_copies_that_cost_more_than_they_gain_are_not_made():
    slow = replace(RULES, network_bytes_per_second=1e6, host_bytes_per_second=1e6)
    assert Watch(slow).after(10, zipf()) is None
    brief = replace(RULES, horizon_seconds=0.01)
    assert Watch(brief).after(10, zipf()) is None


def test_layers_that_gain_little_stay_as_they_are():
    tokens = np.array(zipf()).reshape(3, -1)
    tokens[1:] = 1_000_000 // 16
    even = np.ones((3, 16))
    placed = place_experts(even, physical=24, groups=4, hosts=2, gpus=8)
    where = m.ExpertMap(tuple(placed.ravel().tolist()))
    plan = Watch(where=where).after(10, tokens.ravel().tolist())
    assert {move.layer for move in plan.moves} == {0}
    assert plan.why.startswith("experts of 1 of 3 layers")
    assert plan.map.physical_to_logical[24:] == where.physical_to_logical[24:]


def test_a_placement_that_is_good_is_left_alone():
    watch = Watch()
    plan = watch.after(10, zipf())
    assert watch.after(1, where=plan.map) is None
    for _ in range(5):
        assert watch.after(60, zipf()) is None


def test_no_second_plan_before_the_first_is_answered_or_given_up():
    watch = Watch()
    assert watch.after(10, zipf()).map.plan == 1
    assert watch.after(RULES.patience_seconds - 1, zipf()) is None
    again = watch.after(2, zipf())
    assert again.map.plan == 2, "it may have been taken after all, and only newer ones are"


def test_of_two_coordinators_the_second_reckons_with_the_plan_of_the_first():
    one, two = Watch(), Watch()
    first, second = one.after(10, zipf()), two.after(10, zipf())
    assert first == second
    # The worker takes one of them, and both hear of it.
    assert one.after(1, where=first.map) is None
    assert two.after(1, where=first.map) is None
    assert two.after(RULES.patience_seconds, zipf()) is None


def test_plans_go_on_from_the_number_that_the_worker_has():
    watch = Watch(where=replace(IN_ORDER, plan=41))
    assert watch.after(10, zipf()).map.plan == 42


def test_it_can_be_turned_off():
    assert Watch(replace(RULES, plan_seconds=0.0)).after(1000, zipf()) is None


def test_a_worker_that_comes_back_starts_afresh():
    watch = Watch()
    watch.after(1, zipf())
    watch.planner.forget("w")
    assert watch.after(100, where=IN_ORDER) is None, "its tokens are forgotten"
    assert watch.after(100, zipf()) is not None


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ({"where": m.ExpertMap((0, 1, 2))}, "expert_map: 3 places, not 3 x 24"),
        ({"where": m.ExpertMap((16,) * 72)}, "expert_map: an expert that is not below 16"),
        ({"where": m.ExpertMap((5,) * 72)}, "expert_map: layer 0 has no expert 0"),
        ({"tokens": (1, 2)}, "expert_tokens: 2 numbers, not 3 x 16"),
    ],
)
def test_reports_that_make_no_sense_are_named_and_nothing_is_planned(wrong, fault):
    watch = Watch()
    assert watch.after(100, **wrong) is None
    assert watch.planner.status("w").fault == fault
    assert watch.after(100, zipf(), IN_ORDER) is not None
    assert watch.planner.status("w").fault == ""


def test_a_worker_without_load_in_some_layer_is_left_alone():
    idle = np.array(zipf()).reshape(3, -1)
    idle[2] = 0
    assert Watch().after(100, idle.ravel().tolist()) is None


def test_the_status_says_how_it_stands():
    watch = Watch(where=None)
    assert watch.planner.status("another") is None
    assert watch.planner.status("w") == ExpertStatus(0, 0.0, "", "")
    plan = watch.after(10, zipf(), IN_ORDER)
    asked = watch.planner.status("w")
    assert (asked.plan, asked.last_plan) == (0, plan.why)
    assert asked.balancedness == pytest.approx(evenness(zipf(), IN_ORDER).mean())
    watch.after(1, where=plan.map)
    done = watch.planner.status("w")
    assert done.plan == 1
    assert done.balancedness == pytest.approx(evenness(zipf(), plan.map).mean())


def test_the_core_asks_the_worker(make_cluster):
    cluster = make_cluster()
    cluster.worker("decode-0", experts=SHAPE, stats=report(where=IN_ORDER))
    cluster.worker("decode-1")
    cluster.wait(60, step=1.0, beat=["decode-1"])
    stream = cluster.streams["decode-0"]
    assert not cluster.core.members.get("decode-0"), "it was silent, and is forgotten"
    cluster.worker("decode-0", experts=SHAPE, stats=report(where=IN_ORDER))
    cluster.wait(61, step=1.0, beat=["decode-0", "decode-1"])
    stream = cluster.streams["decode-0"]
    commands = cluster.do(m.WorkerHeartbeat(stream, report(zipf())))
    asked = [c for c in commands if isinstance(c, m.AskExperts)]
    assert [(c.stream, c.plan.plan) for c in asked] == [(stream, 1)]
    assert asked[0].moves
    assert "copies" in asked[0].why
