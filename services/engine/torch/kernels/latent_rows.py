"""What goes row by row in latent attention: KV into the pool, queries into latent space and back.

A head's part of kv_b_proj is used in two products: keys [nope, latent], which carries its query
into the space of latents, and values [latent, value], which carries its output out of it. Every
element of a product is one chain over the words of the summed dimension (latent_tiles.py), so rows
don't depend on each other.
"""

from __future__ import annotations

import math

from numba import njit

from services.engine.torch.kernels import latent_tiles as tiles
from services.engine.torch.kernels.formats import (
    BFLOAT16,
    FLOAT32,
    SIZES,
    load_values,
    store_values,
)
from services.engine.torch.kernels.rows import TAKE, _write
from services.engine.torch.kernels.simd import (
    LANES,
    fetch_add,
    float_bits,
    fma,
    load_f32,
    multiply,
    peek_i64,
    splat_f32,
    store_f32,
    sum_lanes,
    unpack,
)
from services.engine.torch.kernels.team import entry

# Columns of a weight that lie next to each other, where its width is a multiple; else LANES.
WIDE = 64
VECTOR_BYTES = 4 * LANES
# Rows of one head that a thread takes at a time: its weight is read once for them.
HEAD_ROWS = 64

WRITE = (
    "rows",
    "latent",
    "rope",
    "interleaved",
    "kind",
    "epsilon",
    "kv",
    "kv_bytes",
    "norm",
    "cosines",
    "sines",
    "work",
    "pool",
    "kv_kind",
    "rope_kind",
    "groups",
    "row_bytes",
    "row_tokens",
    "to_latent",
    "to_scale",
    "to_rope",
)
_write_arguments = unpack(len(WRITE) + 1)


@entry
def write(arguments: int) -> None:
    """Latents normalized, keys rotated, both into the pool.

    kv: row r is latent + rope values of `kind` at kv + r * kv_bytes; norm float32 [latent];
    cosines, sines float32 [rows, rope] as `rotate` takes them; work float32 [rows, latent + 2 *
    rope]. pool: address of this layer in the first block; row_bytes int64 [rows]: bytes from there
    to the row's block, negative: it is not written; row_tokens int64 [rows]: its token in the
    block; to_*: bytes from the layer's start to the components, of kv_kind (`groups` scales a
    token) and rope_kind.
    """
    (
        _, rows, latent, rope, interleaved, kind, epsilon, kv, kv_bytes, norm, cosines, sines, work,
        pool, kv_kind, rope_kind, groups, row_bytes, row_tokens, to_latent, to_scale, to_rope,
    ) = _write_arguments(arguments)  # fmt: skip
    size = latent // groups
    while True:
        first = fetch_add(arguments, TAKE)
        if first >= rows:
            return
        for row in range(first, min(first + TAKE, rows)):
            block = peek_i64(row_bytes + 8 * row)
            if block < 0:
                continue
            source = kv + kv_bytes * row
            mine = work + 4 * row * (latent + 2 * rope)
            turned = mine + 4 * latent
            turn = 4 * row * rope
            _normalize(source, mine, norm, latent, kind, float_bits(epsilon))
            rotate(source + SIZES[kind] * latent, turned, turned, cosines + turn, sines + turn,
                   rope, interleaved, kind, FLOAT32, 1.0)  # fmt: skip
            layer = pool + block
            token = peek_i64(row_tokens + 8 * row)
            values = layer + to_latent + token * latent * SIZES[kv_kind]
            scales = layer + to_scale + token * groups * 4
            for group in range(groups):
                data = values + group * size * SIZES[kv_kind]
                _write(mine + 4 * group * size, FLOAT32, data, scales + 4 * group, size, kv_kind)
            data = layer + to_rope + token * rope * SIZES[rope_kind]
            _write(turned, FLOAT32, data, 0, rope, rope_kind)


@njit(cache=True, error_model="numpy")
def _normalize(
    source: int, target: int, weight: int, width: int, kind: int, epsilon: float
) -> None:
    """Target float32 = source / rms(source) * weight."""
    squares = splat_f32(0.0)
    for i in range(0, width, LANES):
        value = load_values(source, i, kind)
        squares = fma(value, value, squares)
    mean = float(sum_lanes(squares)) / width
    scale = splat_f32(1.0 / math.sqrt(mean + float(epsilon)))
    for i in range(0, width, LANES):
        value = multiply(load_values(source, i, kind), scale)
        store_f32(target + 4 * i, multiply(value, load_f32(weight + 4 * i)))


@njit(cache=True, error_model="numpy")
def rotate(
    source: int, work: int, target: int, cosines: int, sines: int, rope: int, interleaved: int,
    kind: int, target_kind: int, scale: float,
) -> None:  # fmt: skip
    """A rotary vector of `kind`: x cos + partner sin, times scale, into target.

    Partners are neighbours (interleaved) or half of `rope` apart; cosines and sines float32 [rope],
    sines of a pair's first value negative. work: float32 [2 * rope]; target may be its start.
    """
    for i in range(0, rope, LANES):
        value = load_values(source, i, kind)
        store_f32(work + 4 * i, value)
        store_f32(work + 4 * (rope + i), value)
    for i in range(0, rope, LANES):
        x = load_values(source, i, kind)
        # Half of rope on: in the second copy, or in what the target has not overwritten yet.
        half = load_f32(work + 4 * (i + rope // 2))
        partner = tiles.swap_neighbours(x) if interleaved else half  # type: ignore[call-arg]
        turned = fma(partner, load_f32(sines + 4 * i), multiply(x, load_f32(cosines + 4 * i)))
        store_values(target, i, target_kind, multiply(turned, splat_f32(scale)))


ABSORB = (
    "rows",
    "heads",
    "nope",
    "rope",
    "latent",
    "interleaved",
    "kind",
    "out_kind",
    "scale",
    "q",
    "q_bytes",
    "keys",
    "cosines",
    "sines",
    "out",
    "scratch",
    "scratch_bytes",
    "ticket",
)
_absorb_arguments = unpack(len(ABSORB) + 1)


@entry
def absorb(arguments: int) -> None:
    """Queries in latent space: out[r, h] = (q_nope[r, h] @ keys[h], rotated q_rope[r, h]) * scale.

    q: row r is heads * (nope + rope) values of `kind` at q + r * q_bytes; keys: weights as
    `latent_steps.pack` lays them out, [heads, nope, latent]; cosines, sines as in `write`; out
    [rows, heads, latent + rope] of out_kind; scale: bits of a float32; scratch: `scratch_bytes` for
    each thread; ticket: address of a zero.
    """
    (
        _, rows, heads, nope, rope, latent, interleaved, kind, out_kind, scale, q, q_bytes, keys,
        cosines, sines, out, scratch, scratch_size, ticket,
    ) = _absorb_arguments(arguments)  # fmt: skip
    mine = scratch + scratch_size * fetch_add(ticket, 1)
    size = SIZES[kind]
    width = (latent + rope) * SIZES[out_kind]
    chunks = -(-rows // HEAD_ROWS)
    while True:
        item = fetch_add(arguments, 1)
        if item >= heads * chunks:
            return
        head = item // chunks
        first = item % chunks * HEAD_ROWS
        count = min(HEAD_ROWS, rows - first)
        source = q + first * q_bytes + head * (nope + rope) * size
        target = out + (first * heads + head) * width
        weight = keys + head * nope * latent * size
        _linear(source, q_bytes, weight, target, heads * width, count, nope, latent, kind, out_kind,
                float_bits(scale), mine)  # fmt: skip
        for row in range(count):
            turn = 4 * (first + row) * rope
            rotate(
                source + row * q_bytes + nope * size, mine,
                target + row * heads * width + latent * SIZES[out_kind],
                cosines + turn, sines + turn, rope, interleaved, kind, out_kind, float_bits(scale),
            )  # fmt: skip


PROJECT = (
    "rows",
    "heads",
    "latent",
    "value",
    "kind",
    "attended",
    "values",
    "out",
    "scratch",
    "scratch_bytes",
    "ticket",
)
_project_arguments = unpack(len(PROJECT) + 1)


@entry
def project(arguments: int) -> None:
    """out[r, h] = attended[r, h] @ values[h].

    attended [rows, heads, latent], out [rows, heads, value], all of `kind`; values: weights as
    `latent_steps.pack` lays them out, [heads, latent, value]; scratch and ticket as in `absorb`.
    """
    (
        _, rows, heads, latent, value, kind, attended, values, out, scratch, scratch_size, ticket,
    ) = _project_arguments(arguments)  # fmt: skip
    mine = scratch + scratch_size * fetch_add(ticket, 1)
    size = SIZES[kind]
    chunks = -(-rows // HEAD_ROWS)
    while True:
        item = fetch_add(arguments, 1)
        if item >= heads * chunks:
            return
        head = item // chunks
        first = item % chunks * HEAD_ROWS
        count = min(HEAD_ROWS, rows - first)
        source = attended + (first * heads + head) * latent * size
        target = out + (first * heads + head) * value * size
        weight = values + head * latent * value * size
        _linear(source, heads * latent * size, weight, target, heads * value * size, count, latent,
                value, kind, kind, 1.0, mine)  # fmt: skip


def scratch_bytes(rope: int) -> int:
    """Memory that a thread of `absorb` or `project` needs."""
    return max(4 * tiles.ROWS_AT_ONCE * WIDE, 8 * rope)


@njit(cache=True, error_model="numpy")
def _linear(
    source: int, source_bytes: int, weight: int, target: int, target_bytes: int, rows: int,
    inputs: int, outputs: int, kind: int, target_kind: int, scale: float, work: int,
) -> None:  # fmt: skip
    """Rows [rows, inputs] of `kind` times weight, times scale, to target [rows, outputs].

    weight: column blocks of WIDE or LANES, one after another, each [words of inputs, columns].
    """
    columns = WIDE if outputs % WIDE == 0 else LANES
    words = inputs * SIZES[kind] // 4
    for column in range(0, outputs, columns):
        block = weight + 4 * words * column
        to = target + SIZES[target_kind] * column
        row = 0
        while row < rows:
            at_once = tiles.ROWS_AT_ONCE if row + tiles.ROWS_AT_ONCE <= rows else 1
            _tile(work, source + row * source_bytes, source_bytes, block, words, at_once, columns,
                  kind)  # fmt: skip
            for r in range(at_once):
                for i in range(0, columns, LANES):
                    value = multiply(load_f32(work + 4 * (r * columns + i)), splat_f32(scale))
                    store_values(to + (row + r) * target_bytes, i, target_kind, value)
            row += at_once


@njit(cache=True, error_model="numpy")
def _tile(
    c: int, a: int, a_row: int, b: int, words: int, rows: int, columns: int, kind: int
) -> None:
    """To c float32 [rows, columns], of 4 or 1 rows, WIDE or LANES columns."""
    width = 4 * columns
    if kind == BFLOAT16:
        if columns == WIDE:
            if rows == 1:
                tiles.linear_1x64_pairs(c, width, a, a_row, 4, b, width, VECTOR_BYTES, words, 0)
            else:
                tiles.linear_4x64_pairs(c, width, a, a_row, 4, b, width, VECTOR_BYTES, words, 0)
        elif rows == 1:
            tiles.linear_1x16_pairs(c, width, a, a_row, 4, b, width, VECTOR_BYTES, words, 0)
        else:
            tiles.linear_4x16_pairs(c, width, a, a_row, 4, b, width, VECTOR_BYTES, words, 0)
    elif columns == WIDE:
        if rows == 1:
            tiles.linear_1x64_floats(c, width, a, a_row, 4, b, width, VECTOR_BYTES, words, 0)
        else:
            tiles.linear_4x64_floats(c, width, a, a_row, 4, b, width, VECTOR_BYTES, words, 0)
    elif rows == 1:
        tiles.linear_1x16_floats(c, width, a, a_row, 4, b, width, VECTOR_BYTES, words, 0)
    else:
        tiles.linear_4x16_floats(c, width, a, a_row, 4, b, width, VECTOR_BYTES, words, 0)
