"""Whole clusters in seeded weather; see cluster_world.py, which is also a command."""

import logging

import pytest

from tests.simulation.cluster_mutants import MUTANTS, OF_SATURATED, without
from tests.simulation.cluster_net import Counts
from tests.simulation.cluster_world import SATURATED_EVERY, play

SEEDS = 200
FOUND_WITHIN = 200


@pytest.fixture(scope="module")
def counts():
    total = Counts()
    for seed in range(SEEDS):
        total.add(play(seed).count)
    return total


def test_seeds(counts):
    assert counts["clusters"] + counts["saturated clusters"] == SEEDS


def test_a_seed_replays_exactly():
    for seed in (3, 77):
        assert play(seed, trace=True).trace == play(seed, trace=True).trace


def test_the_weather_is_rough_enough(counts):
    """What the simulation is for does happen in it."""
    for what in (
        *("workers killed", "workers drained", "workers slowed", "engines frozen"),
        *("coordinators killed", "frontends killed", "processes stalled", "partitions"),
        *("workers flapping", "streams broken", "messages lost", "messages doubled"),
        *("attempts failed: WORKER_LOST", "attempts failed: ENGINE_OVERLOADED"),
        *("attempts failed: KV_SOURCE_LOST", "given up as silent", "placed again"),
        *("refused: NO_WORKERS", "refused: OVERLOADED", "refused: SLO_UNATTAINABLE"),
        *("fetches failed", "leases expired", "roles changed", "requests handed back"),
        *("moments of fairness checked", "waits beyond patience", "drafts accepted"),
        *("requests finished", "requests cancelled", "requests failed: DEADLINE"),
    ):
        assert counts[what] >= 5, what
    assert counts["tokens checked"] > 10_000


@pytest.mark.parametrize("rule", MUTANTS)
def test_a_rule_that_is_missing_is_missed(rule):
    """The simulation finds it out, within a number of seeds that is run all the time."""
    seeds = range(FOUND_WITHIN)
    if rule in OF_SATURATED:
        seeds = range(SATURATED_EVERY - 1, FOUND_WITHIN, SATURATED_EVERY)
    logging.disable(logging.CRITICAL)
    try:
        with without(rule), pytest.raises((AssertionError, ValueError)):
            sum(play(seed).events for seed in seeds)
    finally:
        logging.disable(logging.NOTSET)
