"""Kernels that go row by row: residual and RMSNorm, SiLU gate, rotary embedding and KV write."""

from __future__ import annotations

import math
from typing import Any

from numba import njit

from services.engine.torch.kernels.formats import (
    BFLOAT16,
    FLOAT32,
    FP8_LARGEST,
    SIZES,
    load_values,
    sigmoid,
    store_values,
    to_bfloat16,
    to_fp8,
)
from services.engine.torch.kernels.simd import (
    LANES,
    absolute,
    add,
    divide,
    fetch_add,
    float_bits,
    fma,
    if_less,
    larger,
    largest_lane,
    load_f32,
    multiply,
    peek_i32,
    peek_i64,
    poke_f32,
    splat_f32,
    store_f32,
    store_u8,
    store_u16,
    subtract,
    sum_lanes,
    unpack,
)
from services.engine.torch.kernels.team import entry

# Rows a thread takes at a time: enough to hide the atomic addition.
TAKE = 4
# The bits of 1 as a float32.
ONE = 0x3F800000

NORMALIZE = ("rows", "width", "kind", "epsilon", "state", "delta", "weight", "out")
_normalize_arguments = unpack(len(NORMALIZE) + 1)


@entry
def normalize(arguments: int) -> None:
    """For every row: state += delta; out = state / rms(state) * weight.

    state float32 [rows, width]; delta, out [rows, width] of `kind` (FLOAT32 or BFLOAT16); weight
    float32 [width]; epsilon the bits of a float32. delta may be 0: nothing is added.
    """
    _, rows, width, kind, epsilon, state, delta, weight, out = _normalize_arguments(arguments)
    while True:
        first = fetch_add(arguments, TAKE)
        if first >= rows:
            return
        for row in range(first, min(first + TAKE, rows)):
            start = row * width
            _normalize_row(
                state + 4 * start,
                0 if delta == 0 else delta + SIZES[kind] * start,
                weight,
                out + SIZES[kind] * start,
                width,
                kind,
                float_bits(epsilon),
            )


@njit(cache=True, error_model="numpy")
def _normalize_row(
    state: int, delta: int, weight: int, out: int, width: int, kind: int, epsilon: float
) -> None:
    squares = splat_f32(0.0)
    for i in range(0, width, LANES):
        value = load_f32(state + 4 * i)
        if delta != 0:
            value = add(value, load_values(delta, i, kind))
            store_f32(state + 4 * i, value)
        squares = fma(value, value, squares)
    mean = float(sum_lanes(squares)) / width
    scale = splat_f32(1.0 / math.sqrt(mean + float(epsilon)))
    for i in range(0, width, LANES):
        value = multiply(load_f32(state + 4 * i), scale)
        store_values(out, i, kind, multiply(value, load_f32(weight + 4 * i)))


PART = ("rows", "width", "kind", "epsilon", "x", "stride", "weight", "out")
_part_arguments = unpack(len(PART) + 1)


@entry
def normalize_part(arguments: int) -> None:
    """Out [rows, width] = x / rms(x) * weight, where rows of x are `stride` values apart.

    x, out of `kind`; weight float32 [width]; epsilon the bits of a float32.
    """
    _, rows, width, kind, epsilon, x, stride, weight, out = _part_arguments(arguments)
    while True:
        first = fetch_add(arguments, TAKE)
        if first >= rows:
            return
        for row in range(first, min(first + TAKE, rows)):
            scale = splat_f32(_inverse_rms(x, row * stride, width, kind, float_bits(epsilon)))
            for i in range(0, width, LANES):
                value = multiply(load_values(x, row * stride + i, kind), scale)
                store_values(out, row * width + i, kind, multiply(value, load_f32(weight + 4 * i)))


@njit(cache=True, error_model="numpy")
def _inverse_rms(x: int, start: int, width: int, kind: int, epsilon: float) -> Any:
    """1 / rms of `width` values from value `start` on."""
    squares = splat_f32(0.0)
    for i in range(start, start + width, LANES):
        value = load_values(x, i, kind)
        squares = fma(value, value, squares)
    mean = float(sum_lanes(squares)) / width
    return 1.0 / math.sqrt(mean + float(epsilon))


GATE = ("rows", "width", "kind", "both", "out")
_gate_arguments = unpack(len(GATE) + 1)


@entry
def gate(arguments: int) -> None:
    """Out = silu(gate) * up, where both [rows, 2 * width] is gate and up side by side.

    out [rows, width]; all of `kind`.
    """
    _, rows, width, kind, both, out = _gate_arguments(arguments)
    while True:
        first = fetch_add(arguments, TAKE)
        if first >= rows:
            return
        for row in range(first, min(first + TAKE, rows)):
            for i in range(0, width, LANES):
                x = load_values(both, 2 * row * width + i, kind)
                up = load_values(both, (2 * row + 1) * width + i, kind)
                store_values(out, row * width + i, kind, multiply(multiply(x, sigmoid(x)), up))


ROTATE = (
    "rows",
    "q_heads",
    "kv_heads",
    "head_dim",
    "kind",
    "qkv",
    "q",
    "turned_k",
    "cosines",
    "sines",
    "positions",
    "q_scale",
    "q_norm",
    "k_norm",
    "epsilon",
    "pool",
    "kv_kind",
    "row_bytes",
    "row_tokens",
    "k",
    "v",
    "k_scale",
    "v_scale",
)
_rotate_arguments = unpack(len(ROTATE) + 1)


@entry
def rotate(arguments: int) -> None:
    """Rotary embedding of q and k; k and v are rounded to the pool's kind and written into it.

    qkv [rows, q_heads + 2 * kv_heads, head_dim] of `kind`; out, float32: q [rows, q_heads,
    head_dim], times q_scale (bits of a float32), and turned_k [rows, kv_heads, head_dim]; cosines,
    sines float32 [positions, head_dim / 2]; positions int32 [rows]. q_norm, k_norm float32
    [head_dim]: weights of an RMSNorm over each head, with epsilon (bits of a float32), that comes
    before; 0: none. pool: address of this layer in the first block; row_bytes int64 [rows]: bytes
    from there to the row's block, negative where nothing is written; row_tokens int64 [rows]: its
    token in the block; k, v, k_scale, v_scale: bytes from the layer's start to the components.
    """
    (
        _, rows, q_heads, kv_heads, head_dim, kind, qkv, q, turned_k, cosines, sines, positions,
        q_scale, q_norm, k_norm, epsilon, pool, kv_kind, row_bytes, row_tokens, k, v, k_scale,
        v_scale,
    ) = _rotate_arguments(arguments)  # fmt: skip
    half = head_dim // 2
    size = SIZES[kind] * head_dim
    while True:
        first = fetch_add(arguments, TAKE)
        if first >= rows:
            return
        for row in range(first, min(first + TAKE, rows)):
            angle = 4 * half * peek_i32(positions + 4 * row)
            source = qkv + row * (q_heads + 2 * kv_heads) * size
            target = q + 4 * row * q_heads * head_dim
            turn = cosines + angle, sines + angle
            norm = q_norm, float_bits(epsilon)
            _turn_heads(source, target, q_heads, turn, half, kind, float_bits(q_scale), norm)
            source += q_heads * size
            target = turned_k + 4 * row * kv_heads * head_dim
            norm = k_norm, float_bits(epsilon)
            _turn_heads(source, target, kv_heads, turn, half, kind, float_bits(ONE), norm)
            source += kv_heads * size
            if peek_i64(row_bytes + 8 * row) < 0:
                continue
            layer = pool + peek_i64(row_bytes + 8 * row)
            vector = peek_i64(row_tokens + 8 * row) * kv_heads
            for head in range(kv_heads):
                data = (vector + head) * head_dim * SIZES[kv_kind]
                scale = (vector + head) * 4
                key = target + 4 * head * head_dim
                _write(key, FLOAT32, layer + k + data, layer + k_scale + scale, head_dim, kv_kind)
                value = source + head * size
                _write(value, kind, layer + v + data, layer + v_scale + scale, head_dim, kv_kind)


@njit(cache=True, error_model="numpy")
def _turn_heads(
    source: int,
    target: int,
    heads: int,
    turn: Any,
    half: int,
    kind: int,
    scale: float,
    norm: Any,
) -> None:
    """x, y -> x cos - y sin, y cos + x sin, where x and y are the halves of each head."""
    cosines, sines = turn
    weights, epsilon = norm
    for head in range(heads):
        x_at = 2 * half * head
        y_at = x_at + half
        shrink = splat_f32(1.0)
        if weights != 0:
            shrink = splat_f32(_inverse_rms(source, x_at, 2 * half, kind, epsilon))
        for start in range(0, half, LANES):
            # The last vector overlaps the one before it where half is no multiple of sixteen.
            i = min(start, half - LANES)
            x = load_values(source, x_at + i, kind)
            y = load_values(source, y_at + i, kind)
            if weights != 0:
                x = multiply(multiply(x, shrink), load_f32(weights + 4 * i))
                y = multiply(multiply(y, shrink), load_f32(weights + 4 * (half + i)))
            cosine = load_f32(cosines + 4 * i)
            sine = load_f32(sines + 4 * i)
            less = subtract(splat_f32(0.0), sine)
            factor = splat_f32(scale)
            turned_x = multiply(fma(y, less, multiply(x, cosine)), factor)
            turned_y = multiply(fma(x, sine, multiply(y, cosine)), factor)
            store_f32(target + 4 * (x_at + i), turned_x)
            store_f32(target + 4 * (y_at + i), turned_y)


@njit(cache=True, error_model="numpy")
def _write(source: int, kind: int, data: int, scale_at: int, width: int, kv_kind: int) -> None:
    """A vector of `kind` into the pool; in fp8 with the scale that makes its largest 448."""
    if kv_kind == FLOAT32:
        for i in range(0, width, LANES):
            store_f32(data + 4 * i, load_values(source, i, kind))
    elif kv_kind == BFLOAT16:
        for i in range(0, width, LANES):
            store_u16(data + 2 * i, to_bfloat16(load_values(source, i, kind)))
    else:
        zero, one = splat_f32(0.0), splat_f32(1.0)
        most, product = zero, zero
        for i in range(0, width, LANES):
            value = load_values(source, i, kind)
            most = larger(absolute(value), most)
            product = fma(value, zero, product)
        largest = largest_lane(most)
        # 0 times anything that is not finite is not a number, and so is the scale then.
        if sum_lanes(product) != 0.0:
            largest = math.nan
        scale = divide(splat_f32(largest), splat_f32(FP8_LARGEST))
        # A vector of zeros has scale 0, by which nothing can be divided; its codes are 0.
        divisor = if_less(zero, scale, scale, one)
        poke_f32(scale_at, largest_lane(scale))
        for i in range(0, width, LANES):
            value = divide(load_values(source, i, kind), divisor)
            store_u8(data + i, to_fp8(if_less(zero, scale, value, zero)))
