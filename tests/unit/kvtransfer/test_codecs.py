import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvtransfer import codecs

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
