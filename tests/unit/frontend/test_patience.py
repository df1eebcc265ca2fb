"""When a worker is given up for its silence, and when it must not be."""

from __future__ import annotations

import math
import random

import pytest

from services.frontend.events import Role, Worker
from services.frontend.patience import (
    LEAST_ROUNDS,
    SLOWEST_PREFILL,
    Debt,
    Heard,
    K,
    Owed,
    Pace,
    Patience,
    Rhythm,
)

PATIENCE = Patience(silence_seconds=2.0, stall_seconds=30.0)
LEAST = 2.0 * LEAST_ROUNDS
W = Worker("w", "w:1")


def debt(owed: Owed = Owed.TOKEN, since: float = 100.0, tokens: int = 0, predicted: float = 0.0):
    return Debt(0, Role.DECODE, W, owed, since, tokens, predicted)


def given_up_at(debt: Debt, heard: Heard, *, answers: bool, awake_since: float = -math.inf):
    """Follows the verdicts as the frontend does; pings are answered at once, or never."""
    now, verdict = debt.since, None
    for _ in range(1000):
        verdict = PATIENCE.judge(debt, heard, awake_since, now)
        if verdict.silent:
            return now, verdict
        if verdict.ping:
            heard.pinged_at = now
            if answers:
                heard.at = now + 0.001
        assert verdict.again_at > now
        now = verdict.again_at
    return math.inf, verdict


def steady(seconds: float, until: float = 100.0) -> Heard:
    heard = Heard(at=until, moved_at=until)
    for i in range(50):
        heard.rhythm.note(seconds, until - (50 - i) * seconds)
    return heard


@pytest.mark.parametrize("owed", list(Owed))
def test_a_process_that_answers_nothing_is_found_in_silence_seconds(owed):
    at, verdict = given_up_at(debt(owed), Heard(), answers=False)
    assert at == pytest.approx(102.0, abs=0.05)
    assert verdict.unreachable
    assert "w owes" in verdict.silent


def test_it_is_pinged_before_it_is_given_up():
    heard = Heard()
    # Whoever looks late has not asked yet.
    verdict = PATIENCE.judge(debt(), heard, -math.inf, 110.0)
    assert verdict.ping
    assert not verdict.silent
    heard.pinged_at = 110.0
    assert not PATIENCE.judge(debt(), heard, -math.inf, 110.9).silent
    assert PATIENCE.judge(debt(), heard, -math.inf, 111.0).silent


@pytest.mark.parametrize(
    ("step", "bound"), [(0.02, LEAST), (0.8, 8.0), (2.0, 20.0), (10.0, 30.0), (None, 30.0)]
)
def test_an_engine_that_hangs_in_mid_stream_has_ten_times_its_rhythm(step, bound):
    heard = Heard(at=100.0, moved_at=100.0) if step is None else steady(step)
    at, verdict = given_up_at(debt(), heard, answers=True)
    assert at - 100.0 == pytest.approx(bound, rel=0.1)
    assert not verdict.unreachable
    assert "is there" in verdict.silent


def test_what_was_predicted_counts_before_anything_is_measured_and_where_it_is_longer():
    assert PATIENCE.bound(debt(predicted=1.2), Heard(), 100.0) == pytest.approx(12.0)
    assert PATIENCE.bound(debt(predicted=1.2), steady(0.02), 100.0) == pytest.approx(12.0)
    assert PATIENCE.bound(debt(predicted=0.01), steady(1.5), 100.0) == pytest.approx(15.0)
    assert PATIENCE.bound(debt(Owed.PROMPT, predicted=2.0), Heard(), 100.0) == pytest.approx(20.0)


def test_one_long_step_is_remembered_for_a_while():
    heard = steady(0.02)
    heard.rhythm.note(4.0, 100.0)
    assert PATIENCE.bound(debt(), heard, 101.0) == pytest.approx(20.0, rel=0.1)
    for i in range(3000):
        heard.rhythm.note(0.02, 100.0 + 0.02 * i)
    assert PATIENCE.bound(debt(), heard, 160.0) == pytest.approx(10.0, rel=0.1)
    assert PATIENCE.bound(debt(), heard, 400.0) == LEAST


def test_an_uneven_rhythm_is_given_more():
    dice = random.Random(1)
    even, uneven = Rhythm(), Rhythm()
    for i in range(500):
        even.note(0.5, 0.5 * i)
        uneven.note(dice.choice([0.1, 0.9]), 0.5 * i)
    assert uneven.expected(250.0) > 2.5 * even.expected(250.0)
    assert even.expected(250.0) == pytest.approx(0.5)
    assert Rhythm().expected(10.0) == 0.0


def test_prompts_are_known_by_what_was_computed_of_them():
    pace = Pace()
    assert pace.expected(10) == pace.expected(5000) == 0.0
    pace.note(0, 0.05)  # all of it was cached
    assert pace.expected(10) == pytest.approx(0.05)
    assert pace.expected(5000) == 0.0, "nothing is known of long ones yet"
    pace.note(1000, 2.0)
    assert pace.expected(5000) == pytest.approx(10.05)
    pace.note(1000, 0.5)  # it falls slowly...
    assert pace.expected(5000) > 9.0
    pace.note(1000, 4.0)  # ...and rises at once
    assert pace.expected(5000) == pytest.approx(20.05)


def test_a_long_prompt_that_nothing_is_known_of_has_the_time_that_it_may_take():
    bound = PATIENCE.bound(debt(Owed.PROMPT, tokens=100_000), Heard(), 100.0)
    assert bound == 30.0 + 100_000 / SLOWEST_PREFILL
    heard = Heard()
    heard.pace.note(2000, 1.0)
    assert PATIENCE.bound(debt(Owed.PROMPT, tokens=20_000), heard, 100.0) == pytest.approx(K * 10)
    assert PATIENCE.bound(debt(Owed.PROMPT, tokens=10), heard, 100.0) == LEAST


def test_taking_a_prompt_on_says_nothing_of_the_engine():
    """A hung engine whose process accepts new prompts all the time is found all the same."""
    heard = Heard(moved_at=100.0)
    heard.pace.note(200, 0.1)
    owed = debt(Owed.PROMPT, tokens=200)
    for i in range(49):
        heard.at = 100.0 + i * 0.1
        assert not PATIENCE.judge(owed, heard, -math.inf, heard.at).silent
    heard.at = 105.0
    assert PATIENCE.judge(owed, heard, -math.inf, 105.0).silent


def test_a_prompt_that_is_not_even_accepted_while_others_are_done():
    heard = Heard()
    owed = debt(Owed.ACCEPTANCE)
    heard.at = heard.moved_at = 104.9
    assert not PATIENCE.judge(owed, heard, -math.inf, 104.9).silent
    heard.at = heard.moved_at = 105.0
    assert PATIENCE.judge(owed, heard, -math.inf, 105.0).silent


def test_what_it_brings_for_others_shows_that_it_moves():
    heard = steady(0.02)
    for i in range(100):
        heard.at = heard.moved_at = 100.0 + i
        assert not PATIENCE.judge(debt(), heard, -math.inf, 100.5 + i).silent


def test_but_nobody_is_passed_over_for_ever():
    heard = steady(0.02)
    heard.at = heard.moved_at = 220.0
    verdict = PATIENCE.judge(debt(), heard, -math.inf, 220.0)
    assert "120.0 s" in verdict.silent
    assert not verdict.unreachable
    assert not PATIENCE.judge(debt(Owed.FIRST_TOKEN), heard, -math.inf, 220.0).silent


def test_time_in_which_this_process_slept_is_nobodys_silence():
    heard = steady(0.02)
    heard.pinged_at = 101.0
    assert PATIENCE.judge(debt(), heard, -math.inf, 160.0).silent
    assert not PATIENCE.judge(debt(), heard, 160.0, 160.0).silent
    heard = steady(0.02)
    at, _ = given_up_at(debt(since=100.0), heard, answers=False, awake_since=160.0)
    assert at == pytest.approx(162.0, abs=0.05)


def test_a_source_of_kv_only_has_to_be_there():
    at, _ = given_up_at(debt(Owed.KV), Heard(), answers=True)
    assert at == math.inf
    at, _ = given_up_at(debt(Owed.KV), Heard(), answers=False)
    assert at == pytest.approx(102.0, abs=0.05)


def test_a_first_token_may_wait_for_gigabytes():
    assert PATIENCE.bound(debt(Owed.FIRST_TOKEN), steady(0.02), 100.0) == 30.0


def test_stall_seconds_is_the_most_even_where_it_is_little():
    patience = Patience(silence_seconds=2.0, stall_seconds=0.2)
    for owed in (Owed.TOKEN, Owed.ACCEPTANCE, Owed.FIRST_TOKEN, Owed.PROMPT):
        assert patience.bound(debt(owed), steady(0.02), 100.0) == 0.2
