import sys

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import kvtransfer
from kvtransfer import codecs, codecs_jit, codecs_reference
from kvtransfer.codecs import Stored

FINITE = st.floats(-(2.0**100), 2.0**100, width=32)
ROWS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 9)),
    elements=FINITE,
)


def torch_fp8(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def test_decodes_every_code_as_torch():
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(codecs.fp8_decode(codes), expected, equal_nan=True)


def test_every_number_and_every_tie_encodes_as_torch():
    numbers = codecs.fp8_decode(np.arange(127, dtype=np.uint8))
    ties = (numbers[1:] + numbers[:-1]) / 2
    near = np.concatenate([np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e9))])
    x = np.concatenate([numbers, ties, near])
    x = np.concatenate([x, -x]).astype(np.float32)
    assert np.array_equal(codecs.fp8_encode(x), torch_fp8(x))


@given(hnp.arrays(np.float32, 50, elements=st.floats(-448, 448, width=32)))
def test_encodes_as_torch_within_range(x):
    assert np.array_equal(codecs.fp8_encode(x), torch_fp8(x))


@given(hnp.arrays(np.uint32, 50, elements=st.integers(0, 2**32 - 1)))
def test_any_bits_saturate_or_stay_nan(bits):
    x = bits.view(np.float32)
    decoded = codecs.fp8_decode(codecs.fp8_encode(x))
    assert np.array_equal(np.isnan(decoded), np.isnan(x))
    beyond = np.abs(x) >= 448
    assert np.array_equal(decoded[beyond], np.copysign(np.float32(448), x[beyond]))


@given(ROWS)
def test_quantizing_errs_by_half_a_step_at_most(x):
    codes, scale = codecs.fp8_quantize(x)
    assert codes.shape == x.shape
    assert scale.shape == (*x.shape[:-1], 1)
    error = np.abs(codecs.fp8_dequantize(codes, scale).astype(np.float64) - x)
    # 3 fraction bits: half a step is 1/16 of a normal value, 2**-10 scales of a subnormal one.
    # A scale that is itself subnormal carries few digits: hence the last term.
    allowed = np.abs(x) / 16 * 1.001 + scale * 2.0**-10 * 1.001 + 448 * 2.0**-149
    assert (error <= allowed).all()


def test_zeros_are_exact_and_leave_other_rows_alone():
    x = np.zeros((2, 3, 4), np.float32)
    x[1, 2] = [1, -2, 3, -4]
    codes, scale = codecs.fp8_quantize(x)
    assert not codes[0].any()
    assert not scale[0].any()
    assert codecs.fp8_dequantize(codes, scale)[1, 2, 3] == -4


def test_the_largest_value_of_a_row_is_448():
    codes, scale = codecs.fp8_quantize(np.array([[0.5, -3.0]], np.float32))
    assert codecs.fp8_decode(codes)[0, 1] == -448
    assert scale[0, 0] == np.float32(3) / np.float32(448)


@given(hnp.arrays(np.uint32, 50, elements=st.integers(0, 2**32 - 1)))
def test_bf16_as_torch(bits):
    x = bits.view(np.float32)
    expected = torch.from_numpy(x.copy()).to(torch.bfloat16)
    decoded = codecs.bf16_decode(codecs.bf16_encode(x))
    assert np.array_equal(decoded, expected.float().numpy(), equal_nan=True)


@given(hnp.arrays(np.uint16, 50, elements=st.integers(0, 2**16 - 1)))
def test_bf16_round_trip(bits):
    back = codecs.bf16_encode(codecs.bf16_decode(bits))
    numbers = ~np.isnan(codecs.bf16_decode(bits))
    assert np.array_equal(back[numbers], bits[numbers])


# The compiled kernels against the reference, bit by bit.

PATTERNS = hnp.arrays(
    np.uint32,
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2), st.integers(1, 5)),
    elements=st.one_of(
        st.integers(0, 2**32 - 1),
        st.sampled_from(
            [0, 0x80000000, 1, 0x7FFFFF, 0x800000, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00001]
        ),
        st.floats(-500, 500, width=32).map(lambda x: int(np.float32(x).view(np.uint32))),
    ),
)
GROUPS = st.sampled_from([1, 2, 3])
SIZES = st.sampled_from([1, 5, 16, 64, 128])


def strided(array: np.ndarray, seed: int) -> np.ndarray:
    """The same values with gaps between layers, tokens and heads."""
    gaps = np.random.default_rng(seed).integers(0, 3, 3)
    shape = [n + int(g) for n, g in zip(array.shape, (*gaps, 0), strict=True)]
    wide = np.zeros(shape, array.dtype)
    view = wide[tuple(slice(n) for n in array.shape)]
    view[...] = array
    return view


def quantized(module, values: np.ndarray, groups: int, seed: int) -> tuple[np.ndarray, ...]:
    codes = strided(np.full(values.shape, 9, np.uint8), seed)
    scales = strided(np.full((*values.shape[:-1], groups), 9, np.float32), seed + 1)
    module.quantize(strided(values, seed + 2), codes, scales)
    return codes, scales


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(other).tobytes()


@given(PATTERNS, GROUPS, SIZES, st.integers(0, 99), st.booleans())
def test_kernels_quantize_as_the_reference(bits, groups, size, seed, halves):
    values = np.tile(bits, groups * size)
    values = (values >> 16).astype(np.uint16) if halves else values.view(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = quantized(codecs_reference, values, groups, seed)
    found = quantized(codecs_jit, values, groups, seed)
    assert same_bits(found[0], expected[0])
    assert same_bits(found[1], expected[1])


@given(PATTERNS, GROUPS, SIZES, st.integers(0, 99), st.booleans())
def test_kernels_dequantize_as_the_reference(bits, groups, size, seed, halves):
    codes = np.tile((bits >> 7).astype(np.uint8), groups * size)
    scales = np.resize(bits[::-1].view(np.float32), (*codes.shape[:-1], groups))
    values = np.zeros(codes.shape, np.uint16 if halves else np.float32)
    results = []
    for module in (codecs_reference, codecs_jit):
        out = strided(values, seed)
        with np.errstate(invalid="ignore", over="ignore"):
            module.dequantize(strided(codes, seed + 1), strided(scales, seed + 2), out)
        results.append(out)
    assert same_bits(*results)


@given(PATTERNS, st.integers(0, 99), st.booleans())
def test_kernels_cast_and_encode_as_the_reference(bits, seed, widen):
    values = (bits >> 16).astype(np.uint16) if widen else bits.view(np.float32)
    results = []
    for module in (codecs_reference, codecs_jit):
        out = strided(np.zeros(values.shape, np.float32 if widen else np.uint16), seed)
        module.cast(strided(values, seed + 1), out)
        results.append(out)
    assert same_bits(*results)
    expected, found = np.zeros(bits.shape, np.uint8), np.zeros(bits.shape, np.uint8)
    codecs_reference.encode(bits.view(np.float32), expected)
    codecs_jit.encode(bits.view(np.float32), found)
    assert same_bits(found, expected)


def test_every_code_boundary_and_its_neighbours_encode_as_the_reference():
    numbers = codecs.fp8_decode(np.arange(127, dtype=np.uint8))
    ties = ((numbers[1:] + numbers[:-1]) / 2).view(np.uint32)
    ties = ties.astype(np.int64)
    near = np.concatenate([ties - 1, ties, ties + 1, numbers.view(np.uint32)])
    x = np.concatenate([near, near | 0x80000000]).astype(np.uint32).view(np.float32)
    found = np.zeros(x.shape, np.uint8)
    codecs_jit.encode(x, found)
    assert same_bits(found, codecs_reference.fp8_encode(x))
    # Quantizing has an encoder of its own, for what can't exceed 448: a scale of 1 shows it.
    row = np.append(x, np.float32(448)).reshape(1, 1, 1, -1)
    codes, scales = np.zeros(row.shape, np.uint8), np.zeros((1, 1, 1, 1), np.float32)
    codecs_jit.quantize(row, codes, scales)
    assert scales.item() == 1
    assert same_bits(codes[0, 0, 0, :-1], codecs_reference.fp8_encode(x))


@given(PATTERNS)
def test_a_value_that_is_not_finite_makes_its_group_nan_and_no_other(bits):
    x = bits.view(np.float32).copy()
    x[np.isfinite(x)] = 1.5
    x = np.concatenate([x, np.full_like(x, 2.0)], axis=-1)
    codes, scales = np.zeros(x.shape, np.uint8), np.zeros((*x.shape[:-1], 2), np.float32)
    codecs.recode(Stored(x), Stored(codes, scales))
    back = np.zeros_like(x)
    codecs.recode(Stored(codes, scales), Stored(back))
    first, second = np.split(back, 2, axis=-1)
    poisoned = ~np.isfinite(np.split(x, 2, axis=-1)[0]).all(axis=-1)
    assert np.isnan(first[poisoned]).all()
    assert (first[~poisoned] == 1.5).all()
    assert (second == 2.0).all()


def test_says_which_implementation_runs(monkeypatch):
    assert codecs.implementation() == "numba"
    monkeypatch.delitem(sys.modules, "kvtransfer.codecs_jit")
    monkeypatch.delattr(kvtransfer, "codecs_jit")
    monkeypatch.setitem(sys.modules, "numba", None)
    codecs._kernels.cache_clear()
    try:
        assert codecs.implementation() == "numpy"
        x = np.linspace(-3, 3, 256, dtype=np.float32).reshape(2, 128)
        codes, scale = codecs.fp8_quantize(x)
        assert np.allclose(codecs.fp8_dequantize(codes, scale), x, rtol=1 / 15, atol=1e-3)
    finally:
        codecs._kernels.cache_clear()


def test_kernels_do_not_hold_the_interpreter():
    for name in ("_quantize", "_dequantize", "_cast", "_encode"):
        assert getattr(codecs_jit, name).targetoptions["nogil"]
