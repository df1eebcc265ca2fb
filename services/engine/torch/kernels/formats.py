"""Numbers as they are stored, into vectors of float32 and back; and 2**x.

Stored kinds: FLOAT32, BFLOAT16 (the high half of a float32, rounded to nearest even), FP8_E4M3
(sign, 4 bits of exponent with bias 7, 3 of mantissa; largest 448; times a float32 scale).
"""

from __future__ import annotations

from typing import Any

from numba import njit

from services.engine.torch.kernels.simd import (
    absolute,
    add,
    add_i32,
    and_i32,
    bits,
    divide,
    fma,
    from_bits,
    half_to_f32,
    if_less,
    larger,
    left,
    load_f32,
    load_u8,
    load_u16,
    multiply,
    or_i32,
    pick_less,
    pick_less_i32,
    right,
    splat_f32,
    splat_i32,
    store_f32,
    store_u16,
    subtract,
    subtract_i32,
    to_i32,
)

FLOAT32, BFLOAT16, FP8_E4M3 = 0, 1, 2
KINDS = {"float32": FLOAT32, "bfloat16": BFLOAT16, "fp8_e4m3": FP8_E4M3}
# Bytes an element of each kind takes.
SIZES = (4, 2, 1)

FP8_LARGEST = 448.0
# e4m3 read as half precision is 2**-8 of its value: the exponents' biases are 7 and 15.
FP8_FROM_HALF = 256.0


@njit(cache=True, error_model="numpy")
def load_values(address: int, index: int, kind: int) -> Any:
    """Sixteen elements from element `index` on, FLOAT32 or BFLOAT16."""
    if kind == FLOAT32:
        return load_f32(address + 4 * index)
    return from_bits(left(load_u16(address + 2 * index), 16))


@njit(cache=True, error_model="numpy")
def store_values(address: int, index: int, kind: int, values: Any) -> None:
    """Sixteen elements to element `index` on, FLOAT32 or BFLOAT16."""
    if kind == FLOAT32:
        store_f32(address + 4 * index, values)
    else:
        store_u16(address + 2 * index, to_bfloat16(values))


@njit(cache=True, error_model="numpy")
def to_bfloat16(values: Any) -> Any:
    """Codes in the low 16 bits: nearest, ties to even; not-a-number stays so."""
    raw = bits(values)
    odd = and_i32(right(raw, 16), splat_i32(1))
    rounded = right(add_i32(raw, add_i32(odd, splat_i32(0x7FFF))), 16)
    # Rounding could carry a not-a-number into infinity or zero.
    quiet = or_i32(right(raw, 16), splat_i32(0x40))
    magnitude = and_i32(raw, splat_i32(0x7FFFFFFF))
    return pick_less_i32(splat_i32(0x7F800000), magnitude, quiet, rounded)


@njit(cache=True, error_model="numpy")
def to_fp8(values: Any) -> Any:
    """Codes in the low 8 bits: nearest, ties to even; beyond the largest: the largest.

    Not-a-number becomes 0x7F, e4m3's own.
    """
    raw = bits(values)
    magnitude = and_i32(raw, splat_i32(0x7FFFFFFF))
    size = from_bits(magnitude)
    largest = splat_f32(FP8_LARGEST)
    kept = bits(if_less(size, largest, size, largest))
    odd = and_i32(right(kept, 20), splat_i32(1))
    # Drop 20 bits of mantissa, and move the exponent's bias from 127 to 7.
    normal = right(add_i32(kept, add_i32(odd, splat_i32(0x7FFFF))), 20)
    normal = subtract_i32(normal, splat_i32(120 << 3))
    # Below 2**-6 codes step by 2**-9, which is one unit in the last place of 2**14.
    magic = splat_f32(16384.0)
    small = subtract_i32(bits(add(size, magic)), bits(magic))
    code = pick_less(size, splat_f32(0.015625), small, normal)
    code = pick_less_i32(splat_i32(0x7F800000), magnitude, splat_i32(0x7F), code)
    return or_i32(code, and_i32(right(raw, 24), splat_i32(0x80)))


@njit(cache=True, error_model="numpy")
def even_halves(codes: Any) -> Any:
    """fp8 codes in bytes 0 and 2 of each lane, as half precision in its two halves."""
    sign = left(and_i32(codes, splat_i32(0x00800080)), 8)
    return or_i32(sign, left(and_i32(codes, splat_i32(0x007F007F)), 7))


@njit(cache=True, error_model="numpy")
def odd_halves(codes: Any) -> Any:
    """fp8 codes in bytes 1 and 3 of each lane, as half precision in its two halves."""
    return even_halves(right(codes, 8))


@njit(cache=True, error_model="numpy")
def power_of_two(x: Any) -> Any:
    """2**x for x <= 0, relative error below 2e-7; 0 below -126.5 and where x is not a number.

    Exactly 1 for 0. A polynomial of our own, since a library's may differ between machines.
    """
    x = larger(x, splat_f32(-127.0))
    # Adding 1.5 * 2**23 rounds to the nearest integer.
    magic = splat_f32(12582912.0)
    whole = subtract(add(x, magic), magic)
    part = subtract(x, whole)
    # Taylor's series of 2**part on [-0.5, 0.5]: ln(2)**k / k!
    value = splat_f32(1.5403530e-4)
    value = fma(value, part, splat_f32(1.3333558e-3))
    value = fma(value, part, splat_f32(9.6181291e-3))
    value = fma(value, part, splat_f32(5.5504109e-2))
    value = fma(value, part, splat_f32(2.4022651e-1))
    value = fma(value, part, splat_f32(6.9314718e-1))
    value = fma(value, part, splat_f32(1.0))
    exponent = left(add_i32(to_i32(whole), splat_i32(127)), 23)
    return multiply(value, from_bits(exponent))


@njit(cache=True, error_model="numpy")
def sigmoid(x: Any) -> Any:
    """1 / (1 + e**-x)."""
    # e**-|x| never overflows.
    small = power_of_two(multiply(absolute(x), splat_f32(-1.44269504)))
    one = splat_f32(1.0)
    top = if_less(x, splat_f32(0.0), small, one)
    return divide(top, add(one, small))


@njit(cache=True, error_model="numpy")
def widen_fp8(address: int) -> Any:
    """Sixteen fp8 codes as float32, times 2**-8: see FP8_FROM_HALF."""
    return half_to_f32(even_halves(load_u8(address)))
