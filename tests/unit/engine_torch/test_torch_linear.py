"""Linear layers by our own kernel: the numbers, and bits that no company and no thread changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from services.engine.torch.kernels.latent_tiles import PAIRS_IN_HARDWARE
from services.engine.torch.kernels.linear import Linear

pytestmark = pytest.mark.skipif(
    not PAIRS_IN_HARDWARE, reason="this CPU doesn't multiply pairs of bfloat16 (AVX512-BF16)"
)


def drawn(*shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return torch.from_numpy(values).to(torch.bfloat16)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("outputs", [16, 48, 64, 80, 208])
@pytest.mark.parametrize("inputs", [2, 66, 192])
def test_it_computes_the_layer(outputs, inputs):
    weight, x = drawn(outputs, inputs), drawn(7, inputs, seed=1)
    found = Linear(weight, None, packed=True)(x)
    exact = x.double() @ weight.double().t()
    # One rounding to bfloat16 at the end; terms may cancel.
    scale = x.double().abs() @ weight.double().abs().t()
    assert ((found.double() - exact).abs() <= exact.abs() / 256 + 1e-5 * scale).all()
    assert found.shape == (7, outputs)


@pytest.mark.parametrize("outputs", [64, 496])
def test_a_row_has_its_bits_wherever_it_is_and_whoever_computes(outputs, threads):
    linear = Linear(drawn(outputs, 96), None, packed=True)
    x = drawn(130, 96, seed=1)
    threads(1)
    reference = linear(x)
    for count in (1, 2, 3, 4):
        threads(count)
        for start, end in ((0, 1), (129, 130), (5, 8), (3, 66), (0, 130), (1, 130)):
            assert torch.equal(linear(x[start:end]), reference[start:end])


@pytest.mark.parametrize("shape", [(1, 32), (24, 32), (64, 33)])
def test_what_the_kernel_would_write_or_read_beyond_is_left_to_torch(shape):
    weight, x = drawn(*shape), drawn(5, shape[1], seed=1)
    found = Linear(weight, None, packed=True)(x)
    torch.testing.assert_close(found, x @ weight.t(), rtol=0.02, atol=0.02)


def test_no_rows_are_no_trouble():
    assert Linear(drawn(80, 32), None, packed=True)(drawn(0, 32)).shape == (0, 80)
