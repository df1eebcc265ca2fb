"""Plans for experts are checked before a byte moves; reports tell each stream every token once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.api import EngineStats, ExpertMap, ExpertMove, ExpertShape
from services.engine.experts import BEATS, ExpertReports, check_plan
from services.engine.scripted.experts import ScriptedExperts, shape_of
from services.runtime.errors import InvalidRequestError
from services.runtime.load import SettingsError

SHAPE = ExpertShape(2, 3, 4, 1, 1, 2, expert_bytes=8)
NOW = ExpertMap((0, 1, 2, 0, 0, 1, 2, 0), plan=3)
SWAPPED = ExpertMap((1, 0, 2, 0, 0, 1, 2, 0), plan=4)
SWAP = (ExpertMove(0, 1, 1, 0), ExpertMove(0, 0, 0, 1))


def test_experts_may_change_places():
    check_plan(SHAPE, NOW, SWAPPED, SWAP)


@pytest.mark.parametrize(
    ("plan", "moves", "field"),
    [
        (replace(SWAPPED, plan=3), SWAP, "expert_plan.plan"),
        (ExpertMap((0, 1), plan=4), (), "expert_plan.map"),
        (SWAPPED, SWAP[:1], "expert_plan.moves"),
        (SWAPPED, (), "expert_plan.moves"),
        (SWAPPED, (*SWAP, SWAP[0]), "expert_plan.moves[2]"),
        (SWAPPED, (ExpertMove(0, 1, 2, 0), SWAP[1]), "expert_plan.moves[0]"),
        (SWAPPED, (SWAP[0], ExpertMove(0, 0, 0, 4)), "expert_plan.moves[1]"),
        (SWAPPED, (ExpertMove(2, 1, 1, 0), SWAP[1]), "expert_plan.moves[0]"),
    ],
    ids=["old", "size", "unfinished", "none", "twice", "not there", "no place", "no layer"],
)
def test_a_plan_that_leads_nowhere_is_refused(plan, moves, field):
    with pytest.raises(InvalidRequestError) as refused:
        check_plan(SHAPE, NOW, plan, moves)
    assert refused.value.metadata["field"] == field


# Reports


def stats(tokens, where=NOW):
    return EngineStats(running=1, expert_tokens=tokens, expert_map=where)


def test_the_map_is_told_first_and_when_it_changes():
    reports = ExpertReports()
    told = [reports.of(stats((0,), w)).expert_map for w in (NOW, NOW, SWAPPED, SWAPPED)]
    assert told == [NOW, None, SWAPPED, None]


def test_an_engine_without_experts_reports_as_it_is():
    plain = EngineStats(running=3)
    assert ExpertReports().of(plain) == plain


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=60))
def test_every_stream_hears_of_every_token_since_its_start_once(steps):
    total, early, late = np.array([100, 100]), ExpertReports(), ExpertReports()
    first = early.of(stats(tuple(total.tolist())))
    assert first.expert_tokens == (), "what was before the stream is nobody's news"
    heard = {early: np.zeros(2, int), late: np.zeros(2, int)}
    late.of(stats(tuple(total.tolist())))
    for number, step in enumerate(steps):
        total = total + step
        for reports in (early, late) if number % 3 else (early,):
            tokens = reports.of(stats(tuple(total.tolist()))).expert_tokens
            heard[reports] += np.array(tokens or (0, 0))
    for reports, sum_heard in heard.items():
        for _ in range(BEATS):
            tokens = reports.of(stats(tuple(total.tolist()))).expert_tokens
            sum_heard += np.array(tokens or (0, 0))
        assert (sum_heard == total - 100).all()


# Scripted experts


def test_settings_make_a_shape():
    assert shape_of("") is None
    assert shape_of("2/8/12/4/2/4") == ExpertShape(2, 8, 12, 4, 2, 4, expert_bytes=8)


@pytest.mark.parametrize("counts", ["2/8/10/4/2/4", "2/8/4/4/2/4", "2/9/12/4/2/4", "2/8/12/4/3/4"])
def test_settings_that_make_no_shape_are_refused(counts):
    with pytest.raises(SettingsError, match=r"engine\.scripted_experts"):
        shape_of(counts)


def route(experts, seed):
    tokens = np.random.default_rng(seed).integers(3, 2**16, 500).astype(np.int32)
    experts.route(tokens)
    return np.array(experts.tokens()).reshape(experts.shape.layers, -1)


def test_every_layer_routes_every_token_and_unevenly():
    experts = ScriptedExperts(ExpertShape(3, 16, 24, 4, 2, 8, 8))
    counts = route(experts, 1)
    assert (counts.sum(1) == 500).all()
    assert (counts.max(1) > 2 * counts.mean(1)).all()
    assert [int(row.argmax()) for row in counts] == [0, 1, 2], "each layer has a hottest one"


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_moved_experts_are_found_where_they_are(seed):
    shape = ExpertShape(2, 6, 9, 1, 1, 3, 8)
    experts, draw = ScriptedExperts(shape), np.random.default_rng(seed)
    old = np.array(experts.map.physical_to_logical).reshape(2, 9)
    new = np.stack([draw.permutation(np.r_[np.arange(6), draw.integers(0, 6, 3)]) for _ in "ab"])
    moves = [
        ExpertMove(
            layer, int(new[layer, to]), int(draw.choice(np.flatnonzero(row == new[layer, to]))), to
        )
        for layer, row in enumerate(old)
        for to in range(9)
        if row[to] != new[layer, to]
    ]
    plan = ExpertMap(tuple(new.ravel().tolist()), plan=1)
    check_plan(shape, experts.map, plan, moves)
    experts.move(plan, moves)
    assert experts.map == plan
    assert route(experts, seed).sum() == 1000


def test_an_expert_that_is_not_where_the_map_says_stops_the_model():
    experts = ScriptedExperts(ExpertShape(1, 4, 8, 1, 1, 2, 8))
    experts.move(ExpertMap((1, 0, 2, 3, 0, 1, 2, 3), plan=1), ())
    with pytest.raises(RuntimeError, match="not where the map says"):
        route(experts, 1)
