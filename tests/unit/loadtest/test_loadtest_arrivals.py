"""Arrivals: their statistics, that seeds repeat them, that traces keep their shape."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest import arrivals


@pytest.mark.parametrize("rate", [0.2, 3.0, 250.0])
def test_poisson_gaps_are_exponential(rate):
    times = np.array(list(islice(arrivals.poisson(rate, seed=7), 40_000)))
    gaps = np.diff(times, prepend=0.0)
    assert gaps.min() > 0
    # Exponential: mean 1/rate, deviation equal to the mean, median ln 2 / rate; 5 standard errors.
    bound = 5 / np.sqrt(len(gaps))
    assert gaps.mean() * rate == pytest.approx(1, rel=bound)
    assert gaps.std() * rate == pytest.approx(1, rel=2 * bound)
    assert np.median(gaps) * rate == pytest.approx(np.log(2), rel=2 * bound)
    # Memoryless: one gap says nothing of the next.
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < bound


def test_poisson_counts_have_poisson_spread():
    """In windows of one second at rate 20: mean 20, variance 20."""
    times = np.array(list(islice(arrivals.poisson(20.0, seed=1), 40_000)))
    counts = np.histogram(times, np.arange(0, 1900))[0]
    assert counts.mean() == pytest.approx(20, rel=0.03)
    assert counts.var() == pytest.approx(20, rel=0.15)


@given(st.integers(0, 2**63 - 1), st.floats(1e-3, 1e4))
def test_a_seed_repeats_its_arrivals(seed, rate):
    first = list(islice(arrivals.poisson(rate, seed), 50))
    assert first == list(islice(arrivals.poisson(rate, seed), 50))
    assert first != list(islice(arrivals.poisson(rate, seed + 1), 50))
    assert first == sorted(first)


def test_constant_has_no_drift():
    assert list(islice(arrivals.constant(3.0), 30_001))[-1] == 10_000.0


offsets = st.lists(st.floats(0, 1e5), min_size=1, max_size=60).map(sorted)


@given(offsets, st.floats(0.1, 100), st.floats(0, 10), st.integers(0, 1000))
def test_replay_moves_each_record_less_than_the_jitter(times, speed, jitter, seed):
    replayed, order = arrivals.replay(times, speed=speed, jitter_seconds=jitter, seed=seed)
    assert sorted(order) == list(range(len(times)))
    assert replayed == sorted(replayed)
    assert replayed[0] == 0
    # All moved by the same origin, and each by less than the jitter more than any other.
    moved = [at * speed - times[i] for at, i in zip(replayed, order, strict=True)]
    assert max(moved) - min(moved) <= jitter + 1e-6 * (1 + max(times))


def test_replay_without_jitter_keeps_the_distances():
    replayed, order = arrivals.replay([5.0, 5.0, 6.0, 9.0], speed=2.0)
    assert replayed == [0.0, 0.0, 0.5, 2.0]
    assert order == [0, 1, 2, 3]


def test_jitter_fills_a_coarse_grid():
    grid = np.repeat(np.arange(0, 300, 3.0), 20)
    replayed, _ = arrivals.replay(grid.tolist(), jitter_seconds=3.0, seed=3)
    assert len(set(replayed)) == len(grid)
    assert max(np.diff(replayed)) < 1.5


def test_think_times_have_their_mean_and_differ_between_users():
    one, other = (list(islice(arrivals.think_time(0.5, 9, user), 20_000)) for user in (0, 1))
    assert np.mean(one) == pytest.approx(0.5, rel=0.04)
    assert one != other
    assert list(islice(arrivals.think_time(0.0, 9, 0), 3)) == [0.0, 0.0, 0.0]
