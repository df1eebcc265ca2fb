"""Attention over the latents of the paged pool as they are stored, for prefill and decode alike.

A query row is one head at one position. A work item is a run of a sequence's query rows, sixteen to
a vector; it walks the context in tiles of 64 keys, aligned to absolute positions. All heads share
a key, and its first values are the value too: so a tile is widened once for all the item's rows. It
stays row by row: a score takes a key's words one by one and a vector of query rows; the softmax goes
down the keys, lane by lane; an output takes a row's weights one by one and a vector of dimensions.

What a query row gets depends on nothing but itself and its context: a score is one chain over a
scale's dimensions, the scales' chains are added in order; an output is one chain over keys; the
running maximum and sum change tile by tile; tiles and keys beyond the row's position leave its state
as it is, bit for bit, whether they are skipped or masked.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from services.engine.torch.kernels import latent_tiles as tiles
from services.engine.torch.kernels.formats import (
    BFLOAT16,
    FLOAT32,
    FP8_E4M3,
    FP8_FROM_HALF,
    SIZES,
    even_halves,
    load_values,
    power_of_two,
    store_values,
    widen_fp8,
)
from services.engine.torch.kernels.latent_tiles import KEYS_AT_ONCE, ROWS_AT_ONCE
from services.engine.torch.kernels.simd import (
    LANES,
    add,
    add_i32,
    and_i32,
    bits,
    fetch_add,
    half_to_f32,
    if_less_i32,
    larger,
    left,
    load_f32,
    load_i32,
    load_u16,
    multiply,
    or_i32,
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
    unpack,
)
from services.engine.torch.kernels.team import entry
from services.engine.torch.kernels.tiles import transpose_words

# Keys in a tile.
KEYS = 64
# Query rows (positions times heads) in an item, at most; a multiple of LANES.
QUERY_ROWS = 64
MINUS_INFINITY = float("-inf")

ATTEND = (
    "tasks",
    "heads",
    "latent",
    "rope",
    "groups",
    "first_key",
    "kind",
    "kv_kind",
    "rope_kind",
    "word_kind",
    "q",
    "out",
    "pool",
    "block_bytes",
    "block_tokens",
    "to_latent",
    "to_scale",
    "to_rope",
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


def scratch_bytes(latent: int, rope: int, groups: int) -> int:
    """Memory that a thread needs, as `_divide` divides it, whatever the kind of words."""
    width = latent + rope
    end = 4 * (KEYS * width + KEYS * latent // 2 + QUERY_ROWS * (width + LANES))
    end += 4 * (KEYS * QUERY_ROWS * (1 + groups) + QUERY_ROWS * latent + groups * KEYS)
    end += 4 * 4 * QUERY_ROWS + 8 * LANES + 64
    return -(-end // 4096) * 4096


@njit(cache=True, error_model="numpy")
def _divide(scratch: int, latent: int, rope: int, groups: int) -> Any:
    """Addresses; w words a key, R = QUERY_ROWS; 32-bit words or float32, but addresses int64.

    keys [KEYS, w], values [KEYS / 2, latent] (pairs only), queries [R / LANES, w, LANES], scores
    [KEYS, R], weights [groups, KEYS, R] (pairs: half of it), outputs [R, latent], scales [groups,
    KEYS], sums, maxima, limits, factors [R], addresses [LANES].
    """
    keys = scratch
    values = keys + 4 * KEYS * (latent + rope)
    queries = values + 2 * KEYS * latent
    # Transposing writes up to LANES words beyond the last.
    scores = queries + 4 * QUERY_ROWS * (latent + rope + LANES)
    weights = scores + 4 * KEYS * QUERY_ROWS
    outputs = weights + 4 * groups * KEYS * QUERY_ROWS
    scales = outputs + 4 * QUERY_ROWS * latent
    sums = scales + 4 * groups * KEYS
    maxima = sums + 4 * QUERY_ROWS
    limits = maxima + 4 * QUERY_ROWS
    factors = limits + 4 * QUERY_ROWS
    addresses = factors + 4 * QUERY_ROWS
    return (
        keys, values, queries, scores, weights, outputs, scales, sums, maxima, limits, factors,
        addresses,
    )  # fmt: skip


@entry
def attend(arguments: int) -> None:
    """Out = softmax(q k) latent for every query row, over the context up to its own position.

    q [rows * heads, latent + rope] of word_kind, scaled by log2(e) times the softmax scale; out
    [rows * heads, latent] of `kind`. word_kind: FLOAT32, or BFLOAT16 for pairs; the latter not with
    a pool of float32. pool: address of this layer in the first block; block_bytes from block to
    block; to_*: bytes from the layer's start to the components, of kv_kind (with `groups` scales a
    token) and rope_kind; tables int32 [sequences, table_width]: blocks; positions int32 [rows],
    rising by one within a sequence, none below first_key, nor are keys looked at below it; task int32
    [tasks, 3]: sequence, first and end query row (row * heads + head), at most QUERY_ROWS. scratch:
    scratch_bytes for each thread; ticket: address of a zero, to share it out by.
    """
    (
        _, tasks, heads, latent, rope, groups, first_key, kind, kv_kind, rope_kind, word_kind, q, out,
        pool, block_bytes, block_tokens, to_latent, to_scale, to_rope, tables, table_width,
        positions, task, scratch, scratch_size, ticket,
    ) = _attend_arguments(arguments)  # fmt: skip
    mine = scratch + scratch_size * fetch_add(ticket, 1)
    words = (latent + rope) * SIZES[word_kind] // 4
    # Scales multiply scores and weights of pairs; float32 has them multiplied in already.
    scaled = groups if word_kind == BFLOAT16 and kv_kind == FP8_E4M3 else 0
    room = _divide(mine, latent, rope, groups)
    while True:
        item = fetch_add(arguments, 1)
        if item >= tasks:
            return
        here = task + 4 * TASK_FIELDS * item
        table = tables + 4 * table_width * peek_i32(here)
        first = peek_i32(here + 4)
        end = peek_i32(here + 8)
        _gather(q, positions, first, end, heads, words, latent, room)
        rows = -(-(end - first) // LANES) * LANES
        context = peek_i32(positions + 4 * ((end - 1) // heads)) + 1
        least = peek_i32(positions + 4 * (first // heads)) + 1
        for tile in range(first_key // KEYS * KEYS, context, KEYS):
            count = min(KEYS, context - tile)
            _widen(
                table, tile, first_key, count, pool, block_bytes, block_tokens, to_latent, to_scale,
                to_rope, latent, rope, groups, kv_kind, rope_kind, word_kind, room,
            )  # fmt: skip
            full = -(-count // KEYS_AT_ONCE) * KEYS_AT_ONCE
            _score(rows, full, latent, words, scaled, word_kind, room)
            masked = tile < first_key or tile + full > least
            for row in range(0, rows, LANES):
                _soften(row, tile, first_key, full, masked, scaled, word_kind, room)
            _add_values(end - first, full, latent, words, scaled, word_kind, room)
        _scatter(out + first * latent * SIZES[kind], end - first, latent, kind, room)


@njit(cache=True, error_model="numpy")
def _gather(
    q: int, positions: int, first: int, end: int, heads: int, words: int, latent: int, room: Any
) -> None:
    """Query rows into scratch, transposed, and a fresh state.

    Filled up to a multiple of LANES with copies of the last one, whose output goes nowhere.
    """
    _, _, queries, _, _, outputs, _, sums, maxima, limits, _, addresses = room
    for row in range(0, end - first, LANES):
        for lane in range(LANES):
            source = min(first + row + lane, end - 1)
            poke_i64(addresses + 8 * lane, q + 4 * words * source)
            poke_i32(limits + 4 * (row + lane), peek_i32(positions + 4 * (source // heads)))
        target = queries + 4 * row * words
        for begin in range(0, words, LANES):
            transpose_words(addresses, 4 * begin, target + 4 * begin * LANES)  # type: ignore[call-arg]
        store_f32(sums + 4 * row, splat_f32(0.0))
        store_f32(maxima + 4 * row, splat_f32(MINUS_INFINITY))
        for d in range(0, LANES * latent, LANES):
            store_f32(outputs + 4 * (row * latent + d), splat_f32(0.0))


@njit(cache=True, error_model="numpy")
def _widen(
    table: int, tile: int, first_key: int, count: int, pool: int, block_bytes: int,
    block_tokens: int, to_latent: int, to_scale: int, to_rope: int, latent: int, rope: int,
    groups: int, kv_kind: int, rope_kind: int, word_kind: int, room: Any,
) -> None:  # fmt: skip
    """The tile's keys as words, their scales, and the values as pairs of keys.

    Places below first_key and, up to a multiple of KEYS_AT_ONCE, beyond the count hold what a
    neighbour holds: no row looks at them, but what is read there must be a number.
    """
    keys, values, _, _, _, _, scales, _, _, _, _, _ = room
    words = (latent + rope) * SIZES[word_kind] // 4
    place = max(tile, first_key)
    index = place // block_tokens
    token = place % block_tokens
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
        if place <= tile + key < tile + count - 1:
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
        tiles.store_i32(target + 2 * i, or_i32(first, second))


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
            tiles.store_i32(target + 4 * d, both)


@njit(cache=True, error_model="numpy")
def _score(
    rows: int, count: int, latent: int, words: int, scaled: int, word_kind: int, room: Any
) -> None:
    """Scores of `count` keys with every query row: the rotary part, then scale by scale.

    Without scales (scaled 0) all in one.
    """
    keys, _, queries, scores, _, _, scales, _, _, _, _, _ = room
    parts = max(scaled, 1)
    size = latent * SIZES[word_kind] // 4 // parts
    for key in range(0, count, KEYS_AT_ONCE):
        a = keys + 4 * key * words
        row = 0
        while row < rows:
            two = row + 2 * LANES <= rows
            c = scores + 4 * (key * QUERY_ROWS + row)
            b = queries + 4 * row * words
            if scaled == 0:
                _product_of_scores(c, a, b, words, words, scales + 4 * key, two, False, word_kind)
            else:
                begin = size * parts
                _product_of_scores(
                    c, a + 4 * begin, b + 4 * LANES * begin, words, words - begin, 0, two, False,
                    word_kind,
                )  # fmt: skip
                for part in range(parts):
                    begin = size * part
                    _product_of_scores(
                        c, a + 4 * begin, b + 4 * LANES * begin, words, size,
                        scales + 4 * (part * KEYS + key), two, True, word_kind,
                    )  # fmt: skip
            row += 2 * LANES if two else LANES


@njit(cache=True, error_model="numpy")
def _product_of_scores(
    c: int, a: int, b: int, words: int, count: int, factors: int, two: bool, more: bool,
    word_kind: int,
) -> None:  # fmt: skip
    """KEYS_AT_ONCE keys, one or two vectors of query rows; `more`: added, times factors."""
    width = 4 * QUERY_ROWS
    row = 4 * words
    step = 4 * LANES
    if word_kind == FLOAT32:
        if two:
            tiles.scores_8x32_floats(c, width, a, row, 4, b, step, step * words, count, 0)
        else:
            tiles.scores_8x16_floats(c, width, a, row, 4, b, step, step * words, count, 0)
    elif more:
        if two:
            tiles.more_8x32_pairs(c, width, a, row, 4, b, step, step * words, count, factors)
        else:
            tiles.more_8x16_pairs(c, width, a, row, 4, b, step, step * words, count, factors)
    elif two:
        tiles.scores_8x32_pairs(c, width, a, row, 4, b, step, step * words, count, 0)
    else:
        tiles.scores_8x16_pairs(c, width, a, row, 4, b, step, step * words, count, 0)


@njit(cache=True, error_model="numpy")
def _soften(
    row: int, tile: int, first_key: int, count: int, masked: bool, scaled: int, word_kind: int,
    room: Any,
) -> None:  # fmt: skip
    """Sixteen rows' scores of the tile's first `count` keys into weights.

    Keys that a row may not see weigh 0. Leaves in factors what outputs so far must shrink by.
    """
    _, _, _, scores, weights, _, scales, sums, maxima, limits, factors, _ = room
    scores += 4 * row
    width = 4 * QUERY_ROWS
    if masked:
        limit = load_i32(limits + 4 * row)
        for key in range(count):
            place = splat_i32(tile + key if tile + key >= first_key else 0x7FFFFFFF)
            score = load_f32(scores + width * key)
            store_f32(
                scores + width * key, if_less_i32(limit, place, splat_f32(MINUS_INFINITY), score)
            )
    before = load_f32(maxima + 4 * row)
    # Four at a time: one after the other would wait for each.
    a, b, c, d = before, before, before, before
    for key in range(0, count, 4):
        a = larger(load_f32(scores + width * key), a)
        b = larger(load_f32(scores + width * (key + 1)), b)
        c = larger(load_f32(scores + width * (key + 2)), c)
        d = larger(load_f32(scores + width * (key + 3)), d)
    now = larger(larger(a, b), larger(c, d))
    store_f32(maxima + 4 * row, now)
    shrink = power_of_two(subtract(before, now))
    store_f32(factors + 4 * row, shrink)
    total = multiply(load_f32(sums + 4 * row), shrink)
    target = weights + 4 * row
    for key in range(0, count, 2):
        even = power_of_two(subtract(load_f32(scores + width * key), now))
        odd = power_of_two(subtract(load_f32(scores + width * (key + 1)), now))
        total = add(add(total, even), odd)
        if word_kind == FLOAT32:
            store_f32(target + width * key, even)
            store_f32(target + width * (key + 1), odd)
        elif scaled == 0:
            tiles.store_i32(target + width * (key // 2), _pair(even, odd))
        else:
            for part in range(scaled):
                scale = scales + 4 * (part * KEYS + key)
                pair = _pair(
                    multiply(even, splat_f32(peek_f32(scale))),
                    multiply(odd, splat_f32(peek_f32(scale + 4))),
                )
                tiles.store_i32(target + width * (part * KEYS + key) // 2, pair)
    store_f32(sums + 4 * row, total)


@njit(cache=True, error_model="numpy")
def _pair(even: Any, odd: Any) -> Any:
    """Two float32 of at least 0 as bfloat16, nearest, ties upward."""
    half = splat_i32(0x8000)
    low = right(add_i32(bits(even), half), 16)
    return or_i32(low, and_i32(add_i32(bits(odd), half), splat_i32(-65536)))


@njit(cache=True, error_model="numpy")
def _add_values(
    count: int, keys_count: int, latent: int, words: int, scaled: int, word_kind: int, room: Any
) -> None:
    """Outputs of `count` query rows: shrunk, plus weights times values."""
    keys, values, _, _, weights, outputs, _, _, _, _, factors, _ = room
    size = latent // max(scaled, 1)
    d = 0
    while d < latent:
        # A vector's weights are those of its scale.
        begin = d // size
        wide = d // size * size + size - d >= 4 * LANES
        for row in range(0, count, ROWS_AT_ONCE):
            c = outputs + 4 * (row * latent + d)
            factor = factors + 4 * row
            if word_kind == FLOAT32:
                a = weights + 4 * row
                _floats(c, a, keys + 4 * d, latent, words, keys_count, factor, wide)
            else:
                a = weights + 4 * row + 2 * QUERY_ROWS * KEYS * begin
                _pairs(c, a, values + 4 * d, latent, keys_count // 2, factor, wide)
        d += 4 * LANES if wide else LANES


@njit(cache=True, error_model="numpy")
def _floats(
    c: int, a: int, b: int, latent: int, words: int, count: int, factor: int, wide: bool
) -> None:
    width = 4 * latent
    step = 4 * QUERY_ROWS
    if wide:
        tiles.outputs_4x64_floats(c, width, a, 4, step, b, 4 * words, 4 * LANES, count, factor)
    else:
        tiles.outputs_4x16_floats(c, width, a, 4, step, b, 4 * words, 4 * LANES, count, factor)


@njit(cache=True, error_model="numpy")
def _pairs(c: int, a: int, b: int, latent: int, count: int, factor: int, wide: bool) -> None:
    width = 4 * latent
    step = 4 * QUERY_ROWS
    if wide:
        tiles.outputs_4x64_pairs(c, width, a, 4, step, b, width, 4 * LANES, count, factor)
    else:
        tiles.outputs_4x16_pairs(c, width, a, 4, step, b, width, 4 * LANES, count, factor)


@njit(cache=True, error_model="numpy")
def _scatter(out: int, count: int, latent: int, kind: int, room: Any) -> None:
    """Outputs, divided by their weights' sums, to where the values' projection reads them."""
    _, _, _, _, _, outputs, _, sums, _, _, _, _ = room
    for row in range(count):
        total = splat_f32(1.0 / peek_f32(sums + 4 * row))
        for d in range(0, latent, LANES):
            value = multiply(load_f32(outputs + 4 * (row * latent + d)), total)
            # Whether a zero is negative may tell how many masked keys were added: make it positive.
            store_values(out, row * latent + d, kind, add(value, splat_f32(0.0)))
