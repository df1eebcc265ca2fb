"""Expert replicas go where EPLB's published example puts them, and where its definition says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.coordinator.core.expert_moves import fit, incoming, moves
from services.coordinator.core.experts import balancedness, gpu_loads, packing_hosts, place_experts

# https://github.com/deepseek-ai/EPLB, README
PUBLISHED = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    dtype=float,
)


def test_the_published_example_is_reproduced():
    placed = place_experts(PUBLISHED, physical=16, groups=4, hosts=2, gpus=8)
    assert placed.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert balancedness(PUBLISHED, placed, 8).round(3).tolist() == [0.828, 0.805]


def test_the_global_policy_balances_the_published_example_better():
    placed = place_experts(PUBLISHED, physical=16, groups=1, hosts=1, gpus=8)
    assert balancedness(PUBLISHED, placed, 8).round(3).tolist() == [0.932, 0.84]


def test_groups_that_hosts_cannot_share_evenly_are_placed_globally():
    uneven = place_experts(PUBLISHED, physical=16, groups=3, hosts=2, gpus=8)
    assert (uneven == place_experts(PUBLISHED, physical=16, groups=1, hosts=1, gpus=8)).all()


@pytest.mark.parametrize(
    ("wrong", "shape"),
    [
        ("12 experts don't fit 8 places", {"physical": 8}),
        ("logical", {"groups": 5}),
        ("physical", {"gpus": 6}),
        ("gpus", {"hosts": 3}),
    ],
)
def test_parts_that_are_not_equal_are_refused(wrong, shape):
    with pytest.raises(ValueError, match=wrong):
        place_experts(PUBLISHED, **{"physical": 16, "groups": 4, "hosts": 2, "gpus": 8, **shape})


def test_a_layer_at_rest_is_balanced():
    rest = np.zeros((1, 4))
    placed = place_experts(rest, physical=4, groups=1, hosts=1, gpus=2)
    assert sorted(placed[0].tolist()) == [0, 1, 2, 3]
    assert balancedness(rest, placed, 2).tolist() == [1.0]


@st.composite
def placements(draw):
    """Loads of some layers, and a shape that they fit."""
    hosts, gpus_each = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    groups = hosts * draw(st.integers(1, 2)) if draw(st.booleans()) else draw(st.integers(1, 4))
    logical = groups * draw(st.integers(1, 4))
    gpus = hosts * gpus_each
    physical = -(-logical // gpus) * gpus + gpus * draw(st.integers(0, 2))
    layers = draw(st.integers(1, 3))
    loads = draw(
        st.lists(st.integers(0, 1000), min_size=layers * logical, max_size=layers * logical)
    )
    shape = {"physical": physical, "groups": groups, "hosts": hosts, "gpus": gpus}
    return np.array(loads, dtype=float).reshape(layers, logical), shape


@given(placements())
@settings(max_examples=150, deadline=None)
def test_every_expert_has_a_place_and_groups_stay_on_one_host(case):
    loads, shape = case
    placed = place_experts(loads, **shape)
    logical = loads.shape[1]
    assert placed.shape == (len(loads), shape["physical"])
    for row in placed:
        assert set(row.tolist()) == set(range(logical))
    hosts = packing_hosts(shape["groups"], shape["hosts"])
    if hosts > 1:
        group_of, per_host = placed // (logical // shape["groups"]), shape["physical"] // hosts
        for row in group_of.reshape(len(loads), hosts, per_host):
            seen = [set(host.tolist()) for host in row]
            assert sum(map(len, seen)) == shape["groups"], "a group is on one host"
            assert len({len(groups) for groups in seen}) == 1, "each host has as many"
    assert np.allclose(gpu_loads(loads, placed, shape["gpus"]).sum(1), loads.sum(1))


@given(placements())
@settings(max_examples=150, deadline=None)
def test_replicas_go_one_by_one_to_whoever_has_most_load_a_replica(case):
    loads, shape = case
    logical = loads.shape[1]
    shape = {**shape, "hosts": 1}
    for row, load in zip(place_experts(loads, **shape), loads, strict=True):
        count = np.bincount(row, minlength=logical)
        each = load / count
        # Were a replica given to anybody out of turn, its expert's load without it would be less
        # than what somebody else has.
        for expert in np.flatnonzero(count > 1):
            assert load[expert] / (count[expert] - 1) >= each.max() - 1e-9


# Moves


def exchange(old, copies):
    """What the copies of a plan make of a map: all of a layer are read before one is written."""
    new = old.copy()
    for layer, some in itertools.groupby(copies, key=lambda move: move.layer):
        read = [(move, old[layer, move.from_place]) for move in some]
        for move, expert in read:
            assert expert == move.expert, "it is there before the plan"
            new[layer, move.to_place] = expert
    return new


@given(placements(), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_moves_lead_from_the_old_map_to_the_new_one(case, random):
    loads, shape = case
    logical, hosts, gpus = loads.shape[1], shape["hosts"], shape["gpus"]
    old = place_experts(loads, **shape)
    shuffled = loads.copy()
    for row in shuffled:
        random.shuffle(row)
    wanted = place_experts(shuffled, **shape)
    matched = packing_hosts(shape["groups"], hosts)
    new = fit(wanted, old, logical=logical, hosts=matched, gpus=gpus)
    copies = moves(new, old, hosts=hosts, gpus=gpus)
    assert (exchange(old, copies) == new).all()
    targets = [(move.layer, move.to_place) for move in copies]
    assert len(set(targets)) == len(targets), "no place is written twice"
    assert [move.layer for move in copies] == sorted(move.layer for move in copies)
    assert len(copies) == (new != old).sum(), "nothing is copied to where it is"
    near, far = incoming(new, old, logical=logical, hosts=hosts, gpus=gpus)
    assert near.sum() + far.sum() == len(copies)
    per_host = shape["physical"] // hosts
    crossing = sum(m.from_place // per_host != m.to_place // per_host for m in copies)
    assert crossing == far.sum(), "nothing crosses hosts that is on the host"
    # Only names have changed: the same experts are together.
    for kind in (gpus, matched):
        together = [
            [sorted(map(tuple, np.sort(row.reshape(kind, -1)).tolist())) for row in placed]
            for placed in (wanted, new)
        ]
        assert together[0] == together[1]


@given(placements(), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_maps_that_differ_in_names_alone_cost_nothing(case, random):
    loads, shape = case
    hosts, gpus = packing_hosts(shape["groups"], shape["hosts"]), shape["gpus"]
    old = place_experts(loads, **shape)
    layers, physical = old.shape
    new = old.reshape(layers, hosts, gpus // hosts, physical // gpus).copy()

    def shuffle(rows):
        rows[:] = rows[random.sample(range(len(rows)), len(rows))]

    for layer in new:
        shuffle(layer)
        for host in layer:
            shuffle(host)
            for gpu in host:
                shuffle(gpu)
    turned = fit(new.reshape(old.shape), old, logical=loads.shape[1], hosts=hosts, gpus=gpus)
    assert moves(turned, old, hosts=hosts, gpus=gpus) == ()


def test_experts_that_change_places_take_one_copy_each():
    old = np.array([[0, 1, 2, 3]])
    new = np.array([[2, 1, 0, 3]])
    copies = moves(new, old, hosts=1, gpus=2)
    assert [(m.expert, m.from_place, m.to_place) for m in copies] == [(2, 2, 0), (0, 0, 2)]
    assert (exchange(old, copies) == new).all()


def test_a_copy_comes_from_as_near_as_can_be():
    # Two hosts of two GPUs of two places: expert 0 is on GPU 0 and GPU 2.
    old = np.array([[0, 1, 2, 3, 0, 4, 5, 1]])
    new = np.array([[0, 1, 2, 0, 0, 4, 5, 3]])
    copies = moves(new, old, hosts=2, gpus=4)
    assert [(m.expert, m.from_place, m.to_place) for m in copies] == [(0, 0, 3), (3, 3, 7)]
