"""What a guide's mask does to a row: before all else, and without touching log-probabilities."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.api import Sampling
from services.engine.stepped.sampler import Occurrences, Row, choose

SIZE = 70


def mask(*tokens: int) -> np.ndarray:
    bits = np.zeros(96, dtype=np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def chosen(logits, sampling, allowed, forbidden=(), prompt=(), output=()):
    seen = Occurrences(prompt)
    seen.follow([*prompt, *output])
    row = Row(sampling, 3, seen, frozenset(forbidden), allowed)
    return choose(row, logits, int(logits.argmax()))


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    st.integers(0, 2**32),
    st.sets(st.integers(0, SIZE - 1), min_size=1, max_size=8),
    st.sampled_from([0.0, 0.7, 2.0]),
    st.sampled_from([0, 1, 5]),
    st.sampled_from([1.0, 0.3]),
    st.sampled_from([0.0, 0.9]),
    st.sampled_from([0.0, 2.0, -2.0]),
)
def test_only_what_is_allowed_is_chosen(seed, allowed, temperature, top_k, top_p, min_p, penalty):
    logits = np.random.default_rng(seed).normal(size=SIZE).astype(np.float32) * 9
    sampling = Sampling(temperature, top_k, top_p, min_p, 1.3, penalty, penalty, seed=seed)
    choice = chosen(logits, sampling, mask(*allowed), prompt=range(20), output=range(10, 40))
    assert choice.token in allowed


def test_filters_are_of_what_is_left():
    logits = np.zeros(SIZE, dtype=np.float32)
    logits[:60] = 50
    for sampling in (Sampling(top_k=1), Sampling(top_p=0.01), Sampling(min_p=0.5)):
        assert chosen(logits, sampling, mask(65)).token == 65


def test_all_allowed_is_no_guide():
    logits = np.random.default_rng(1).normal(size=SIZE).astype(np.float32)
    for seed in range(50):
        sampling = Sampling(seed=seed, top_p=0.8)
        assert chosen(logits, sampling, mask(*range(SIZE))) == chosen(logits, sampling, None)


def test_min_tokens_gives_way_where_nothing_else_is_left():
    logits = np.arange(SIZE, dtype=np.float32)
    greedy = Sampling(temperature=0.0)
    assert chosen(logits, greedy, mask(3, 60), forbidden={60}).token == 3
    assert chosen(logits, greedy, mask(60), forbidden={60}).token == 60
    assert chosen(logits, greedy, None, forbidden=set(range(SIZE))) is None


def test_nothing_allowed_is_no_choice():
    logits = np.arange(SIZE, dtype=np.float32)
    assert chosen(logits, Sampling(), mask()) is None
    logits[5] = -np.inf
    assert chosen(logits, Sampling(), mask(5)) is None


def test_a_mask_may_be_wider_than_the_logits():
    logits = np.arange(40, dtype=np.float32)
    assert chosen(logits, Sampling(temperature=0.0), mask(7, 80)).token == 7


def test_log_probabilities_are_of_the_raw_logits():
    logits = np.arange(SIZE, dtype=np.float32)
    sampling = Sampling(temperature=0.0, logprobs=2)
    free, held = chosen(logits, sampling, None), chosen(logits, sampling, mask(0))
    assert held.logprob.top == free.logprob.top
    assert held.logprob.logprob == pytest.approx(free.logprob.logprob - (SIZE - 1))
