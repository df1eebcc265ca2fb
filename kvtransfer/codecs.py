"""Number formats of KV, as blocks store them: from one to another, as fast as this machine can.

With Numba (it comes with the torch extra) the kernels of codecs_jit.py run; without it numpy does,
which gives the same bits and takes about fifty times as long. implementation() says which.

What is lost, with x the exact value, for finite values within float32's normal range:

    bfloat16 -> float32      nothing
    float32 -> bfloat16      |error| <= |x| * 2**-8
    any -> fp8_e4m3          |error| <= max(|x| * 2**-4, scale * 2**-10) * (1 + 2**-20), where
                             scale = the largest magnitude of the values that share it / 448
    fp8_e4m3 -> float32      |error| <= |x| * 2**-24: the product of code and scale is rounded
    fp8_e4m3 -> bfloat16     |error| <= |x| * 2**-8 * (1 + 2**-15)

A value that is not finite makes every value that shares its scale NaN in fp8_e4m3.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtransfer import codecs_reference
from kvtransfer.codecs_reference import bf16_decode, fp8_decode

__all__ = [
    "NUMPY_DTYPES",
    "Stored",
    "bf16_decode",
    "bf16_encode",
    "fp8_decode",
    "fp8_dequantize",
    "fp8_encode",
    "fp8_quantize",
    "implementation",
    "recode",
]

NUMPY_DTYPES = {"fp8_e4m3": np.uint8, "bfloat16": np.uint16, "float32": np.float32}
"""What arrays of a layout's dtype are in numpy."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Values as they lie in memory: [layers, tokens, heads, width], the last axis contiguous."""

    values: NDArray[Any]
    """uint8 for fp8_e4m3, uint16 for bfloat16, float32."""
    scales: NDArray[np.float32] | None = None
    """Of fp8_e4m3, [layers, tokens, heads, groups]; None: it is copied only."""


def implementation() -> str:
    """Either "numba" or "numpy". The first call compiles kernels (seconds) or loads them."""
    return "numpy" if _kernels() is codecs_reference else "numba"


def recode(source: Stored, sink: Stored) -> None:
    """Writes the source's values to the sink, in its format. The interpreter is not held.

    Same dtype and groups: the bytes are copied. Shapes must be equal but for the groups of
    scales. Errors as the module says; between fp8_e4m3 of different groups by way of float32.
    """
    if source.values.dtype == sink.values.dtype and _groups(source) == _groups(sink):
        np.copyto(sink.values, source.values)
        if source.scales is not None and sink.scales is not None:
            np.copyto(sink.scales, source.scales)
    elif source.scales is None and sink.scales is None:
        _kernels().cast(source.values, sink.values)
    elif source.scales is None:
        _kernels().quantize(source.values, sink.values, sink.scales)
    elif sink.scales is None:
        _kernels().dequantize(source.values, source.scales, sink.values)
    else:
        between = np.empty(source.values.shape, np.float32)
        _kernels().dequantize(source.values, source.scales, between)
        _kernels().quantize(between, sink.values, sink.scales)


def fp8_quantize(x: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Values [..., width], float32 or bfloat16 bits, to codes [..., width] and scales [..., 1].

    value = code * scale. Rows of zeros have scale 0 and codes 0.
    """
    rows = _rows(x, np.uint16 if x.dtype == np.uint16 else np.float32)
    codes, scales = np.empty(rows.shape, np.uint8), np.empty((*rows.shape[:-1], 1), np.float32)
    if rows.size:
        _kernels().quantize(rows, codes, scales)
    return codes.reshape(x.shape), scales.reshape(*x.shape[:-1], 1)


def fp8_dequantize(codes: NDArray[np.uint8], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Codes uint8 [..., width] and scales float32 [..., 1] to float32 [..., width]."""
    rows, scales = _rows(codes, np.uint8), _rows(scale, np.float32)
    values = np.empty(rows.shape, np.float32)
    if rows.size:
        _kernels().dequantize(rows, scales, values)
    return values.reshape(codes.shape)


def fp8_encode(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """float32 to e4m3fn, round to nearest, ties to even; beyond +-448 it saturates. NaN stays."""
    values = np.ascontiguousarray(x, np.float32)
    codes = np.empty(values.shape, np.uint8)
    _kernels().encode(values, codes)
    return codes.reshape(np.shape(x))


def bf16_encode(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 to bfloat16 bits, round to nearest, ties to even. NaN stays NaN."""
    values = np.ascontiguousarray(x, np.float32).reshape(1, 1, 1, -1)
    bits = np.empty(values.shape, np.uint16)
    if values.size:
        _kernels().cast(values, bits)
    return bits.reshape(np.shape(x))


@cache
def _kernels() -> ModuleType:
    try:
        from kvtransfer import codecs_jit
    except ModuleNotFoundError as error:
        if error.name != "numba":
            raise
        return codecs_reference
    return codecs_jit


def _groups(stored: Stored) -> int:
    return 0 if stored.scales is None else stored.scales.shape[-1]


def _rows(x: NDArray[Any], dtype: Any) -> NDArray[Any]:
    return np.ascontiguousarray(x, dtype).reshape(1, 1, -1, x.shape[-1])
