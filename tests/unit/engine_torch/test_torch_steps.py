"""forward()'s contract: pieces, rare batches, refusals; and the start."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kvtransfer import codecs
from services.engine.torch.model import TorchModel
from tests.unit.engine_torch import torch_models
from tests.unit.engine_torch.torch_models import advance, batch, sequences


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return torch_models.write(tmp_path_factory.mktemp("model"), num_hidden_layers=5)


@pytest.fixture(scope="module")
def model(folder):
    return TorchModel.load(folder, block_tokens=8, threads=2, model_name="m")


@pytest.mark.parametrize(
    ("piece", "calls"),
    [
        (1, [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1)]),
        (2, [(0, 2), (2, 2), (4, 1)]),
        (5, [(0, 5)]),
        (8, [(0, 5)]),
    ],
)
def test_tells_of_layers_when_their_bytes_are_final(model, piece, calls):
    (sequence,) = sequences(model, [20])
    size = model.layout.layer_bytes
    seen = []

    def after_layers(first, layers):
        pool = model._pool[sequence.table]
        seen.append((first, layers, pool[:, first * size : (first + layers) * size].copy()))

    model.forward(batch([(sequence, 20)]), after_layers, piece)
    assert [(first, layers) for first, layers, _ in seen] == calls
    final = model._pool[sequence.table]
    for first, layers, copied in seen:
        assert np.array_equal(copied, final[:, first * size : (first + layers) * size])


def test_writes_its_own_tokens_and_nothing_else(model):
    (sequence,) = sequences(model, [21])
    advance(model, [(sequence, 10)])
    before = model._pool.copy()
    advance(model, [(sequence, 3)])
    changed = np.argwhere((model._pool != before).any(axis=1)).ravel()
    assert changed.tolist() == [sequence.table[1]]
    layout = model.layout
    for layer in range(layout.layers):
        for part in layout.components:
            width = part.nbytes(1)
            start = layer * layout.layer_bytes + layout.component_offset(part.name)
            rows = slice(start, start + part.nbytes(layout.block_tokens))
            shape = (layout.block_tokens, width)
            old = before[sequence.table[1], rows].reshape(shape)
            new = model._pool[sequence.table[1], rows].reshape(shape)
            assert np.argwhere((old != new).any(axis=1)).ravel().tolist() == [2, 3, 4]


def test_stores_fp8_as_the_reference_does(folder):
    """What fp8 holds is the codec's rounding of what a float32 pool holds (layer 0)."""
    exact = TorchModel.load(folder, kv_dtype="float32", block_tokens=8, threads=1)
    small = TorchModel.load(folder, kv_dtype="fp8_e4m3", block_tokens=8, threads=1)
    found = {}
    for model in (exact, small):
        (sequence,) = sequences(model, [8])
        advance(model, [(sequence, 8)])
        block = model._pool[sequence.table[0]]
        for part in model.layout.components:
            start = model.layout.component_offset(part.name)
            raw = block[start : start + part.nbytes(8)]
            found[model is small, part.name] = raw.reshape(8, part.heads, -1)
    for name in ("k", "v"):
        codes, scale = codecs.fp8_quantize(found[False, name].view(np.float32))
        assert np.array_equal(found[True, name], codes)
        assert np.array_equal(found[True, f"{name}_scale"].view(np.float32), scale)


def test_steps_without_logits_still_write(model):
    one, other = sequences(model, [30, 30])
    other.tokens = one.tokens
    silent = batch([(one, 29)])
    assert model.forward(dataclasses.replace(silent, logit_rows=silent.logit_rows[:0])).shape == (
        0,
        model.config.vocabulary,
    )
    one.done = 29
    advance(model, [(other, 29)])
    (first,), (second,) = advance(model, [(one, 1), (other, 1)])
    assert np.array_equal(first, second)


def test_logits_come_in_the_order_asked_for_and_may_repeat(model):
    (sequence,) = sequences(model, [12])
    step = batch([(sequence, 12)])
    every = model.forward(step)
    rows = np.array([11, 0, 11, 5] * 5, np.int32)
    assert np.array_equal(model.forward(dataclasses.replace(step, logit_rows=rows)), every[rows])


def test_the_pool_may_be_part_of_something_larger(model):
    (sequence,) = sequences(model, [30])
    (expected,) = advance(model, [(sequence, 30)])
    size = model.layout.block_bytes
    wide = np.zeros((len(model._pool), size + 192), np.uint8)
    model.bind(wide[:, 64 : 64 + size])
    sequence.done = 0
    (found,) = advance(model, [(sequence, 30)])
    assert np.array_equal(found, expected)
    assert not wide[:, :64].any()
    assert not wide[:, 64 + size :].any()


def test_refuses_bad_batches_and_leaves_the_pool(model):
    (sequence,) = sequences(model, [12])
    before = model._pool.copy()
    step = batch([(sequence, 12)])
    with pytest.raises(ValueError, match="token_ids"):
        model.forward(dataclasses.replace(step, token_ids=step.token_ids + 100000))
    assert np.array_equal(model._pool, before)


def test_needs_a_pool_that_fits(folder):
    model = TorchModel.load(folder, threads=1, batch_invariant=False)
    assert model.numerics == ""
    with pytest.raises(ValueError, match="bind"):
        model.forward(batch([(torch_models.Sequence(np.zeros(1, np.int32), np.zeros(1)), 1)]))
    with pytest.raises(ValueError, match="expected"):
        model.bind(np.zeros((4, model.layout.block_bytes + 1), np.uint8))
    model.bind(np.zeros((1, model.layout.block_bytes), np.uint8))


def test_without_invariance_numbers_are_as_good(folder, model):
    loose = TorchModel.load(folder, block_tokens=8, threads=2, batch_invariant=False)
    found = torch_models.whole(loose, 50)
    np.testing.assert_allclose(found, torch_models.whole(model, 50), rtol=0, atol=0.5)


def test_warm_up_leaves_the_pool_alone(model):
    sequences(model, [8])
    before = model._pool
    copied = before.copy()
    model.warm_up()
    assert model._pool is before
    assert np.array_equal(before, copied)
