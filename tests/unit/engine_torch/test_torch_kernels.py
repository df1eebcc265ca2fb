"""The kernels against numpy and torch, number by number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from kvtransfer import codecs
from services.engine.torch.kernels import formats, rows, simd, tiles
from services.engine.torch.kernels.team import Call, float_argument


@njit
def encode_fp8(source, target):
    simd.store_u8(target, formats.to_fp8(simd.load_f32(source)))


@njit
def decode_fp8(source, target):
    simd.store_f32(target, formats.widen_fp8(source))


@njit
def encode_bf16(source, target):
    simd.store_u16(target, formats.to_bfloat16(simd.load_f32(source)))


@njit
def power(source, target):
    simd.store_f32(target, formats.power_of_two(simd.load_f32(source)))


def by_sixteens(function, values, dtype):
    """A kernel of sixteen values, on any number of them."""
    source = np.pad(values, (0, -len(values) % 16))
    target = np.zeros(len(source), dtype)
    for i in range(0, len(source), 16):
        function(source[i:].ctypes.data, target[i:].ctypes.data)
    return target[: len(values)]


def some_floats():
    """All exponents, with fractions at and beside every place where rounding turns."""
    exponents = np.arange(0, 256, dtype=np.uint32) << 23
    fractions = np.array(
        [(step << 15) + near for step in range(256) for near in (0, 1, 0x7FFF)], np.uint32
    )
    positive = (exponents[:, None] | fractions).ravel()
    return np.concatenate([positive, positive | np.uint32(1 << 31)]).view(np.float32)


def test_fp8_rounds_as_the_reference_does():
    values = some_floats()
    assert np.array_equal(by_sixteens(encode_fp8, values, np.uint8), codecs.fp8_encode(values))


def test_fp8_codes_are_read_exactly():
    codes = np.arange(256, dtype=np.uint8)
    numbers = codes[(codes & 0x7F) != 0x7F]
    found = by_sixteens(decode_fp8, numbers, np.float32) * np.float32(formats.FP8_FROM_HALF)
    assert np.array_equal(found, codecs.fp8_decode(numbers))


def test_bfloat16_rounds_as_the_reference_does():
    values = some_floats()
    assert np.array_equal(by_sixteens(encode_bf16, values, np.uint16), codecs.bf16_encode(values))


def test_power_of_two():
    values = -np.concatenate([np.linspace(0, 126, 20011), [127.0, 128.0, 1e30, np.inf, np.nan]])
    found = by_sixteens(power, values.astype(np.float32), np.float32)
    exact = np.exp2(values[:-5].astype(np.float32).astype(np.float64))
    assert np.abs(found[:-5] / exact - 1).max() < 2.5e-7
    assert found[0] == 1.0
    assert np.array_equal(found[-5:], np.zeros(5))


@pytest.mark.parametrize("width", [32, 64, 80, 128])
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([0.0, 1e-44, 1e-38, 1e-3, 1.0, 1e38]))
@settings(max_examples=30, deadline=None)
def test_fp8_vectors_are_quantized_as_the_reference_does(width, seed, size):
    values = np.random.default_rng(seed).standard_normal(width).astype(np.float32)
    values = np.clip(values, -3, 3) * np.float32(size)
    codes, scale = np.zeros(width, np.uint8), np.zeros(1, np.float32)
    rows._write(
        values.ctypes.data,
        formats.FLOAT32,
        codes.ctypes.data,
        scale.ctypes.data,
        width,
        formats.FP8_E4M3,
    )
    expected, expected_scale = codecs.fp8_quantize(values)
    assert scale == expected_scale
    assert np.array_equal(codes, expected)


@njit
def transpose(addresses, offset, out):
    tiles.transpose_words(addresses, offset, out)


def test_transposes_words():
    words = np.random.default_rng(0).integers(0, 2**31, (16, 24), np.int32)
    addresses = np.array([row.ctypes.data for row in words])
    out = np.zeros((16, 16), np.int32)
    transpose(addresses.ctypes.data, 4 * 5, out.ctypes.data)
    assert np.array_equal(out, words[:, 5:21].T)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalize_adds_and_scales_every_row(threads, dtype):
    torch.manual_seed(0)
    count, width = 37, 96
    state, delta = torch.randn(count, width), torch.randn(count, width).to(dtype)
    weight, out = torch.rand(width), torch.zeros(count, width, dtype=dtype)
    expected = state + delta.float()
    call = Call(
        rows.normalize,
        rows.NORMALIZE,
        rows=count,
        width=width,
        kind=formats.BFLOAT16 if dtype == torch.bfloat16 else formats.FLOAT32,
        epsilon=float_argument(1e-5),
        state=state.data_ptr(),
        delta=delta.data_ptr(),
        weight=weight.data_ptr(),
        out=out.data_ptr(),
    )
    call.run(threads)
    assert torch.equal(state, expected)
    scaled = expected * torch.rsqrt(expected.pow(2).mean(-1, keepdim=True) + 1e-5) * weight
    torch.testing.assert_close(out, scaled.to(dtype), rtol=1e-2 if dtype != torch.float32 else 1e-6,
                               atol=1e-6)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate(dtype):
    torch.manual_seed(0)
    both = (torch.randn(9, 64) * 30).to(dtype)
    both[0, :4] = torch.tensor([0.0, -1000.0, 1000.0, -0.0])
    out = torch.zeros(9, 32, dtype=dtype)
    kind = formats.BFLOAT16 if dtype == torch.bfloat16 else formats.FLOAT32
    call = Call(rows.gate, rows.GATE, rows=9, width=32, kind=kind)
    call.set(both=both.data_ptr(), out=out.data_ptr())
    call.run(2)
    gate, up = both.float().chunk(2, dim=-1)
    expected = (torch.nn.functional.silu(gate) * up).to(dtype)
    torch.testing.assert_close(out, expected, rtol=1e-2 if dtype != torch.float32 else 3e-6,
                               atol=1e-6)  # fmt: skip
