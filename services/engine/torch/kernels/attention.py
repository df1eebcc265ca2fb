"""Attention over the paged pool as it is stored, for prefill and decode alike.

A work item is one KV head and a run of a sequence's rows (query positions). It walks the context
in tiles of 64 keys, aligned to absolute positions; a tile's keys and values are widened to float32
once, for all query rows of the item. What a query row gets depends on nothing but itself and its
context: a score is one chain of multiply-adds over the head's dimensions; an output one chain over
keys, in order; the running maximum and sum change tile by tile; tiles beyond the row's position
leave its state as it is, bit for bit, whether they are skipped or masked.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from services.engine.torch.kernels.formats import (
    BFLOAT16,
    FP8_E4M3,
    FP8_FROM_HALF,
    SIZES,
    even_halves,
    load_values,
    odd_halves,
    power_of_two,
    store_values,
    widen_fp8,
)
from services.engine.torch.kernels.simd import (
    LANES,
    add,
    add_i32,
    and_i32,
    fetch_add,
    from_bits,
    half_to_f32,
    if_less_i32,
    lanes,
    larger,
    largest_lane,
    left,
    load_f32,
    load_i32,
    multiply,
    peek_f32,
    peek_i32,
    peek_i64,
    poke_f32,
    poke_i32,
    poke_i64,
    right,
    splat_f32,
    splat_i32,
    store_f32,
    subtract,
    sum_lanes,
    unpack,
)
from services.engine.torch.kernels.team import entry
from services.engine.torch.kernels.tiles import (
    ROWS,
    WORDS,
    outputs_4x16,
    outputs_4x64,
    scores_4x64,
    transpose_words,
)

# Keys in a tile.
KEYS = 64
# Query rows (positions times heads of a group) in an item, at most; a multiple of ROWS.
QUERY_ROWS = 64
MINUS_INFINITY = float("-inf")

ATTEND = (
    "tasks",
    "kv_heads",
    "first_kv",
    "pool_heads",
    "group",
    "head_dim",
    "kind",
    "kv_kind",
    "q",
    "out",
    "pool",
    "block_bytes",
    "block_tokens",
    "k",
    "v",
    "k_scale",
    "v_scale",
    "tables",
    "table_width",
    "positions",
    "task",
    "scratch",
    "scratch_bytes",
    "ticket",
)
_attend_arguments = unpack(len(ATTEND) + 1)
TASK_FIELDS = 3


def scratch_bytes(head_dim: int) -> int:
    """Memory that a thread needs, as `_divide` divides it."""
    end = 4 * (KEYS * head_dim * 2 + QUERY_ROWS * head_dim * 2 + ROWS * KEYS + WORDS * LANES)
    end += 4 * (2 * KEYS + QUERY_ROWS * (LANES + 2) + LANES) + 8 * KEYS
    return -(-end // 4096) * 4096


@njit(cache=True, error_model="numpy")
def _divide(scratch: int, head_dim: int) -> Any:
    """Addresses, all float32 but for limits int32 and addresses int64.

    keys [head_dim, KEYS], values [KEYS, head_dim], queries and outputs [QUERY_ROWS, head_dim],
    weights [ROWS, KEYS], words [WORDS, LANES], k_scales and v_scales [KEYS], sums [QUERY_ROWS,
    LANES], maxima [QUERY_ROWS], limits [QUERY_ROWS], factors [ROWS], addresses [KEYS].
    """
    keys = scratch
    values = keys + 4 * KEYS * head_dim
    queries = values + 4 * KEYS * head_dim
    outputs = queries + 4 * QUERY_ROWS * head_dim
    weights = outputs + 4 * QUERY_ROWS * head_dim
    words = weights + 4 * ROWS * KEYS
    k_scales = words + 4 * WORDS * LANES
    v_scales = k_scales + 4 * KEYS
    sums = v_scales + 4 * KEYS
    maxima = sums + 4 * QUERY_ROWS * LANES
    limits = maxima + 4 * QUERY_ROWS
    factors = limits + 4 * QUERY_ROWS
    addresses = factors + 4 * LANES
    return (
        keys, values, queries, outputs, weights, words, k_scales, v_scales, sums, maxima, limits,
        factors, addresses,
    )  # fmt: skip


@entry
def attend(arguments: int) -> None:
    """Out = softmax(q k) v for every row, over the context up to the row's own position.

    q float32 [rows, kv_heads * group, head_dim], scaled by log2(e) / sqrt(head_dim); out the same
    shape, of `kind`. These KV heads are those from first_kv on of the pool's pool_heads. pool:
    address of this layer in the first block; block_bytes from block to block; k, v, k_scale,
    v_scale: bytes from the layer's start to the components, of `kv_kind`; tables int32 [sequences,
    table_width]: blocks; positions int32 [rows], rising by one within a sequence; task int32
    [tasks, 3]: sequence, first row, end row, at most QUERY_ROWS // group rows. scratch:
    scratch_bytes for each thread; ticket: address of a zero, to share it out by.
    """
    (
        _, tasks, kv_heads, first_kv, pool_heads, group, head_dim, kind, kv_kind, q, out, pool,
        block_bytes, block_tokens, k, v, k_scale, v_scale, tables, table_width, positions, task,
        scratch, scratch_size, ticket,
    ) = _attend_arguments(arguments)  # fmt: skip
    mine = scratch + scratch_size * fetch_add(ticket, 1)
    room = _divide(mine, head_dim)
    row_width = kv_heads * group * head_dim
    while True:
        item = fetch_add(arguments, 1)
        if item >= tasks * kv_heads:
            return
        head = item % kv_heads
        here = task + 4 * TASK_FIELDS * (item // kv_heads)
        first = peek_i32(here + 4)
        end = peek_i32(here + 8)
        table = tables + 4 * table_width * peek_i32(here)
        start = first * row_width + head * group * head_dim
        rows = _gather(q + 4 * start, positions + 4 * first, end - first, row_width, group,
                       head_dim, room)  # fmt: skip
        context = peek_i32(positions + 4 * (end - 1)) + 1
        for tile in range(0, context, KEYS):
            count = min(KEYS, context - tile)
            _locate(table, tile, count, pool, block_bytes, block_tokens, pool_heads,
                    first_kv + head, head_dim * SIZES[kv_kind], k_scale, v_scale, kv_kind,
                    room)  # fmt: skip
            _widen_keys(k, count, head_dim, kv_kind, room)
            _widen_values(v, count, head_dim, kv_kind, room)
            for row in range(0, rows, ROWS):
                _attend_rows(row, tile, count, head_dim, kv_kind, room)
        _scatter(out + SIZES[kind] * start, end - first, row_width, group, head_dim, kind, room)


@njit(cache=True, error_model="numpy")
def _gather(
    q: int, positions: int, count: int, row_width: int, group: int, head_dim: int, room: Any
) -> int:
    """Query rows into scratch, (position, head) after (position, head), and a fresh state.

    Returns their number, filled up to a multiple of ROWS with rows whose output goes nowhere.
    """
    _, _, queries, outputs, _, _, _, _, sums, maxima, limits, _, _ = room
    rows = -(-count * group // ROWS) * ROWS
    zero = splat_f32(0.0)
    for row in range(rows):
        position = min(row // group, count - 1)
        source = q + 4 * (position * row_width + row % group * head_dim)
        for d in range(0, head_dim, LANES):
            store_f32(queries + 4 * (row * head_dim + d), load_f32(source + 4 * d))
            store_f32(outputs + 4 * (row * head_dim + d), zero)
        store_f32(sums + 4 * row * LANES, zero)
        poke_f32(maxima + 4 * row, MINUS_INFINITY)
        poke_i32(limits + 4 * row, peek_i32(positions + 4 * position))
    return rows


@njit(cache=True, error_model="numpy")
def _locate(
    table: int, tile: int, count: int, pool: int, block_bytes: int, block_tokens: int,
    kv_heads: int, head: int, vector_bytes: int, k_scale: int, v_scale: int, kv_kind: int,
    room: Any,
) -> None:  # fmt: skip
    """Where the tile's vectors are (from the start of k or v), and their scales.

    Places beyond the count repeat the last one, so that what is read there is a number.
    """
    _, _, _, _, _, _, k_scales, v_scales, _, _, _, _, addresses = room
    index = tile // block_tokens
    token = tile % block_tokens
    layer = pool + block_bytes * peek_i32(table + 4 * index)
    for key in range(-(-count // LANES) * LANES):
        vector = token * kv_heads + head
        poke_i64(addresses + 8 * key, layer + vector * vector_bytes)
        if kv_kind == FP8_E4M3:
            poke_f32(k_scales + 4 * key, peek_f32(layer + k_scale + 4 * vector) * FP8_FROM_HALF)
            poke_f32(v_scales + 4 * key, peek_f32(layer + v_scale + 4 * vector) * FP8_FROM_HALF)
        if key + 1 < count:
            token += 1
            if token == block_tokens:
                token = 0
                index += 1
                layer = pool + block_bytes * peek_i32(table + 4 * index)


@njit(cache=True, error_model="numpy")
def _widen_keys(k: int, count: int, head_dim: int, kv_kind: int, room: Any) -> None:
    """Keys of the tile into scratch as float32, transposed."""
    keys, _, _, _, _, words, _, _, _, _, _, _, addresses = room
    total = head_dim * SIZES[kv_kind] // 4
    for key in range(0, count, LANES):
        for begin in range(0, total, WORDS):
            transpose_words(addresses + 8 * key, k + 4 * begin, words)  # type: ignore[call-arg]
            for word in range(min(WORDS, total - begin)):
                codes = load_i32(words + 4 * word * LANES)
                target = keys + 4 * key + 4 * KEYS * (begin + word) * (4 // SIZES[kv_kind])
                if kv_kind == FP8_E4M3:
                    even = even_halves(codes)
                    odd = odd_halves(codes)
                    store_f32(target, half_to_f32(even))
                    store_f32(target + 4 * KEYS, half_to_f32(odd))
                    store_f32(target + 8 * KEYS, half_to_f32(right(even, 16)))
                    store_f32(target + 12 * KEYS, half_to_f32(right(odd, 16)))
                elif kv_kind == BFLOAT16:
                    store_f32(target, from_bits(left(codes, 16)))
                    store_f32(target + 4 * KEYS, from_bits(and_i32(codes, splat_i32(-65536))))
                else:
                    store_f32(target, from_bits(codes))


@njit(cache=True, error_model="numpy")
def _widen_values(v: int, count: int, head_dim: int, kv_kind: int, room: Any) -> None:
    """Values of the tile into scratch as float32."""
    _, values, _, _, _, _, _, _, _, _, _, _, addresses = room
    for key in range(count):
        source = peek_i64(addresses + 8 * key) + v
        target = values + 4 * key * head_dim
        for d in range(0, head_dim, LANES):
            if kv_kind == FP8_E4M3:
                store_f32(target + 4 * d, widen_fp8(source + d))
            else:
                store_f32(target + 4 * d, load_values(source, d, kv_kind))


@njit(cache=True, error_model="numpy")
def _attend_rows(row: int, tile: int, count: int, head_dim: int, kv_kind: int, room: Any) -> None:
    """ROWS query rows meet the tile."""
    (
        keys,
        values,
        queries,
        outputs,
        weights,
        _,
        k_scales,
        v_scales,
        sums,
        maxima,
        limits,
        (factors),
        _,
    ) = room
    # Limits rise from row to row.
    seen = min(count, peek_i32(limits + 4 * (row + ROWS - 1)) + 1 - tile)
    if seen <= 0:
        return
    width = 4 * head_dim
    scores_4x64(weights, 4 * KEYS, queries + row * width, width, keys, 4 * KEYS, head_dim, 0)
    for r in range(ROWS):
        _soften(
            weights + 4 * KEYS * r,
            peek_i32(limits + 4 * (row + r)) - tile,
            k_scales if kv_kind == FP8_E4M3 else 0,
            v_scales,
            sums + 4 * LANES * (row + r),
            maxima + 4 * (row + r),
            factors + 4 * r,
        )
    d = 0
    while d + 4 * LANES <= head_dim:
        target = outputs + row * width + 4 * d
        outputs_4x64(target, width, weights, 4 * KEYS, values + 4 * d, width, seen, factors)
        d += 4 * LANES
    while d < head_dim:
        target = outputs + row * width + 4 * d
        outputs_4x16(target, width, weights, 4 * KEYS, values + 4 * d, width, seen, factors)
        d += LANES


@njit(cache=True, error_model="numpy")
def _soften(
    weights: int, limit: int, k_scales: int, v_scales: int, sums: int, maximum: int, factor: int
) -> None:
    """A row's scores of a tile into weights, against the largest score so far.

    Keys beyond `limit` weigh 0. Leaves in `factor` what the row's output so far must shrink by.
    """
    before = splat_f32(peek_f32(maximum))
    best = before
    last = splat_i32(limit)
    for c in range(0, KEYS, LANES):
        score = load_f32(weights + 4 * c)
        if k_scales != 0:
            score = multiply(score, load_f32(k_scales + 4 * c))
        if limit < c + LANES:
            lane = add_i32(lanes(), splat_i32(c))
            score = if_less_i32(last, lane, splat_f32(MINUS_INFINITY), score)
        store_f32(weights + 4 * c, score)
        best = larger(score, best)
    most = largest_lane(best)
    poke_f32(maximum, most)
    now = splat_f32(most)
    shrink = power_of_two(subtract(before, now))
    poke_f32(factor, largest_lane(shrink))
    total = multiply(load_f32(sums), shrink)
    for c in range(0, KEYS, LANES):
        weight = power_of_two(subtract(load_f32(weights + 4 * c), now))
        total = add(total, weight)
        if k_scales != 0:
            weight = multiply(weight, load_f32(v_scales + 4 * c))
        store_f32(weights + 4 * c, weight)
    store_f32(sums, total)


@njit(cache=True, error_model="numpy")
def _scatter(
    out: int, count: int, row_width: int, group: int, head_dim: int, kind: int, room: Any
) -> None:
    """Outputs, divided by their weights' sums, to where the next layer reads them."""
    _, _, _, outputs, _, _, _, _, sums, _, _, _, _ = room
    for row in range(count * group):
        total = splat_f32(1.0 / sum_lanes(load_f32(sums + 4 * row * LANES)))
        target = row // group * row_width + row % group * head_dim
        for d in range(0, head_dim, LANES):
            value = multiply(load_f32(outputs + 4 * (row * head_dim + d)), total)
            # Whether a zero is negative may tell how many masked keys were added: make it positive.
            store_values(out, target + d, kind, add(value, splat_f32(0.0)))
