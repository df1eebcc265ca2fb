"""Routing and experts' kernels against plain arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.torch.kernels import experts, route
from services.engine.torch.kernels.moe_steps import (
    ExpertSteps,
    ExpertWeights,
    Router,
    RouterWeights,
)
from services.engine.torch.shapes import MoeShape

HIDDEN = 48
DEEPSEEK = MoeShape(
    16, 3, 32, groups=4, kept_groups=2, sigmoid=True, normalized=True, factor=2.5, corrected=True
)
QWEN = MoeShape(16, 3, 32)
SHAPES = {
    "deepseek": DEEPSEEK,
    "deepseek, not normalized": MoeShape(16, 4, 32, sigmoid=True, factor=1.5, corrected=True),
    "softmax": QWEN,
    "softmax, normalized": MoeShape(18, 2, 32, normalized=True),
    "all of few": MoeShape(2, 2, 32, sigmoid=True),
}


def router_weights(shape, weight, bias):
    padded = torch.zeros(route.padded(shape.experts))
    padded[: shape.experts] = torch.from_numpy(bias)
    return RouterWeights(route.pack(torch.from_numpy(weight), None), padded)


def choose(shape, x, weights, threads=1):
    router = Router(shape, HIDDEN, x.dtype, threads)
    counts = np.zeros(shape.experts, np.int64)
    ids = router.choose(x, len(x), weights, counts).copy()
    assert np.array_equal(counts, np.bincount(ids.ravel(), minlength=shape.experts))
    return ids, router._weights[: len(x)].copy()


def expected(shape, x, weight, bias):
    """As DeepSeek-V3's report has it, in float64; of equal scores the lower index."""
    logits = x.double().numpy() @ weight.T.astype(np.float64)
    if shape.sigmoid:
        scores = 1 / (1 + np.exp(-logits))
    else:
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        scores = powers / powers.sum(-1, keepdims=True)
    choice = scores + bias
    if shape.groups > 1:
        grouped = choice.reshape(len(x), shape.groups, -1)
        best = np.sort(grouped, axis=-1)[..., -2:].sum(-1)
        order = np.argsort(-best, axis=-1, kind="stable")
        for row, dropped in enumerate(order[:, shape.kept_groups :]):
            grouped[row, dropped] = -np.inf
        choice = grouped.reshape(len(x), -1)
    ids = np.argsort(-choice, axis=-1, kind="stable")[:, : shape.choices]
    weights = np.take_along_axis(scores, ids, -1)
    if shape.normalized:
        weights /= weights.sum(-1, keepdims=True)
    return ids, weights * shape.factor


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chooses_and_weighs_as_published(name, dtype):
    shape = SHAPES[name]
    random = np.random.default_rng(3)
    x = torch.from_numpy(random.standard_normal((37, HIDDEN), np.float32)).to(dtype)
    weight = random.standard_normal((shape.experts, HIDDEN), np.float32) / HIDDEN**0.5
    bias = random.standard_normal(shape.experts).astype(np.float32) * 0.1 * shape.corrected
    ids, weights = choose(shape, x, router_weights(shape, weight, bias), threads=2)
    wanted_ids, wanted = expected(shape, x, weight, bias)
    assert np.array_equal(ids, wanted_ids)
    np.testing.assert_allclose(weights, wanted, rtol=2e-6)


def test_of_equal_scores_the_lower_index_wins_in_groups_too():
    weight = np.zeros((16, HIDDEN), np.float32)
    x = torch.ones((1, HIDDEN))
    weights = router_weights(DEEPSEEK, weight, np.zeros(16, np.float32))
    assert choose(DEEPSEEK, x, weights)[0].tolist() == [[0, 1, 2]]
    bias = np.zeros(16, np.float32)
    bias[[6, 13]] = 0.5
    weights = router_weights(DEEPSEEK, weight, bias)
    # Groups 1 (4..7) and 3 (12..15) are kept, and then all but the best are equal.
    assert choose(DEEPSEEK, x, weights)[0].tolist() == [[6, 13, 4]]


@pytest.mark.parametrize("shape", [DEEPSEEK, QWEN])
def test_what_is_not_a_number_still_chooses_experts_that_are_there(shape):
    x = torch.full((3, HIDDEN), float("nan"))
    weight = np.ones((16, HIDDEN), np.float32)
    ids, _ = choose(shape, x, router_weights(shape, weight, np.zeros(16, np.float32)))
    for row in ids:
        assert len(set(row.tolist())) == shape.choices
        assert row.min() >= 0
        assert row.max() < 16


@given(rows=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_row_is_routed_alike_in_any_company(rows, seed):
    random = np.random.default_rng(seed)
    x = torch.from_numpy(random.standard_normal((rows, HIDDEN), np.float32))
    weight = random.standard_normal((16, HIDDEN), np.float32)
    weights = router_weights(DEEPSEEK, weight, np.zeros(16, np.float32))
    ids, shares = choose(DEEPSEEK, x, weights)
    for row in range(rows):
        alone = choose(DEEPSEEK, x[row : row + 1].clone(), weights)
        assert np.array_equal(alone[0][0], ids[row])
        assert np.array_equal(alone[1][0], shares[row])


def expert_weights(random, places, hidden, wide, dtype):
    made = [
        [
            torch.from_numpy(random.standard_normal(s, np.float32) / s[1] ** 0.5).to(dtype)
            for s in ((wide, hidden), (wide, hidden), (hidden, wide))
        ]
        for _ in range(places)
    ]
    packed = ExpertWeights(
        torch.stack([experts.pack_gated(gate, up) for gate, up, _ in made]),
        torch.stack([experts.pack(down) for _, _, down in made]),
    )
    return made, packed


@pytest.mark.parametrize(("hidden", "wide"), [(64, 32), (48, 80), (112, 144)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applies_each_expert_to_the_rows_that_chose_it(hidden, wide, dtype):
    random = np.random.default_rng(1)
    made, packed = expert_weights(random, 5, hidden, wide, dtype)
    steps = ExpertSteps([packed], hidden, wide, dtype, threads=2)
    x = torch.from_numpy(random.standard_normal((90, hidden), np.float32)).to(dtype)
    # Place 3 is chosen by nobody, and some choices are elsewhere.
    ids = random.choice(np.array([-1, 0, 1, 2, 4], np.int32), (90, 3))
    outputs, where = steps(0, x, ids)
    assert len(outputs) == (ids >= 0).sum()
    assert np.array_equal(where < 0, ids < 0)
    assert sorted(where[where >= 0].tolist()) == list(range(len(outputs)))
    for row, choice in np.argwhere(ids >= 0):
        gate, up, down = (w.float() for w in made[ids[row, choice]])
        one = x[row].float()
        middle = (torch.nn.functional.silu(gate @ one) * (up @ one)).to(dtype).float()
        wanted = down @ middle
        error = (outputs[where[row, choice]].float() - wanted).abs().max()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2) * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_experts_bits_do_not_depend_on_its_rows_number_nor_on_its_place(dtype):
    random = np.random.default_rng(2)
    _, packed = expert_weights(random, 3, 64, 48, dtype)
    moved = ExpertWeights(packed.gate_up[[2, 0, 1]], packed.down[[2, 0, 1]])
    steps = ExpertSteps([packed, moved], 64, 48, dtype, threads=1)
    x = torch.from_numpy(random.standard_normal((11, 64), np.float32)).to(dtype)
    ids = random.integers(0, 3, (11, 2)).astype(np.int32)
    outputs, where = steps(0, x, ids)
    found = outputs[torch.from_numpy(where.astype(np.int64))].clone()
    for row in range(11):
        outputs, where = steps(1, x[row : row + 1], (ids[row : row + 1] + 1) % 3)
        assert torch.equal(outputs[torch.from_numpy(where[0].astype(np.int64))], found[row])


def test_adds_up_in_the_order_of_choices():
    router = Router(QWEN, HIDDEN, torch.float32, 1)
    random = np.random.default_rng(4)
    x = torch.from_numpy(random.standard_normal((6, HIDDEN), np.float32))
    weight = random.standard_normal((16, HIDDEN), np.float32)
    ids = router.choose(
        x, 6, router_weights(QWEN, weight, np.zeros(16, np.float32)), np.zeros(16, np.int64)
    )
    outputs = torch.from_numpy(random.standard_normal((18, HIDDEN), np.float32))
    where = np.arange(18, dtype=np.int32)[::-1].reshape(6, 3).copy()
    where[2, 1] = -1
    found = router.combine(outputs, where, x)[:6].numpy()
    shares = np.where(where < 0, 0, router._weights[:6])
    wanted = (outputs.numpy()[where] * shares[..., None]).sum(1) + x.numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    # Outputs in another order, where they are said to be: the same bits.
    other = outputs.flip(0).contiguous()
    again = router.combine(other, np.where(where < 0, -1, 17 - where).astype(np.int32), x)
    assert np.array_equal(again[:6].numpy(), found)
    assert ids.shape == (6, 3)
