"""Int4 weights: codes, both products, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from services.engine.models.errors import UnsupportedModelError
from services.engine.torch import engine
from services.engine.torch.kernels.int4 import FEW_ROWS, GROUP, Int4Linear, dequantize, quantize
from services.runtime.load import SettingsError
from services.runtime.settings import EngineSettings, ModelSettings


def drawn(*shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return torch.from_numpy(values)


def test_numbers_on_the_grid_of_q4_1_keep_their_codes():
    """value = code * d + m with half-precision d and m, as GGUF has them, stored as bfloat16."""
    random = np.random.default_rng(1)
    codes = torch.from_numpy(random.integers(0, 16, (48, 4, GROUP)).astype(np.int32))
    codes[..., 0], codes[..., 1] = 0, 15  # a block's least and greatest
    d = (drawn(48, 4, 1, seed=2).abs() * 0.02 + 1e-3).half().float()
    m = (-8 * d + 0.01 * drawn(48, 4, 1, seed=3)).half().float()
    weight = (codes * d + m).to(torch.bfloat16).reshape(48, 4 * GROUP)
    found, scale, offset = quantize(weight)
    assert torch.equal(found, codes.reshape(48, -1))
    torch.testing.assert_close(scale.float(), d.squeeze(-1), rtol=0.02, atol=0)
    torch.testing.assert_close(offset.float(), m.squeeze(-1), rtol=0.01, atol=1e-3)


def test_no_number_moves_further_than_half_a_step():
    weight = drawn(32, 96).to(torch.bfloat16)
    weight[3, :GROUP] = 0.25  # all alike
    found = dequantize(*quantize(weight)).float()
    groups = weight.float().reshape(32, 3, GROUP)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    error = (found.reshape(32, 3, GROUP) - groups).abs().amax(-1)
    # Beside half a step: rounding of scale, offset and result to bfloat16.
    assert (error <= 0.5 * step + groups.abs().amax(-1) / 64).all()
    assert torch.equal(found[3, :GROUP], weight[3, :GROUP].float())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 40])
def test_both_products_compute_the_same_layer(rows, bias):
    weight = drawn(48, 128, seed=4).to(torch.bfloat16)
    offset = drawn(48, seed=5).to(torch.bfloat16) if bias else None
    x = drawn(rows, 128, seed=6).to(torch.bfloat16)
    exact = x.float() @ dequantize(*quantize(weight)).float().t()
    exact = exact if offset is None else exact + offset.float()
    found = Int4Linear(weight, offset, packed=False)(x).float()
    assert ((found - exact).norm() / exact.norm()).item() < 0.01


@pytest.mark.parametrize("shape", [(48, 100), (40, 96)])
def test_sizes_that_torch_does_not_take_are_refused(shape):
    with pytest.raises(UnsupportedModelError, match="multiples of 32 and 16"):
        quantize(drawn(*shape).to(torch.bfloat16))


@pytest.mark.parametrize("given", [{}, {"batch_invariant": False, "dtype": "float32"}])
def test_it_is_refused_where_it_would_break_a_promise(given, tmp_path):
    with pytest.raises(SettingsError, match=r"engine\.weights: int4 needs"):
        engine.load(ModelSettings(path=str(tmp_path)), EngineSettings(weights="int4", **given))
