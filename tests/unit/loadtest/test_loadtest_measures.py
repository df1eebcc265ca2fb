"""Numbers from outcomes: against numpy, and against arithmetic done by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest import measures
from loadtest.measures import Slo
from loadtest.outcome import INTERRUPTED, UNFINISHED, Outcome, Progress, Served


def served(**more):
    fields = {
        "completion_tokens": 3,
        "cached_tokens": 0,
        "attempts": 1,
        "local_prefill": False,
        "kv_bytes": {},
        "kv_seconds": 0.0,
        "kv_exposed_seconds": 0.0,
    }
    return Served(**fields | more)


def outcome(index=0, intended=10.0, sent=10.0, arrivals=(), ended=None, **more):
    last = arrivals[-1][0] if arrivals else sent
    end = last if ended is None else ended
    return Outcome(index, intended, sent, end, 8, tuple(arrivals), **more)


def test_latencies_count_from_the_intended_start():
    one = outcome(intended=10.0, sent=10.5, arrivals=[(11.0, 1), (11.2, 1), (11.8, 1)], ended=12.0)
    assert one.lateness == 0.5
    assert one.ttft == 1.0
    assert one.gaps == pytest.approx([0.2, 0.6])
    assert one.tpot == pytest.approx(0.4)
    assert one.e2e == 2.0


def test_tokens_that_come_together_share_a_gap_and_tpot_counts_each():
    one = outcome(arrivals=[(11.0, 2), (11.6, 3)])
    assert one.gaps == pytest.approx([0.6])
    assert one.tpot == pytest.approx(0.2)
    assert one.output_tokens == 5


def test_one_message_has_no_gap_and_no_tpot():
    one = outcome(arrivals=[(11.0, 4)])
    assert one.gaps == []
    assert one.tpot is None


def test_a_request_that_brought_nothing():
    one = outcome(reason="OVERLOADED")
    assert (one.ttft, one.tpot, one.gaps, one.output_tokens) == (None, None, [], 0)


def test_a_request_cut_off_before_it_was_sent_is_not_late_by_its_clock():
    progress = Progress(3, 10.0, 8)
    cut = progress.end(12.0, UNFINISHED)
    assert cut.sent == 12.0
    assert cut.e2e == 2.0


samples = st.lists(st.floats(0, 1e6, allow_nan=False), min_size=1, max_size=300)


@given(samples)
def test_percentiles_are_numpys(values):
    found = measures.distribution(values)
    assert found.count == len(values)
    assert found.mean == pytest.approx(np.mean(values))
    expected = np.percentile(values, [50, 90, 95, 99])
    assert [found.p50, found.p90, found.p95, found.p99] == pytest.approx(expected.tolist())
    assert found.max == max(values)
    assert found.curve[0] == min(values)
    assert found.curve[-1] == max(values)
    assert found.curve[100] == pytest.approx(found.p50)
    assert len(found.curve) == 201


def test_no_samples_are_no_distribution():
    assert measures.distribution([]) is None


SLO = Slo(ttft_seconds=1.0, tpot_seconds=0.1)


@pytest.mark.parametrize(
    ("one", "met"),
    [
        (outcome(arrivals=[(11.0, 1), (11.1, 1)]), True),
        (outcome(arrivals=[(11.001, 1), (11.1, 1)]), False),
        (outcome(arrivals=[(10.5, 1), (10.7, 1)]), False),
        (outcome(arrivals=[(10.5, 1)]), True),
        (outcome(arrivals=[(10.5, 1)], reason="WORKER_LOST"), False),
        (outcome(reason="OVERLOADED"), False),
        (outcome(), False),
    ],
)
def test_the_slo_is_met_up_to_its_bound(one, met):
    # 11.1 - 11.0 is a little over 0.1 in floating point; bounds in tests are a little wider.
    assert Slo(1.0, 0.1 + 1e-9).met_by(one) is met


def test_a_bound_that_is_not_given_does_not_matter():
    slow = outcome(arrivals=[(99.0, 1), (199.0, 1)])
    assert Slo().met_by(slow)
    assert not Slo(tpot_seconds=1.0).met_by(slow)


def test_goodput_counts_errors_as_missed_and_interruptions_not_at_all():
    fast = [outcome(i, arrivals=[(10.5, 1)]) for i in range(3)]
    slow = [outcome(3, arrivals=[(20.0, 1)])]
    failed = [outcome(4, reason="OVERLOADED")]
    cut = [outcome(5, reason=INTERRUPTED)]
    found = measures.goodput(fast + slow + failed + cut, SLO, seconds=6.0)
    assert found.met == 3
    assert found.share == 3 / 5
    assert found.per_second == 0.5


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0, 0.3), st.booleans()), max_size=30))
def test_goodput_is_between_nothing_and_throughput(drawn):
    outcomes = [
        outcome(i, arrivals=[(10 + t, 1), (10 + t + g, 1)], reason="" if ok else "X")
        for i, (t, g, ok) in enumerate(drawn)
    ]
    numbers = measures.numbers(outcomes, 10.0, SLO)
    assert 0 <= numbers.goodput.per_second <= numbers.throughput.requests_per_second
    assert 0 <= numbers.goodput.share <= 1
    looser = measures.goodput(outcomes, Slo(2.0, 0.2), numbers.throughput.seconds)
    assert looser.met >= numbers.goodput.met


def test_all_numbers_of_a_small_run_by_hand():
    outcomes = [
        outcome(0, 10.0, 10.1, [(11.0, 1), (11.5, 1), (12.0, 1)], 12.0,
                served=served(cached_tokens=4, kv_bytes={"shm": 100}, kv_exposed_seconds=0.01)),
        outcome(1, 11.0, 11.0, [(11.5, 1), (14.0, 2)], 14.0,
                served=served(attempts=2, kv_bytes={"shm": 50, "tcp": 7}, lost_fetches=2)),
        outcome(2, 12.0, 12.0, [(13.0, 1)], 15.0, reason="WORKER_LOST"),
        outcome(3, 13.0, 13.0, ended=13.0, reason="OVERLOADED"),
        outcome(4, 13.0, 13.0, ended=13.0, reason="OVERLOADED"),
        outcome(5, 14.0, 14.0, [(14.5, 1)], ended=20.0, reason=INTERRUPTED),
        outcome(6, 14.0, 14.0, [(15.0, 3)], 15.0, served=served(local_prefill=True)),
    ]  # fmt: skip
    found = measures.numbers(outcomes, 10.0, None)
    counts = found.counts
    assert (counts.ended, counts.succeeded, counts.interrupted) == (6, 3, 1)
    assert counts.errors == {"OVERLOADED": 2, "WORKER_LOST": 1}
    assert (counts.input_tokens, counts.output_tokens, counts.cached_tokens) == (24, 9, 4)
    assert counts.tokens_per_message == pytest.approx(9 / 6)
    assert (counts.replaced, counts.local_prefills, counts.lost_fetches) == (1, 1, 2)
    assert found.throughput.seconds == 10.0
    assert found.throughput.requests_per_second == pytest.approx(0.3)
    assert found.throughput.output_tokens_per_second == pytest.approx(0.9)
    assert found.throughput.input_tokens_per_second == pytest.approx(2.4)
    assert found.ttft.mean == pytest.approx((1.0 + 0.5 + 1.0) / 3)
    assert found.itl.count == 3
    assert found.itl.max == 2.5
    assert found.tpot.count == 2
    assert found.lateness.count == 7
    assert found.kv.bytes_by_transport == {"shm": 150, "tcp": 7}
    assert found.kv.exposed.count == 2
    assert found.goodput is None


@given(
    st.lists(
        st.lists(st.tuples(st.floats(0, 50), st.integers(1, 4)), max_size=6).map(sorted),
        max_size=20,
    )
)
def test_the_timeline_loses_nothing(drawn):
    outcomes = [
        outcome(i, arrivals=[(10 + t, n) for t, n in arrivals], reason="" if i % 3 else "X")
        for i, arrivals in enumerate(drawn)
    ]
    found = measures.numbers(outcomes, 10.0, None)
    line = found.timeline
    tokens = sum(line.output_tokens_per_second) * line.bin_seconds
    if found.throughput.seconds > 0:
        assert tokens == pytest.approx(sum(o.output_tokens for o in outcomes))
        ends = sum(line.requests_per_second) * line.bin_seconds
        assert ends == pytest.approx(found.counts.succeeded)


def test_a_run_without_any_request():
    found = measures.numbers([], 10.0, SLO)
    assert found.ttft is None
    assert found.goodput.share == 0
    assert found.throughput.requests_per_second == 0
    assert found.timeline.output_tokens_per_second == ()
