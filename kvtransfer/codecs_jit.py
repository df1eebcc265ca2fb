"""Number formats of KV, compiled by Numba: codecs_reference.py, bit by bit, at the speed of memory.

Importing it compiles, or loads what was compiled before and kept where Numba keeps it (beside this
file, or NUMBA_CACHE_DIR). Kernels hold no interpreter lock. They work on the bits of float32
(uint32) and bfloat16 (uint16): memory is one-dimensional, and strides are counted in elements.
Nothing here is a reduction of floats or contracted into fused operations, so vectorizing it, which
is left to LLVM, changes no bit.
"""

# Helpers are inlined, and their types are Numba's business.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

_F32, _U8, _U16, _U32 = np.float32, np.uint8, np.uint16, np.uint32

_ABSOLUTE = _U32(0x7FFFFFFF)
_INFINITY = _U32(0x7F800000)
_QUIET_NAN = _U32(0x7FC00000)
_NAN = _F32(np.nan)
_LARGEST = _F32(448)
_LARGEST_BITS = _U32(0x43E00000)
_SMALLEST_NORMAL_BITS = _U32(0x3C800000)
_SMALLEST_SCALE = _F32(2.0**-126)
"""Below it a scale has few digits, and a quotient may exceed 448."""

_HEADS_AT_ONCE = 8

_codes, _halves, _words = types.uint8[::1], types.uint16[::1], types.uint32[::1]
_floats = types.float32[::1]
_strides, _shape = types.UniTuple(types.int64, 3), types.UniTuple(types.int64, 4)


def _kernel(*signatures: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Compiles for these signatures now, and keeps the code if there is a place to keep it."""

    def compiled(function: Callable[..., None]) -> Callable[..., None]:
        def build(cache: bool) -> Any:
            return njit(list(signatures), nogil=True, error_model="numpy", cache=cache)(function)

        try:
            return build(True)  # type: ignore[no-any-return]
        except RuntimeError:  # Numba found no folder that it may write to.
            return build(False)  # type: ignore[no-any-return]

    return compiled


# One value


def _widened(value):
    """The bits of a stored value as those of float32."""
    raise NotImplementedError


@overload(_widened)
def _(value):
    if value == types.uint16:
        return lambda value: _U32(_U32(value) << _U32(16))
    return lambda value: value


def _magnitude(value):
    """A stored value without its sign: it sorts as integers do."""
    raise NotImplementedError


@overload(_magnitude)
def _(value):
    if value == types.uint16:
        return lambda value: _U16(value & _U16(0x7FFF))
    return lambda value: _U32(value & _ABSOLUTE)


def _narrowed(bits, to):
    """The bits of float32 as what array `to` stores."""
    raise NotImplementedError


@overload(_narrowed)
def _(bits, to):
    return _nearest_half if to.dtype == types.uint16 else lambda bits, to: bits


def _nearest_half(bits, to):
    rounded = _U32(bits + _U32(0x7FFF) + (_U32(bits >> _U32(16)) & _U32(1))) >> _U32(16)
    quiet = _U32(bits >> _U32(16)) | _U32(0x40)
    return _U16(quiet if _U32(bits & _ABSOLUTE) > _INFINITY else rounded)


@njit(inline="always")
def _encoded(value):
    """e4m3 of a float32 of at most 464, which is 448 once rounded.

    Adding 2**20 times the value's power of two, or that of the smallest normal number, leaves in
    the last bits how many of e4m3's steps the value is: so the addition rounds, to nearest, ties
    to even. The last byte is the code once the exponent is in it.
    """
    raw = _F32(value).view(_U32)
    size = _U32(raw & _ABSOLUTE)
    power = _U32(max(size, _SMALLEST_NORMAL_BITS) & _INFINITY)
    # Steps of 2**-9 are code 0 and up, with the exponent of 2**-6: 121 << 3, or 256 less 56.
    magic = _U32(power + _U32((20 << 23) + 56))
    steps = _F32(size.view(_F32) + magic.view(_F32)).view(_U32)
    code = _U32(steps + _U32(power >> _U32(20)))
    return _U8(code | (_U32(raw >> _U32(24)) & _U32(0x80)))


@njit(inline="always")
def _saturated(value):
    """e4m3 of any float32."""
    raw = _F32(value).view(_U32)
    size = _U32(raw & _ABSOLUTE)
    sign = _U32(raw & _U32(0x80000000))
    code = _encoded(_U32(min(size, _LARGEST_BITS) | sign).view(_F32))
    return _U8(_U8(_U32(sign >> _U32(24)) | _U32(0x7F)) if size > _INFINITY else code)


@njit(inline="always")
def _decoded(code):
    """float32 of e4m3."""
    size = _U32(code & _U8(0x7F))
    normal = _U32(_U32(size << _U32(20)) + _U32(120 << 23))
    small = _F32(_F32(np.int32(size)) * _F32(2.0**-9)).view(_U32)
    bits = small if size < _U32(8) else normal
    bits = _QUIET_NAN if size == _U32(0x7F) else bits
    return _U32(bits | _U32(_U32(code & _U8(0x80)) << _U32(24))).view(_F32)


# One group of values


@njit(inline="always")
def _scale_of(values, first, width):
    x = values[first : first + width]
    found = _magnitude(x[0])
    for i in range(width):
        found = max(found, _magnitude(x[i]))
    largest = _U32(_widened(found))
    return _NAN if largest >= _INFINITY else _F32(largest.view(_F32) / _LARGEST)


@njit(inline="always")
def _quantize_group(values, first, scale, codes, to, width):
    x, out = values[first : first + width], codes[to : to + width]
    if scale >= _SMALLEST_SCALE:
        for i in range(width):
            out[i] = _encoded(_U32(_widened(x[i])).view(_F32) / scale)
    elif scale > _F32(0):
        for i in range(width):
            out[i] = _saturated(_U32(_widened(x[i])).view(_F32) / scale)
    else:
        for i in range(width):
            out[i] = _U8(0)


@njit(inline="always")
def _dequantize_group(codes, first, scale, values, to, width):
    x, out = codes[first : first + width], values[to : to + width]
    for i in range(width):
        product = _F32(_decoded(x[i]) * scale)
        bits = _QUIET_NAN if product != product else product.view(_U32)
        out[i] = _narrowed(_U32(bits), values)


# Arrays [layers, tokens, heads, width]


@_kernel(
    *(
        (v, _strides, _codes, _strides, _floats, _strides, _shape, types.int64)
        for v in (_halves, _words)
    )
)
def _quantize(values, vs, codes, cs, scales, ss, shape, groups):
    layers, tokens, heads, width = shape
    size = width // groups
    for layer in range(layers):
        for token in range(tokens):
            # Scales of some heads first: one group's would hold up the work that waits for it.
            for start in range(0, heads, _HEADS_AT_ONCE):
                some = range(start, min(heads, start + _HEADS_AT_ONCE))
                for head in some:
                    v = layer * vs[0] + token * vs[1] + head * vs[2]
                    s = layer * ss[0] + token * ss[1] + head * ss[2]
                    for group in range(groups):
                        at = v + group * size
                        # The usual sizes as constants: LLVM unrolls their loops.
                        if size == 128:
                            scale = _scale_of(values, at, 128)
                        elif size == 64:
                            scale = _scale_of(values, at, 64)
                        else:
                            scale = _scale_of(values, at, size)
                        scales[s + group] = scale
                for head in some:
                    v = layer * vs[0] + token * vs[1] + head * vs[2]
                    c = layer * cs[0] + token * cs[1] + head * cs[2]
                    s = layer * ss[0] + token * ss[1] + head * ss[2]
                    for group in range(groups):
                        at, to, scale = v + group * size, c + group * size, scales[s + group]
                        if size == 128:
                            _quantize_group(values, at, scale, codes, to, 128)
                        elif size == 64:
                            _quantize_group(values, at, scale, codes, to, 64)
                        else:
                            _quantize_group(values, at, scale, codes, to, size)


@_kernel(
    *(
        (_codes, _strides, _floats, _strides, v, _strides, _shape, types.int64)
        for v in (_halves, _words)
    )
)
def _dequantize(codes, cs, scales, ss, values, vs, shape, groups):
    layers, tokens, heads, width = shape
    size = width // groups
    for layer in range(layers):
        for token in range(tokens):
            for head in range(heads):
                v = layer * vs[0] + token * vs[1] + head * vs[2]
                c = layer * cs[0] + token * cs[1] + head * cs[2]
                s = layer * ss[0] + token * ss[1] + head * ss[2]
                for group in range(groups):
                    at, to, scale = c + group * size, v + group * size, scales[s + group]
                    if size == 128:
                        _dequantize_group(codes, at, scale, values, to, 128)
                    elif size == 64:
                        _dequantize_group(codes, at, scale, values, to, 64)
                    else:
                        _dequantize_group(codes, at, scale, values, to, size)


@_kernel(
    (_halves, _strides, _words, _strides, _shape),
    (_words, _strides, _halves, _strides, _shape),
)
def _cast(values, vs, to, ts, shape):
    layers, tokens, heads, width = shape
    for layer in range(layers):
        for token in range(tokens):
            for head in range(heads):
                v = layer * vs[0] + token * vs[1] + head * vs[2]
                t = layer * ts[0] + token * ts[1] + head * ts[2]
                x, out = values[v : v + width], to[t : t + width]
                for i in range(width):
                    out[i] = _narrowed(_U32(_widened(x[i])), to)


@_kernel((_words, _codes))
def _encode(values, codes):
    for i in range(values.size):
        codes[i] = _saturated(_U32(values[i]).view(_F32))


# From numpy


def quantize(values: NDArray[Any], codes: NDArray[np.uint8], scales: NDArray[np.float32]) -> None:
    """As codecs_reference.quantize, for four dimensions, the last contiguous."""
    groups = scales.shape[-1]
    _quantize(*_run(_bits(values)), *_run(codes), *_run(scales), values.shape, groups)


def dequantize(codes: NDArray[np.uint8], scales: NDArray[np.float32], values: NDArray[Any]) -> None:
    """As codecs_reference.dequantize, for four dimensions, the last contiguous."""
    groups = scales.shape[-1]
    _dequantize(*_run(codes), *_run(scales), *_run(_bits(values)), values.shape, groups)


def cast(values: NDArray[Any], to: NDArray[Any]) -> None:
    """As codecs_reference.cast, for four dimensions, the last contiguous."""
    _cast(*_run(_bits(values)), *_run(_bits(to)), values.shape)


def encode(values: NDArray[np.float32], codes: NDArray[np.uint8]) -> None:
    """As codecs_reference.encode, for contiguous arrays."""
    _encode(values.reshape(-1).view(np.uint32), codes.reshape(-1))


def _bits(values: NDArray[Any]) -> NDArray[Any]:
    return values.view(np.uint32) if values.dtype == np.float32 else values


def _run(array: NDArray[Any]) -> tuple[NDArray[Any], tuple[int, ...]]:
    """The memory from an array's first element to its last, and its strides, in elements."""
    size = array.itemsize
    strides = tuple(
        0 if n == 1 else s // size for n, s in zip(array.shape, array.strides, strict=True)
    )
    length = 1 + sum((n - 1) * s for n, s in zip(array.shape, strides, strict=True))
    return as_strided(array, (length,), (size,)), strides[:3]
