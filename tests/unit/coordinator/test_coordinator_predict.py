"""Predictions against clusters whose true costs are known, and refusals that are never wrong."""

from __future__ import annotations

import statistics
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from services.coordinator.core.fits import PromptFit, StepFit, least_squares
from services.coordinator.core.lengths import ENOUGH, WINDOW_SECONDS, Fastest
from services.coordinator.core.median import Median
from services.coordinator.core.messages import (
    KvRate,
    RankStats,
    Reason,
    Role,
    WorkerInfo,
    WorkerStats,
)
from services.coordinator.core.paths import Path, Route, SinkRates, exposed, route
from services.coordinator.core.predict import (
    OPTIMISM,
    Forecast,
    Measured,
    Predictor,
    Prompt,
    unattainable,
)

KIND = ("m", "l", Role.BOTH)


def info(name="w", **more):
    fields = {"dp_ranks": 1, **more}
    return WorkerInfo(name, Role.BOTH, f"{name}:1", "m", "l", 16, 1000, 64, 8192, **fields)


def stats(running=0, kv_tokens=0, step=0.0, rate=0.0, **more):
    free = 1000 - -(-kv_tokens // 16)
    return WorkerStats(
        running=running,
        free_blocks=free,
        step_seconds=step,
        prefill_tokens_per_second=rate,
        **more,
    )


def true_step(requests, kv_tokens):
    return 0.008 + 0.0003 * requests + 4e-7 * kv_tokens


def busy(predictor, name="w", times=1.0, reports=300, at=0.0, seed=1):
    """A worker reports steps of many sizes."""
    draw = np.random.default_rng(seed)
    now = at
    for _ in range(reports):
        now += 0.1
        requests = int(draw.integers(1, 64))
        kv = 16 * int(draw.integers(requests, 900))
        report = stats(requests, kv, times * true_step(requests, kv), 1000.0)
        predictor.heard(info(name), KIND, report, now)
    return now


def test_a_step_that_brings_several_tokens_counts_for_each():
    """The same steps with drafts accepted: tokens come so much faster, and a prompt no sooner."""
    plain, drafting = Predictor(), Predictor()
    for report in range(1, 300):
        load = stats(1 + report % 40, 1600, true_step(1 + report % 40, 1600), 1000.0)
        more = replace(
            load, draft_tokens=20 * report, accepted_tokens=8 * report, decode_steps=10 * report
        )
        plain.heard(info(), KIND, load, 0.1 * report)
        drafting.heard(info(), KIND, more, 0.1 * report)
    itl = plain.itl_seconds("w", [(10, 1600)], 0, 100)
    assert drafting.itl_seconds("w", [(10, 1600)], 0, 100) == pytest.approx(itl / 1.8, rel=0.05)
    prompt = Prompt("w", 0, 1)
    assert drafting.prompt_seconds(prompt) == plain.prompt_seconds(prompt)


def test_counters_that_start_again_are_no_news():
    predictor = Predictor()
    for accepted, steps in ((10**9, 1), (5, 10), (5, 10), (10, 20)):
        load = stats(4, 160, 0.02, accepted_tokens=accepted, decode_steps=steps)
        predictor.heard(info(), KIND, load, 1.0)
    assert 0.02 / 9 <= predictor.itl_seconds("w", [(3, 160)], 0, 0) <= 0.021


# Prompts


def test_what_nobody_has_measured_is_not_predicted():
    predictor = Predictor()
    assert predictor.prompt_seconds(Prompt("w", 0, 100)) == 0.0
    predictor.heard(info(), KIND, stats(), 0.0)
    assert predictor.prompt_seconds(Prompt("w", 500, 100)) == 0.0
    assert predictor.itl_seconds("w", [(1, 100)], 0, 100) == 0.0
    assert predictor.step_cost("w") is None
    assert Forecast(queue_seconds=3.0).ttft_seconds == 0.0


def test_a_prompt_waits_for_the_queue_and_is_computed_at_its_workers_rate():
    predictor = Predictor()
    predictor.heard(info("fast"), KIND, stats(rate=2000.0), 0.0)
    predictor.heard(info("slow"), KIND, stats(rate=500.0), 0.0)
    assert predictor.prompt_seconds(Prompt("fast", 1000, 3000)) == pytest.approx(2.0)
    assert predictor.prompt_seconds(Prompt("slow", 1000, 3000)) == pytest.approx(8.0)


def test_a_worker_that_has_measured_nothing_is_taken_for_the_median_of_its_peers():
    predictor = Predictor()
    for number, rate in enumerate([800.0, 1000.0, 5000.0]):
        predictor.heard(info(f"w{number}"), KIND, stats(rate=rate), 0.0)
    predictor.heard(info("new"), KIND, stats(), 0.0)
    predictor.heard(info("else"), ("other", "l", Role.BOTH), stats(), 0.0)
    assert predictor.tokens_per_second("new") == pytest.approx(1000.0, rel=0.1)
    assert predictor.tokens_per_second("else") == 0.0


def test_a_first_token_does_not_come_sooner_than_a_step():
    predictor = Predictor()
    predictor.heard(info(), KIND, stats(4, 64, 0.5, 1000.0), 0.0)
    assert predictor.prompt_seconds(Prompt("w", 0, 10)) == 0.5
    assert predictor.prompt_seconds(Prompt("w", 0, 2000)) == pytest.approx(2.0)


def test_the_cost_of_length_is_learned_from_first_tokens():
    predictor, now = Predictor(), 0.0
    predictor.heard(info(), KIND, stats(rate=1000.0), now)
    for number in range(200):
        now += 0.5
        tokens = (200, 2000, 8000)[number % 3]
        prompt = Prompt("w", 0, tokens)
        true = tokens / 1000 * (0.8 + prompt.mean_context / 5000)
        forecast = Forecast(prompt, prompt_seconds=predictor.prompt_seconds(prompt))
        predictor.ended(forecast, true, tokens, now)
    for tokens in (500, 4000, 8000):
        prompt = Prompt("w", 0, tokens)
        true = tokens / 1000 * (0.8 + prompt.mean_context / 5000)
        assert predictor.prompt_seconds(prompt) == pytest.approx(true, rel=0.15)


def test_a_worker_that_is_late_with_first_tokens_is_predicted_to_be():
    predictor, now = Predictor(), 0.0
    for number in range(600):
        now += 0.1
        name = f"w{number % 4}"
        predictor.heard(info(name), KIND, stats(rate=1000.0), now)
        prompt = Prompt(name, 0, 1000)
        forecast = Forecast(prompt, prompt_seconds=predictor.prompt_seconds(prompt))
        predictor.ended(forecast, 3.0 if name == "w0" else 1.0, 1000, now)
    late, usual = (predictor.prompt_seconds(Prompt(n, 0, 1000)) for n in ("w0", "w1"))
    assert late == pytest.approx(3.0, rel=0.1)
    assert usual == pytest.approx(1.0, rel=0.1)


@given(st.floats(1e-3, 1e6), st.integers(0, 10**6), st.integers(0, 10**6))
def test_one_report_does_not_make_a_prediction_absurd(ttft, queued, computed):
    predictor = Predictor()
    predictor.heard(info(), KIND, stats(rate=1000.0), 0.0)
    prompt = Prompt("w", queued, 1000)
    before = predictor.prompt_seconds(prompt)
    predictor.ended(Forecast(prompt, prompt_seconds=before), ttft, computed, 1.0)
    assert before / 65 <= predictor.prompt_seconds(prompt) <= 65 * before


# Steps


def test_a_step_is_fitted_over_batch_and_kv():
    predictor = Predictor()
    busy(predictor)
    cost = predictor.step_cost("w")
    assert (cost.base, cost.request, cost.kv_token) == (
        pytest.approx(0.008, rel=0.05),
        pytest.approx(0.0003, rel=0.05),
        pytest.approx(4e-7, rel=0.1),
    )
    predicted = predictor.itl_seconds("w", [(10, 4000)], 0, 1000)
    assert predicted == pytest.approx(true_step(11, 5000), rel=0.05)


def test_with_one_size_of_batch_the_measured_step_is_predicted():
    predictor = Predictor()
    for number in range(100):
        predictor.heard(info(), KIND, stats(16, 8000, 0.05), number / 10)
    assert predictor.itl_seconds("w", [(15, 7500)], 0, 500) == pytest.approx(0.05, rel=0.02)
    assert predictor.step_cost("w").request > 0, "more requests never make steps shorter"


def test_a_slow_worker_learns_slopes_from_its_peers():
    predictor = Predictor()
    for number in range(4):
        now = busy(predictor, f"w{number}", seed=number)
    for number in range(100):
        report = stats(16, 8000, 2 * true_step(16, 8000))
        measured = predictor.heard(info("slow"), KIND, report, now + number / 10)
    assert measured.steps == pytest.approx(2.0, rel=0.1)
    predicted = predictor.itl_seconds("slow", [(40, 9000)], 0, 1000)
    assert predicted == pytest.approx(2 * true_step(41, 10_000), rel=0.15)


def test_the_slowest_rank_counts():
    predictor = Predictor()
    two = info("two", dp_ranks=2)
    for number in range(200):
        heavy = 1 + number % 40
        ranks = (RankStats(1, 0, 0, 100), RankStats(heavy, 0, 0, 200 * heavy))
        slowest = max(true_step(1, 100), true_step(heavy, 200 * heavy))
        report = stats(heavy + 1, 0, slowest, ranks=ranks)
        predictor.heard(two, KIND, report, number / 10)
    loads = [(30, 6000), (2, 400)]
    on_the_light_one = predictor.itl_seconds("two", loads, 1, 200)
    assert on_the_light_one == pytest.approx(true_step(30, 6000), rel=0.05)
    assert predictor.itl_seconds("two", loads, 0, 200) > on_the_light_one


@given(
    st.lists(
        st.tuples(st.integers(1, 64), st.integers(0, 900), st.floats(1e-4, 10.0)),
        min_size=1,
        max_size=40,
    )
)
def test_no_part_of_a_step_is_ever_negative(reports):
    fit = StepFit()
    for number, (requests, blocks, seconds) in enumerate(reports):
        fit.add(requests, 16 * blocks, seconds, number / 2)
        cost = fit.cost
        assert min(cost.base, cost.request, cost.kv_token) >= 0
        assert cost.seconds(64, 16 * 900) > 0


@given(st.integers(1, 3), st.integers(0, 10**6))
def test_least_squares_are_the_least_without_negative_ones(size, seed):
    draw = np.random.default_rng(seed)
    points = draw.normal(size=(6, size))
    wanted = draw.normal(size=6)
    matrix, vector = points.T @ points, points.T @ wanted
    found = np.array(least_squares(matrix.tolist(), vector.tolist()))
    assert found.min() >= 0
    # Karush, Kuhn and Tucker: no slope where it is free, and none that leads inside where it is 0.
    slope = matrix @ found - vector
    assert slope.min() > -1e-6
    assert abs(slope @ found) < 1e-6


def test_old_reports_fade():
    fit = PromptFit()
    for number in range(200):
        fit.add(1000, 5.0, number)
    assert fit.factor(1000) == pytest.approx(5.0, rel=0.05)
    fit.add(1000, 1.0, 10_000)
    assert fit.factor(1000) < 1.1


# Paths


def test_kv_goes_by_the_first_transport_that_both_have_and_that_works_here():
    here = info("a", host="h1", region="eu", kv_transports=("shm", "nixl", "tcp"))
    same_host = info("b", host="h1", region="eu", kv_transports=("tcp", "shm"))
    elsewhere = info("c", host="h2", region="eu", kv_transports=("shm", "tcp"))
    rdma = replace(elsewhere, kv_transports=("nixl", "tcp"))
    assert route(here, same_host) == Route(Path.HOST, "shm")
    assert route(here, elsewhere) == Route(Path.TCP, "tcp")
    assert route(here, rdma) == Route(Path.RDMA, "nixl")
    linked = replace(here, nvlink_domain="rack")
    assert route(linked, replace(rdma, nvlink_domain="rack")).path is Path.NVLINK
    assert route(here, replace(rdma, region="us")).path is Path.FAR
    assert route(info("a"), info("b")) == Route(Path.TCP, "")


def test_a_transfer_takes_what_transfers_took():
    rates = SinkRates()
    by = Route(Path.RDMA, "nixl")
    assert rates.seconds(0, by) == 0.0
    assert rates.seconds(50 * 10**9, by) == pytest.approx(1.0, rel=0.01), "nominal"
    rates.report((KvRate("nixl", 10**9, 1.0), KvRate("tcp", 10**9, 5.0)))
    assert rates.seconds(10**9, by) == pytest.approx(1.0, rel=0.01)
    for number in range(2, 60):
        rates.report((KvRate("nixl", number * 10**9, 1.0 + 2.0 * (number - 1)),))
    assert rates.seconds(10**9, by) == pytest.approx(2.0, rel=0.02), "by now half as fast"
    for number in range(1, 50):
        rates.report((KvRate("nixl", 59 * 10**9 + number * 1000, 117.0 + number),))
    assert rates.seconds(10**9, by) == pytest.approx(2.0, rel=0.02), "so few bytes say nothing"
    rates.report((KvRate("nixl", 10**9, 2.0),))
    assert rates.seconds(10**9, by) == pytest.approx(2.0, rel=0.02), "a restart is no transfer back"


def test_only_what_the_prefill_does_not_hide_of_a_transfer_counts():
    assert exposed(2.0, 1.5, 0.0) == pytest.approx(0.5)
    assert exposed(2.0, 5.0, 0.25) == pytest.approx(0.5), "the last part can't begin before"
    assert exposed(0.0, 5.0, 1.0) == 0.0


# Refusals


def test_a_refusal_says_what_was_expected_and_when_to_return():
    least = Forecast(queue_seconds=6.0, prompt_seconds=0.5)
    refused = unattainable(least, 1.0, 0.0, None, 5.0)
    assert refused.reason is Reason.SLO_UNATTAINABLE
    assert refused.message == (
        "the first token is expected in 6.5 s (6 s in the queue, 0.5 s for the prompt), "
        "not within 1 s"
    )
    assert refused.retry_seconds == pytest.approx(5.5)
    assert refused.metadata == {"limit": "ttft_seconds", "predicted": "6.5", "asked": "1"}
    refused = unattainable(least, 0.0, 0.0, 2.0, 5.0)
    assert refused.reason is Reason.DEADLINE, "nobody asked for a service level"
    assert refused.message.startswith(
        "the deadline can't be met: of the request's time 2 s are left, and the first token"
    )
    refused = unattainable(Forecast(itl_seconds=0.1), 0.0, 0.02, None, 5.0)
    assert refused.message == "tokens are expected 100 ms apart at best, not within 20 ms"
    assert refused.retry_seconds == 5.0
    never = unattainable(Forecast(prompt_seconds=9.0), 1.0, 0.0, None, 5.0)
    assert never.retry_seconds == 30.0


def test_nothing_is_refused_for_want_of_measurements():
    assert unattainable(Forecast(), 1e-6, 1e-6, 1e-6, 1.0) is None
    assert unattainable(Forecast(queue_seconds=9.0), 0.0, 0.0, None, 1.0) is None


@given(
    st.lists(st.tuples(st.integers(64, 20_000), st.floats(1.0, 4.0)), min_size=ENOUGH, max_size=60),
    st.integers(1, 20_000),
    st.floats(0.0, 0.05),
    st.floats(1e-6, 1e-3),
    st.floats(1e-10, 1e-7),
    st.floats(1 / OPTIMISM, 1.0),
    st.floats(0.001, 30.0),
)
def test_what_can_be_met_is_never_refused(seen, tokens, base, linear, square, faster, limit):
    """Prompts take base + linear n + square n^2 at best, and up to four times that.

    The request will be served at best, and the cluster may have become faster by OPTIMISM since.
    """

    def at_best(n):
        return base + linear * n + square * n * n

    predictor = Predictor()
    predictor.heard(info(), KIND, stats(rate=100.0), 0.0)
    for number, (n, times) in enumerate(seen):
        predictor.ended(Forecast(Prompt("w", 0, n)), times * at_best(n), n, float(number))
    will_take = faster * at_best(tokens)
    assume(will_take <= limit)
    assert unattainable(predictor.floor(KIND, tokens), limit, 0.0, limit, 1.0) is None


def test_what_can_not_be_met_is_refused_once_enough_was_seen():
    predictor = Predictor()
    predictor.heard(info(), KIND, stats(rate=1000.0), 0.0)
    assert predictor.floor(KIND, 4000).known_seconds == 0.0
    for number in range(ENOUGH):
        prompt = Prompt("w", 0, 2000)
        predictor.ended(Forecast(prompt), 2.0 + number / 10, 2000, number)
    assert predictor.floor(KIND, 4000).known_seconds == 2.0
    assert predictor.floor(KIND, 2000).known_seconds == 0.0, "not of its own length"
    assert unattainable(predictor.floor(KIND, 4000), 0.9, 0.0, None, 1.0) is not None
    assert unattainable(predictor.floor(KIND, 4000), 1.1, 0.0, None, 1.0) is None


def test_an_itl_that_nobody_has_alone_on_a_worker_is_refused():
    predictor = Predictor()
    for number in range(ENOUGH):
        predictor.heard(info(), KIND, stats(8, 4000, 0.2), number)
    assert predictor.floor(KIND, 100).itl_seconds == 0.0, "of a batch, which may be smaller"
    for number in range(ENOUGH):
        predictor.heard(info(), KIND, stats(1, 400, 0.05 + number / 1e3), number)
    best = predictor.floor(KIND, 100)
    assert best.itl_seconds == 0.05
    assert unattainable(best, 0.0, 0.026, None, 1.0) is None
    assert unattainable(best, 0.0, 0.024, None, 1.0) is not None


def test_a_longer_prompt_that_was_faster_shows_what_is_possible():
    fastest = Fastest(0.0)
    for number in range(ENOUGH):
        fastest.add(1000, 5.0, number)
    assert fastest.least(2000) == 5.0
    fastest.add(8000, 1.0, 10.0)
    assert fastest.least(2000) == 1.0, "those of 1000 were held up"


def test_the_fastest_is_forgotten_after_a_while():
    fastest = Fastest(0.0)
    for number in range(ENOUGH):
        fastest.add(1000, 0.1, number)
    assert fastest.least(2000) == pytest.approx(0.1)
    for number in range(ENOUGH):
        fastest.add(1000, 5.0, 1.5 * WINDOW_SECONDS + number)
    assert fastest.least(2000) == pytest.approx(0.1), "of the window before"
    for number in range(ENOUGH):
        fastest.add(1000, 5.0, 2.6 * WINDOW_SECONDS + number)
    assert fastest.least(2000) == pytest.approx(5.0)


# Workers come and go


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["heard", "heard", "forget"]),
            st.sampled_from("abc"),
            st.sampled_from([KIND, ("m", "l", Role.PREFILL)]),
            st.sampled_from([0.0, 10.0, 1000.0]),
        ),
        max_size=40,
    )
)
def test_nothing_is_kept_of_workers_that_left_or_changed_their_role(steps):
    predictor, there = Predictor(), {}
    for number, (what, name, kind, rate) in enumerate(steps):
        if what == "heard":
            predictor.heard(info(name), kind, stats(rate=rate), number)
            there[name] = (kind, rate)
        else:
            predictor.forget(name)
            there.pop(name, None)
        assert set(predictor._kinds) == {k for k, _ in there.values()}
        for key, of in predictor._kinds.items():
            rates = [r for k, r in there.values() if k == key and r]
            assert len(of.rates) == len(rates)
            expected = statistics.median_low(rates) if rates else 0.0
            assert of.rates.value() == pytest.approx(expected, rel=0.1)


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(1e-9, 1e9)), max_size=80))
def test_a_median_is_the_median_within_its_steps(changes):
    median, figures = Median(), {}
    for name, figure in changes:
        median.replace(figures.get(name, 0.0), figure)
        figures[name] = figure
        expected = statistics.median_low(figures.values())
        assert median.value() == pytest.approx(expected, rel=0.05)
        assert len(median) == len(figures)
    for figure in figures.values():
        median.replace(figure, 0.0)
    assert median.value() == 0.0


def test_a_measured_worker_is_told_how_it_does():
    predictor = Predictor()
    assert predictor.heard(info(), KIND, stats(), 0.0) == Measured()
