"""The sampler against a slow, obvious one; its distribution; Philox against published words."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from services.engine.api import Sampling
from services.engine.stepped.philox import philox4x32, uniform
from services.engine.stepped.sampler import Occurrences, Row, greatest, sample


# Random123's known answers (kat_vectors, philox4x32 with 10 rounds).
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    assert philox4x32(counter, key) == words


def test_uniforms_differ_by_seed_and_position_in_all_their_bits():
    seen = {uniform(s, p) for s in (0, 1, 2**32, 2**63) for p in (0, 1, 2**32, 2**40)}
    assert len(seen) == 16
    assert all(0 <= u < 1 for u in seen)


def test_uniforms_are_uniform():
    values = np.array([uniform(7, p) for p in range(20_000)])
    counts, _ = np.histogram(values, bins=64, range=(0, 1))
    assert chi_square(counts, np.full(64, 1 / 64)) < 63 + 5 * math.sqrt(2 * 63)


def adjusted(logits, sampling, prompt, output, forbidden):
    """Penalties and forbidden tokens, one token at a time, in float32 as specified."""
    row = [np.float32(x) for x in logits]
    for token in set(prompt) | set(output):
        r = np.float32(sampling.repetition_penalty)
        row[token] = row[token] / r if row[token] > 0 else row[token] * r
    for token in set(output):
        count = np.float32(output.count(token))
        row[token] -= np.float32(sampling.presence_penalty) + count * np.float32(
            sampling.frequency_penalty
        )
    for token, bias in sampling.logit_bias:
        row[token] += np.float32(bias)
    for token in forbidden:
        row[token] = np.float32(-np.inf)
    return row


def reference(logits, sampling, prompt, output, forbidden, position):
    """(token, margin): margin is how near to a boundary, relative, any decision came."""
    row = adjusted(logits, sampling, prompt, output, forbidden)
    ids = list(range(len(row)))
    if sampling.temperature == 0:
        return max(ids, key=lambda i: (row[i], -i)), 1.0
    top = max(row)
    weight = {i: math.exp(float((row[i] - top) / np.float32(sampling.temperature))) for i in ids}
    by_weight = sorted(ids, key=lambda i: (-row[i], i))
    margin = 1.0
    if sampling.top_k:
        by_weight = by_weight[: sampling.top_k]
    mass, kept, reached = math.fsum(weight[i] for i in by_weight), [], 0.0
    for i in by_weight:
        kept.append(i)
        reached += weight[i] / mass
        if sampling.top_p < 1:
            margin = min(margin, abs(reached - sampling.top_p))
            if reached >= sampling.top_p:
                break
    if sampling.min_p:
        margin = min(margin, *(abs(weight[i] - sampling.min_p) for i in kept))
        kept = [i for i in kept if weight[i] >= sampling.min_p]
    u, mass, reached = uniform(sampling.seed, position), math.fsum(weight[i] for i in kept), 0.0
    for i in sorted(kept):
        reached += weight[i] / mass
        margin = min(margin, abs(reached - u)) if reached < 1 - 1e-9 else margin
        if reached > u:
            return i, margin
    return max(i for i in kept if weight[i] > 0), margin


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.1, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 30, 200]),
    top_p=st.sampled_from([1.0, 1.0, 0.05, 0.5, 0.9, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.5, 1.3, 10.0]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.5, -1.0]),
    seed=st.integers(0, 2**64 - 1),
    logit_bias=st.dictionaries(
        st.integers(0, 2), st.sampled_from([-100.0, -1.5, 0.25, 100.0]), max_size=3
    ).map(lambda bias: tuple(sorted(bias.items()))),
)


@settings(max_examples=600, deadline=None)
@given(data=st.data(), sampling=samplings, width=st.sampled_from([3, 40, 700]))
def test_it_chooses_as_the_reference_does(data, sampling, width):
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    scale = data.draw(st.sampled_from([0.0, 0.5, 3.0, 40.0]))
    logits = (generator.standard_normal(width) * scale).astype(np.float32)
    if data.draw(st.booleans()):
        logits = np.round(logits)  # ties
    tokens = st.lists(st.integers(0, width - 1), max_size=8)
    prompt, output = data.draw(tokens), data.draw(tokens)
    forbidden = frozenset(data.draw(st.sets(st.integers(0, width - 1), max_size=2)))
    position = len(prompt) + len(output)
    expected, margin = reference(logits, sampling, prompt, output, forbidden, position)
    assume(margin > 1e-5)  # nearer than that, float32 may fall on either side
    occurrences = Occurrences(prompt)
    occurrences.follow(prompt + output)
    (choice,) = sample(logits[None], [Row(sampling, position, occurrences, forbidden)])
    assert choice.token == expected


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(temperature=1.0), range(8)),
        (Sampling(temperature=0.5), range(8)),
        (Sampling(temperature=1.0, top_k=3), (0, 1, 2)),
        (Sampling(temperature=1.0, top_p=0.75), (0, 1, 2, 3)),
        (Sampling(temperature=1.0, min_p=0.2), (0, 1, 2)),
    ],
)
def test_tokens_come_as_often_as_they_should(sampling, kept):
    logits = np.log(0.5 ** np.arange(8)).astype(np.float32)
    if sampling.top_p < 1:
        logits = np.log(np.array([4, 3, 2, 2, 1, 1, 0.5, 0.5], dtype=np.float32))
    if sampling.min_p:
        logits = np.log(np.array([1, 0.5, 0.25, 0.19, 0.1, 0.1, 0.1, 0.1], dtype=np.float32))
    draws = 6000
    choices = sample(
        np.tile(logits, (draws, 1)),
        [Row(Sampling(**{**as_dict(sampling), "seed": 11}), p) for p in range(draws)],
    )
    counts = np.bincount([c.token for c in choices], minlength=8)
    probabilities = np.exp(logits.astype(np.float64) / sampling.temperature)
    outside = np.setdiff1d(np.arange(8), kept)
    assert counts[outside].sum() == 0
    probabilities[outside] = 0
    probabilities /= probabilities.sum()
    degrees = len(list(kept)) - 1
    limit = degrees + 5 * math.sqrt(2 * degrees)
    inside = np.array(list(kept))
    assert chi_square(counts[inside], probabilities[inside]) < limit
    # The test can fail: a temperature that is off by a tenth does not pass it.
    wrong = probabilities[inside] ** (1 / 1.2)
    assert chi_square(counts[inside], wrong / wrong.sum()) > limit


def test_a_row_does_not_depend_on_the_batch():
    generator = np.random.default_rng(5)
    logits = (generator.standard_normal((9, 5001)) * 3).astype(np.float32)
    kinds = [
        Sampling(seed=1),
        Sampling(seed=2, top_p=0.9),
        Sampling(temperature=0, logprobs=5),
        Sampling(seed=3, top_k=50, logprobs=0),
        Sampling(seed=4, min_p=0.02, repetition_penalty=1.2, logprobs=20),
    ]

    def row(i):
        seen = Occurrences(range(100))
        seen.follow([*range(100), 5, 5, 6])
        return Row(kinds[i % len(kinds)], i, seen)

    together = sample(logits, [row(i) for i in range(9)])
    for i in range(9):
        # Alone, and at another alignment in memory.
        shifted = np.empty(5001 + i + 1, dtype=np.float32)[i + 1 :]
        shifted[:] = logits[i]
        assert sample(shifted[None], [row(i)]) == [together[i]]
    backwards = sample(logits[::-1].copy(), [row(i) for i in reversed(range(9))])
    assert backwards == together[::-1]


@settings(deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=60), st.integers(1, 60))
@example([1.0] + [1e-30] * 20, 5)
@example([1.0] * 9, 4)
def test_the_k_greatest_go_by_value_then_id(values, k):
    values = np.array([*values, 1.0], dtype=np.float32)
    k = min(k, len(values))
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert greatest(values, k).tolist() == sorted(expected)


def test_logprobs_are_of_the_raw_logits():
    logits = np.array([[1.0, 3.0, 2.0, -1.0]], dtype=np.float32)
    exact = logits[0].astype(np.float64)
    exact -= np.log(np.exp(exact).sum())
    # Neither temperature nor filters nor penalties change what is reported.
    seen = Occurrences([1])
    seen.follow([1])
    sampling = Sampling(temperature=0.0, repetition_penalty=10.0, logprobs=2)
    (choice,) = sample(logits, [Row(sampling, 1, seen)])
    assert choice.token == 2
    assert choice.logprob.token_id == 2
    assert choice.logprob.logprob == pytest.approx(exact[2], abs=1e-6)
    assert [i for i, _ in choice.logprob.top] == [1, 2]
    assert choice.logprob.top[0][1] == pytest.approx(exact[1], abs=1e-6)


def test_logprobs_of_more_rivals_than_there_are_tokens():
    logits = np.array([[0.0, 1.0]], dtype=np.float32)
    (choice,) = sample(logits, [Row(Sampling(temperature=0, logprobs=20), 1)])
    assert [i for i, _ in choice.logprob.top] == [1, 0]


def test_a_row_without_numbers_gives_nothing_and_spoils_nobody():
    logits = np.zeros((3, 4), dtype=np.float32)
    logits[0, 2] = np.nan
    logits[1] = -np.inf
    rows = [Row(Sampling(temperature=0), 1)] * 3
    assert [c if c is None else c.token for c in sample(logits, rows)] == [None, None, 0]


def test_all_tokens_forbidden_gives_nothing():
    logits = np.zeros((1, 2), dtype=np.float32)
    assert sample(logits, [Row(Sampling(), 1, forbidden=frozenset({0, 1}))]) == [None]


def test_tokens_beyond_the_logits_are_passed_over():
    seen = Occurrences([9000])
    seen.follow([9000, 9001, 1])
    bias = ((1, -0.5), (9000, 100.0))
    sampling = Sampling(
        temperature=0, presence_penalty=2.0, repetition_penalty=2.0, logit_bias=bias
    )
    row = Row(sampling, 3, seen, frozenset({0, 9000}))
    (choice,) = sample(np.array([[5.0, 4.0, 1.0]], dtype=np.float32), [row])
    assert choice.token == 2


def test_penalties_follow_the_sequence():
    seen = Occurrences([1, 1, 1])
    tokens = [1, 1, 1]
    row = np.zeros(5, dtype=np.float32)
    for token in (2, 3, 2):
        tokens.append(token)
        seen.follow(tokens)
    seen.penalize(row, Sampling(frequency_penalty=0.5, presence_penalty=1.0))
    assert row.tolist() == [0.0, 0.0, -2.0, -1.5, 0.0]


def chi_square(counts, probabilities):
    expected = counts.sum() * probabilities
    return float((((counts - expected) ** 2) / expected).sum())


def as_dict(sampling):
    return {name: getattr(sampling, name) for name in Sampling.__slots__}
