"""Attention over the latents of the paged pool as they are stored, for prefill and decode alike.

A query row is one head at one position. A work item is a run of a sequence's query rows, sixteen to
a vector; it walks the context in tiles of 64 keys, aligned to absolute positions. All heads share
a key, and its latent is the value too: so a tile is widened once for all the item's rows, and stays
as it is, key by key: a score takes a key's words one by one and a vector of query rows; the softmax
goes down the keys, lane by lane; an output takes a row's weights one by one and a vector of
dimensions.

What a query row gets depends on nothing but itself and its context: a score is one chain over a
scale's dimensions, the scales' chains are added in order; an output is one chain over a segment's
keys; the running maximum and sum change tile by tile; segments, at absolute positions too, start
afresh and are merged in order. So segments may be attended to by several threads at once, and long
contexts of few rows are. Tiles, segments and keys beyond the row's position leave its state as it
is, bit for bit, whether they are skipped or masked.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from services.engine.torch.kernels import latent_tiles as tiles
from services.engine.torch.kernels.formats import (
    BFLOAT16,
    FLOAT32,
    FP8_E4M3,
    SIZES,
    power_of_two,
    store_values,
)
from services.engine.torch.kernels.latent_keys import KEYS, widen
from services.engine.torch.kernels.latent_tiles import KEYS_AT_ONCE, ROWS_AT_ONCE
from services.engine.torch.kernels.simd import (
    LANES,
    add,
    add_i32,
    and_i32,
    bits,
    fetch_add,
    fma,
    if_less_i32,
    larger,
    largest_lane,
    load_f32,
    load_i32,
    multiply,
    or_i32,
    peek_f32,
    peek_i32,
    poke_f32,
    poke_i32,
    poke_i64,
    right,
    splat_f32,
    splat_i32,
    store_f32,
    store_i32,
    subtract,
    unpack,
)
from services.engine.torch.kernels.team import entry
from services.engine.torch.kernels.tiles import transpose_words

# Query rows (positions times heads) in an item, at most; a multiple of LANES.
QUERY_ROWS = 64
# Keys whose outputs are summed up by themselves; a multiple of KEYS.
SEGMENT = 512
MINUS_INFINITY = float("-inf")

ATTEND = (
    "tasks",
    "heads",
    "latent",
    "rope",
    "groups",
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
    "partial",
    "partial_rows",
    "scratch",
    "scratch_bytes",
    "ticket",
)
_attend_arguments = unpack(len(ATTEND) + 1)
TASK_FIELDS = 5

MERGE = (
    "tasks",
    "latent",
    "kind",
    "out",
    "task",
    "partial",
    "partial_rows",
    "scratch",
    "scratch_bytes",
    "ticket",
)
_merge_arguments = unpack(len(MERGE) + 1)
MERGE_FIELDS = 4


def scratch_bytes(latent: int, rope: int, groups: int) -> int:
    """Memory that a thread needs, as `_divide` divides it, whatever the kind of words."""
    width = latent + rope
    end = 4 * (KEYS * width + KEYS * latent // 2 + QUERY_ROWS * (width + LANES))
    end += 4 * (KEYS * QUERY_ROWS * (1 + groups) + groups * KEYS)
    end += 2 * 4 * QUERY_ROWS * (latent + 2) + 2 * 4 * QUERY_ROWS + 8 * LANES
    return -(-end // 4096) * 4096


@njit(cache=True, error_model="numpy")
def _divide(scratch: int, latent: int, rope: int, groups: int) -> Any:
    """Addresses; w words a key, R = QUERY_ROWS; 32-bit words or float32, but addresses int64.

    keys [KEYS, w], values [KEYS / 2, latent] (pairs only), queries [R / LANES, w, LANES], scores
    [KEYS, R], weights [groups, KEYS, R] (pairs: half of it), scales [groups, KEYS], limits, factors
    [R], addresses [LANES], and two states: the segment's, and that of all up to it.
    """
    keys = scratch
    values = keys + 4 * KEYS * (latent + rope)
    queries = values + 2 * KEYS * latent
    # Transposing writes up to LANES words beyond the last.
    scores = queries + 4 * QUERY_ROWS * (latent + rope + LANES)
    weights = scores + 4 * KEYS * QUERY_ROWS
    scales = weights + 4 * groups * KEYS * QUERY_ROWS
    limits = scales + 4 * groups * KEYS
    factors = limits + 4 * QUERY_ROWS
    addresses = factors + 4 * QUERY_ROWS
    state = addresses + 8 * LANES
    whole = state + 4 * QUERY_ROWS * (latent + 2)
    return (
        keys, values, queries, scores, weights, scales, limits, factors, addresses,
        _state(state, QUERY_ROWS, latent), _state(whole, QUERY_ROWS, latent),
    )  # fmt: skip


@njit(cache=True, error_model="numpy")
def _state(start: int, rows: int, latent: int) -> Any:
    """Addresses, all float32: outputs [rows, latent], sums [rows], maxima [rows]."""
    sums = start + 4 * rows * latent
    return start, sums, sums + 4 * rows


@entry
def attend(arguments: int) -> None:
    """Out = softmax(q k) latent for every query row, over the context up to its own position.

    q [rows * heads, latent + rope] of word_kind, scaled by log2(e) times the softmax scale; out
    [rows * heads, latent] of `kind`. word_kind: FLOAT32, or BFLOAT16 for pairs; the latter not with
    a pool of float32. pool: address of this layer in the first block; block_bytes from block to
    block; to_*: bytes from the layer's start to the components, of kv_kind (with `groups` scales a
    token) and rope_kind; tables int32 [sequences, table_width]: blocks; positions int32 [rows],
    rising by one within a sequence. task int32 [tasks, 5]: sequence; first and end query row (row *
    heads + head), at most QUERY_ROWS; segment, or -1 for all of them; where the segment's state
    goes in `partial`, a state (see `_state`) of partial_rows rows, that `merge` makes out of.
    scratch: scratch_bytes for each thread; ticket: address of a zero, to share it out by.
    """
    (
        _, tasks, heads, latent, rope, groups, kind, kv_kind, rope_kind, word_kind, q, out, pool,
        block_bytes, block_tokens, to_latent, to_scale, to_rope, tables, table_width, positions,
        task, partial, partial_rows, scratch, scratch_size, ticket,
    ) = _attend_arguments(arguments)  # fmt: skip
    mine = scratch + scratch_size * fetch_add(ticket, 1)
    # Scales multiply scores and weights of pairs; float32 has them multiplied in already.
    scaled = groups if word_kind == BFLOAT16 and kv_kind == FP8_E4M3 else 0
    words = (latent + rope) * SIZES[word_kind] // 4
    room = _divide(mine, latent, rope, groups)
    state, whole = room[9], room[10]
    while True:
        item = fetch_add(arguments, 1)
        if item >= tasks:
            return
        here = task + 4 * TASK_FIELDS * item
        table = tables + 4 * table_width * peek_i32(here)
        first, end = peek_i32(here + 4), peek_i32(here + 8)
        segment = peek_i32(here + 12)
        rows = -(-(end - first) // LANES) * LANES
        _gather(q, positions, first, end, heads, words, room)
        context = peek_i32(positions + 4 * ((end - 1) // heads)) + 1
        least = peek_i32(positions + 4 * (first // heads)) + 1
        begin, stop = 0, context
        if segment >= 0:
            begin, stop = SEGMENT * segment, min(SEGMENT * (segment + 1), context)
        _clear(whole, rows, latent)
        for tile in range(begin, stop, KEYS):
            if tile % SEGMENT == 0:
                _clear(state, rows, latent)
            count = min(KEYS, context - tile)
            full = -(-count // KEYS_AT_ONCE) * KEYS_AT_ONCE
            widen(
                table, tile, count, pool, block_bytes, block_tokens, to_latent, to_scale,
                to_rope, latent, rope, groups, kv_kind, rope_kind, word_kind, room[0], room[1],
                room[5],
            )  # fmt: skip
            _score(rows, full, latent, words, scaled, word_kind, room)
            masked = tile + full > least
            for row in range(0, rows, LANES):
                _soften(row, tile, full, masked, scaled, word_kind, room)
            _add_values(end - first, full, latent, words, scaled, word_kind, room)
            if tile + KEYS >= stop or (tile + KEYS) % SEGMENT == 0:
                _merge(whole, 0, state, 0, end - first, latent)
        if segment < 0:
            _scatter(out + first * latent * SIZES[kind], whole, end - first, latent, kind)
        else:
            aside = _state(partial, partial_rows, latent)
            _copy_state(aside, peek_i32(here + 16), whole, end - first, latent)


@entry
def merge(arguments: int) -> None:
    """Out from the states that `attend` left in `partial`, segment by segment.

    task int32 [tasks, 4]: first and end query row, at most LANES; segments; where the first
    one's state is in partial. The next one's is QUERY_ROWS further on. Else as in `attend`.
    """
    (
        _, tasks, latent, kind, out, task, partial, partial_rows, scratch, scratch_size, ticket,
    ) = _merge_arguments(arguments)  # fmt: skip
    whole = _state(scratch + scratch_size * fetch_add(ticket, 1), LANES, latent)
    source = _state(partial, partial_rows, latent)
    while True:
        item = fetch_add(arguments, 1)
        if item >= tasks:
            return
        here = task + 4 * MERGE_FIELDS * item
        first, end = peek_i32(here), peek_i32(here + 4)
        place = peek_i32(here + 12)
        _clear(whole, LANES, latent)
        for segment in range(peek_i32(here + 8)):
            _merge(whole, 0, source, place + QUERY_ROWS * segment, end - first, latent)
        _scatter(out + first * latent * SIZES[kind], whole, end - first, latent, kind)


@njit(cache=True, error_model="numpy")
def _clear(state: Any, rows: int, latent: int) -> None:
    """Nothing seen yet; rows a multiple of LANES."""
    outputs, sums, maxima = state
    for row in range(0, rows, LANES):
        store_f32(sums + 4 * row, splat_f32(0.0))
        store_f32(maxima + 4 * row, splat_f32(MINUS_INFINITY))
    for d in range(0, rows * latent, LANES):
        store_f32(outputs + 4 * d, splat_f32(0.0))


@njit(cache=True, error_model="numpy")
def _merge(whole: Any, first: int, part: Any, part_first: int, rows: int, latent: int) -> None:
    """Rows of a state become what they are with the keys of another, later one.

    A part that has seen nothing changes nothing, and nothing becomes the part, bit for bit.
    """
    outputs, sums, maxima = whole
    part_outputs, part_sums, part_maxima = part
    for row in range(rows):
        to, source = first + row, part_first + row
        before = splat_f32(peek_f32(maxima + 4 * to))
        other = splat_f32(peek_f32(part_maxima + 4 * source))
        now = larger(other, before)
        keep = power_of_two(subtract(before, now))
        more = power_of_two(subtract(other, now))
        total = multiply(splat_f32(peek_f32(sums + 4 * to)), keep)
        total = fma(splat_f32(peek_f32(part_sums + 4 * source)), more, total)
        poke_f32(sums + 4 * to, largest_lane(total))
        poke_f32(maxima + 4 * to, largest_lane(now))
        target = outputs + 4 * latent * to
        added = part_outputs + 4 * latent * source
        for d in range(0, latent, LANES):
            kept = multiply(load_f32(target + 4 * d), keep)
            store_f32(target + 4 * d, fma(load_f32(added + 4 * d), more, kept))


@njit(cache=True, error_model="numpy")
def _copy_state(to: Any, first: int, state: Any, rows: int, latent: int) -> None:
    """The first rows of a state to rows of another."""
    for row in range(rows):
        poke_f32(to[1] + 4 * (first + row), peek_f32(state[1] + 4 * row))
        poke_f32(to[2] + 4 * (first + row), peek_f32(state[2] + 4 * row))
    for d in range(0, rows * latent, LANES):
        store_f32(to[0] + 4 * (first * latent + d), load_f32(state[0] + 4 * d))


@njit(cache=True, error_model="numpy")
def _gather(
    q: int, positions: int, first: int, end: int, heads: int, words: int, room: Any
) -> None:
    """Query rows into scratch, transposed.

    Filled up to a multiple of LANES with copies of the last one, whose output goes nowhere.
    """
    queries, limits, addresses = room[2], room[6], room[8]
    for row in range(0, end - first, LANES):
        for lane in range(LANES):
            source = min(first + row + lane, end - 1)
            poke_i64(addresses + 8 * lane, q + 4 * words * source)
            poke_i32(limits + 4 * (row + lane), peek_i32(positions + 4 * (source // heads)))
        target = queries + 4 * row * words
        for begin in range(0, words, LANES):
            transpose_words(addresses, 4 * begin, target + 4 * begin * LANES)  # type: ignore[call-arg]


@njit(cache=True, error_model="numpy")
def _score(
    rows: int, count: int, latent: int, words: int, scaled: int, word_kind: int, room: Any
) -> None:
    """Scores of `count` keys with every query row: the rotary part, then scale by scale.

    Without scales (scaled 0) all in one.
    """
    keys, queries, scores, scales = room[0], room[2], room[3], room[5]
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
    row: int, tile: int, count: int, masked: bool, scaled: int, word_kind: int,
    room: Any,
) -> None:  # fmt: skip
    """Sixteen rows' scores of the tile's first `count` keys into weights.

    Keys that a row may not see weigh 0. Leaves in factors what outputs so far must shrink by.
    """
    scores, weights, scales, limits, factors = room[3], room[4], room[5], room[6], room[7]
    _, sums, maxima = room[9]
    scores += 4 * row
    width = 4 * QUERY_ROWS
    if masked:
        limit = load_i32(limits + 4 * row)
        for key in range(count):
            place = splat_i32(tile + key)
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
            store_i32(target + width * (key // 2), _pair(even, odd))
        else:
            for part in range(scaled):
                scale = scales + 4 * (part * KEYS + key)
                pair = _pair(
                    multiply(even, splat_f32(peek_f32(scale))),
                    multiply(odd, splat_f32(peek_f32(scale + 4))),
                )
                store_i32(target + width * (part * KEYS + key) // 2, pair)
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
    keys, values, weights, factors = room[0], room[1], room[4], room[7]
    outputs, _, _ = room[9]
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
def _scatter(out: int, state: Any, count: int, latent: int, kind: int) -> None:
    """Outputs, divided by their weights' sums, to where the values' projection reads them."""
    outputs, sums, _ = state
    for row in range(count):
        total = splat_f32(1.0 / peek_f32(sums + 4 * row))
        for d in range(0, latent, LANES):
            value = multiply(load_f32(outputs + 4 * (row * latent + d)), total)
            # Whether a zero is negative may tell how many masked keys were added: make it positive.
            store_values(out, row * latent + d, kind, add(value, splat_f32(0.0)))
