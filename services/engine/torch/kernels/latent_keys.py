"""Tiles of keys out of the pool, as the words that latent attention multiplies.

A key is its latent and rotary values next to each other, words as latent_tiles.py says. Of pairs
the products with weights sum over keys, so values are laid out a second time, by pairs of keys; the
scales of fp8 stay outside, since a code is a bfloat16 and its product with a scale is not. A key of
float32 has its scales multiplied in, and is the value too.
"""

from __future__ import annotations

from numba import njit

from services.engine.torch.kernels.formats import (
    BFLOAT16,
    FP8_E4M3,
    FP8_FROM_HALF,
    SIZES,
    even_halves,
    load_values,
    widen_fp8,
)
from services.engine.torch.kernels.latent_tiles import KEYS_AT_ONCE
from services.engine.torch.kernels.simd import (
    LANES,
    and_i32,
    bits,
    half_to_f32,
    left,
    load_f32,
    load_u16,
    multiply,
    or_i32,
    peek_f32,
    peek_i32,
    peek_i64,
    poke_f32,
    poke_i64,
    right,
    splat_f32,
    splat_i32,
    store_f32,
    store_i32,
)

# Keys in a tile.
KEYS = 64


@njit(cache=True, error_model="numpy")
def widen(
    table: int, tile: int, count: int, pool: int, block_bytes: int,
    block_tokens: int, to_latent: int, to_scale: int, to_rope: int, latent: int, rope: int,
    groups: int, kv_kind: int, rope_kind: int, word_kind: int, keys: int, values: int, scales: int,
) -> None:  # fmt: skip
    """A tile of the context: keys, the scales of pairs of fp8, and pairs' values by two keys.

    To keys [count, words], scales float32 [groups, KEYS], values [count / 2, latent]. tile: its
    first position; table: of the sequence; the rest as in latent.attend.
    Places beyond the count, up to a multiple of KEYS_AT_ONCE, repeat the last key: no row looks at
    them, but what is read there must be a number.
    """
    words = (latent + rope) * SIZES[word_kind] // 4
    index = tile // block_tokens
    token = tile % block_tokens
    layer = pool + block_bytes * peek_i32(table + 4 * index)
    for key in range(-(-count // KEYS_AT_ONCE) * KEYS_AT_ONCE):
        target = keys + 4 * key * words
        data = layer + to_latent + token * latent * SIZES[kv_kind]
        scale = layer + to_scale + token * groups * 4
        rotated = layer + to_rope + token * rope * SIZES[rope_kind]
        if word_kind == BFLOAT16:
            if kv_kind == FP8_E4M3:
                _widen_codes(data, target, latent)
                for group in range(groups):
                    poke_f32(
                        scales + 4 * (group * KEYS + key),
                        peek_f32(scale + 4 * group) * FP8_FROM_HALF,
                    )
            else:
                _copy(data, target, latent)
            _copy(rotated, target + 2 * latent, rope)
        else:
            if kv_kind == FP8_E4M3:
                _decode(data, scale, target, latent, groups)
            else:
                for i in range(0, latent, LANES):
                    store_f32(target + 4 * i, load_values(data, i, kv_kind))
            for i in range(0, rope, LANES):
                store_f32(target + 4 * (latent + i), load_values(rotated, i, rope_kind))
        if key < count - 1:
            token += 1
            if token == block_tokens:
                token = 0
                index += 1
                layer = pool + block_bytes * peek_i32(table + 4 * index)
    if word_kind == BFLOAT16:
        full = -(-count // KEYS_AT_ONCE) * KEYS_AT_ONCE
        _pair_keys(keys, values, full // 2, latent, words)


@njit(cache=True, error_model="numpy")
def _copy(source: int, target: int, count: int) -> None:
    """Bfloat16 values, a multiple of sixteen: reads none beyond them."""
    whole = count // (2 * LANES) * (2 * LANES)
    for i in range(0, whole, 2 * LANES):
        store_f32(target + 2 * i, load_f32(source + 2 * i))
    for i in range(whole, count, 4):
        poke_i64(target + 2 * i, peek_i64(source + 2 * i))


@njit(cache=True, error_model="numpy")
def _widen_codes(source: int, target: int, count: int) -> None:
    """fp8 codes, 32 at least, as bfloat16 of 2**-8 of their values: see FP8_FROM_HALF."""
    high = splat_i32(-65536)
    for start in range(0, count, 2 * LANES):
        # The last vector overlaps the one before it where count is no multiple of 32.
        i = min(start, count - 2 * LANES)
        two = load_u16(source + i)
        halves = even_halves(or_i32(two, left(two, 8)))
        first = right(bits(half_to_f32(halves)), 16)
        second = and_i32(bits(half_to_f32(right(halves, 16))), high)
        store_i32(target + 2 * i, or_i32(first, second))


@njit(cache=True, error_model="numpy")
def _decode(source: int, scale: int, target: int, count: int, groups: int) -> None:
    """fp8 codes as float32, scales multiplied in."""
    size = count // groups
    for group in range(groups):
        factor = splat_f32(peek_f32(scale + 4 * group) * FP8_FROM_HALF)
        for i in range(group * size, (group + 1) * size, LANES):
            store_f32(target + 4 * i, multiply(widen_fp8(source + i), factor))


@njit(cache=True, error_model="numpy")
def _pair_keys(keys: int, values: int, pairs: int, latent: int, words: int) -> None:
    """Values of keys 2 i and 2 i + 1 side by side, dimension by dimension."""
    for pair in range(pairs):
        even = keys + 8 * pair * words
        odd = even + 4 * words
        target = values + 4 * pair * latent
        for d in range(0, latent, LANES):
            both = or_i32(load_u16(even + 2 * d), left(load_u16(odd + 2 * d), 16))
            store_i32(target + 4 * d, both)
