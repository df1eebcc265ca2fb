"""Number formats of KV, in numpy: what every other implementation has to agree with, bit by bit.

FP8 is e4m3fn: 1 sign, 4 exponent (bias 7), 3 fraction bits; no infinities, 0x7f and 0xff are NaN,
the largest number is 448. Values come in groups of neighbours with one float32 scale each: scale =
largest magnitude / 448, so that the largest value uses the whole range.

Arrays of values are float32, or bfloat16 as its bits in uint16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

E4M3_MAX = 448.0

_NAN = 0x7F
_SMALLEST_NORMAL = 2.0**-6
_SUBNORMAL_STEPS = 2.0**9
_DROPPED_BITS = 20
_BIAS_DIFFERENCE = (127 - 7) << 3


def quantize(values: NDArray[Any], codes: NDArray[np.uint8], scales: NDArray[np.float32]) -> None:
    """Values [..., width] to codes [..., width] and scales [..., groups], both written in place.

    value = code * scale. A group of zeros has scale 0 and codes 0; one with a NaN or an infinity
    has scale NaN and codes 0, and reads as NaN throughout.
    """
    groups = scales.shape[-1]
    x = _floats(values).reshape(*values.shape[:-1], groups, -1)
    largest = np.max(np.abs(x), axis=-1, keepdims=True)
    scale = np.where(np.isfinite(largest), largest, np.float32(np.nan)) / np.float32(E4M3_MAX)
    divisor = np.where(scale > 0, scale, np.float32(1))
    codes[...] = fp8_encode(np.where(scale > 0, x / divisor, np.float32(0))).reshape(values.shape)
    scales[...] = scale[..., 0]


def dequantize(codes: NDArray[np.uint8], scales: NDArray[np.float32], values: NDArray[Any]) -> None:
    """Codes [..., width] and scales [..., groups] to values [..., width], written in place."""
    groups = scales.shape[-1]
    x = fp8_decode(codes).reshape(*codes.shape[:-1], groups, -1) * scales[..., None]
    # Which of two NaNs a product is, is the machine's choice.
    x = np.where(np.isnan(x), np.float32(np.nan), x).reshape(codes.shape)
    values[...] = bf16_encode(x) if values.dtype == np.uint16 else x


def cast(values: NDArray[Any], to: NDArray[Any]) -> None:
    """float32 to bfloat16 or the other way, written in place."""
    to[...] = bf16_encode(values) if to.dtype == np.uint16 else bf16_decode(values)


def encode(values: NDArray[np.float32], codes: NDArray[np.uint8]) -> None:
    """fp8_encode, written in place."""
    codes[...] = fp8_encode(values)


def fp8_encode(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """float32 to e4m3fn, round to nearest, ties to even; beyond +-448 it saturates. NaN stays."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    half = np.uint32((1 << (_DROPPED_BITS - 1)) - 1)
    rounded = (magnitude + half + ((magnitude >> _DROPPED_BITS) & np.uint32(1))) >> _DROPPED_BITS
    # In int64, since what is below the normal range wraps, and is not used.
    normal = rounded.astype(np.int64) - _BIAS_DIFFERENCE
    absolute = magnitude.view(np.float32)
    is_nan = magnitude > np.uint32(0x7F800000)
    small = absolute < _SMALLEST_NORMAL
    # rint rounds ties to even as well; 8 steps are the smallest normal number's code.
    steps = np.rint(np.where(small, absolute, 0) * np.float32(_SUBNORMAL_STEPS))
    code = np.where(small, steps.astype(np.int64), np.minimum(normal, _NAN - 1))
    code = np.where(is_nan, _NAN, code)
    sign = (bits >> np.uint32(24)) & np.uint32(0x80)
    return (code.astype(np.uint32) | sign).astype(np.uint8)


def fp8_decode(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """e4m3fn to float32, exactly."""
    return _DECODED[codes]


def bf16_encode(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 to bfloat16 bits, round to nearest, ties to even. NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(is_nan, quiet, rounded).astype(np.uint16)


def bf16_decode(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 bits to float32, exactly."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _floats(values: NDArray[Any]) -> NDArray[np.float32]:
    return bf16_decode(values) if values.dtype == np.uint16 else np.ascontiguousarray(values)


def _decoded() -> NDArray[np.float32]:
    codes = np.arange(256)
    exponent, fraction = (codes >> 3) & 15, codes & 7
    normal = (1 + fraction / 8) * 2.0 ** (exponent - 7)
    value = np.where(exponent > 0, normal, fraction / _SUBNORMAL_STEPS)
    value[(codes & _NAN) == _NAN] = np.nan
    return np.where(codes & 0x80, -value, value).astype(np.float32)


_DECODED = _decoded()
