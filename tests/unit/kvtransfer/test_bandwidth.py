"""Predictions of fetches: the prior, how fast it learns, how it forgets."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.bandwidth import (
    HALF_LIFE_SECONDS,
    MAX_PEERS,
    PRIOR_BYTES_PER_SECOND,
    PRIOR_LATENCY_SECONDS,
    Bandwidth,
)

MIB = 2**20


def prior(size: float) -> float:
    return PRIOR_LATENCY_SECONDS + size / PRIOR_BYTES_PER_SECOND


def test_before_the_first_fetch_there_is_the_prior():
    estimate = Bandwidth().estimate("a", MIB, 0.0)
    assert (estimate.seconds, estimate.basis) == (prior(MIB), "the prior")


@pytest.mark.parametrize(("latency", "rate"), [(0.001, 5e9), (0.05, 2e7), (0.2, 1e9), (1e-4, 1e10)])
def test_latency_and_rate_are_found(latency, rate):
    bandwidth = Bandwidth()
    sizes = [MIB // 4, MIB, 16 * MIB, 256 * MIB]
    for i in range(40):
        size = sizes[i % 4]
        bandwidth.observe("a", size, latency + size / rate, float(i) / 10)
    for size in (*sizes, 64 * MIB):
        found = bandwidth.estimate("a", size, 4.0)
        assert found.basis == "this peer"
        assert found.seconds == pytest.approx(latency + size / rate, rel=0.2, abs=0.001)


def test_one_measurement_counts_far_more_than_the_prior():
    slow = Bandwidth()
    slow.observe("a", MIB, 2.0, 0.0)
    assert slow.estimate("a", MIB, 0.0).seconds > 1.5
    fast = Bandwidth()
    fast.observe("a", 64 * MIB, 0.01, 0.0)
    assert fast.estimate("a", 64 * MIB, 0.0).seconds < 0.025


def test_a_peer_not_known_yet_is_as_others_are():
    bandwidth = Bandwidth()
    bandwidth.observe("a", MIB, 1.0, 0.0)
    other = bandwidth.estimate("b", MIB, 0.0)
    assert other.basis == "other peers"
    assert other.seconds > 0.5


def test_a_slow_peer_is_tried_again_in_time():
    bandwidth = Bandwidth()
    for i in range(10):
        bandwidth.observe("a", MIB, 2.0, float(i))
    seconds = [bandwidth.estimate("a", MIB, 9 + n * HALF_LIFE_SECONDS).seconds for n in range(20)]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > 1.5
    assert seconds[-1] < 2 * prior(MIB)


def test_peers_are_bounded_and_the_latest_stay():
    bandwidth = Bandwidth()
    for i in range(MAX_PEERS + 1):
        bandwidth.observe(str(i), MIB, 0.1, 0.0)
    assert bandwidth.estimate("0", MIB, 0.0).basis == "other peers"
    assert bandwidth.estimate(str(MAX_PEERS), MIB, 0.0).basis == "this peer"


@settings(deadline=None)
@given(
    points=st.lists(
        st.tuples(st.integers(0, 2**40), st.floats(0, 1e4), st.floats(0, 1e6)), max_size=30
    ),
    size=st.integers(0, 2**40),
    now=st.floats(0, 1e6),
)
def test_whatever_was_measured_a_prediction_is_a_time(points, size, now):
    bandwidth = Bandwidth()
    for at, (bytes_, seconds, later) in enumerate(points):
        bandwidth.observe("a", bytes_, seconds, at + later)
    found = bandwidth.estimate("a", size, now).seconds
    assert 0 <= found < 1e12
    assert bandwidth.estimate("a", 2 * size, now).seconds >= found * (1 - 1e-9)
