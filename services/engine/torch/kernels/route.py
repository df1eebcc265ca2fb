"""Which experts a row chooses, and with what weights: DeepSeek-V3 (arXiv 2412.19437), 2.1.2.

All in float32, row by row: a logit is one chain of multiply-adds over the row, so that it depends
on nothing but the row. Of equal scores the lower index wins.
"""

from __future__ import annotations

from typing import Any

import torch
from numba import njit

from services.engine.torch.kernels.formats import load_values, power_of_two, sigmoid, store_values
from services.engine.torch.kernels.latent_tiles import Into, floats, product
from services.engine.torch.kernels.simd import (
    LANES,
    add,
    divide,
    fetch_add,
    float_bits,
    fma,
    larger,
    largest_lane,
    load_f32,
    multiply,
    peek_f32,
    peek_i32,
    poke_f32,
    poke_i32,
    splat_f32,
    store_f32,
    subtract,
    sum_lanes,
    unpack,
)
from services.engine.torch.kernels.team import entry

# Rows a thread takes at a time: they share what is read of the weights.
TAKE = 4
COLUMNS = 64
LOG2_E = 1.44269504
LOWEST = -3.0e38
MINUS_INFINITY = float("-inf")

_logits_of_1 = product(1, 4, Into.FRESH, floats)
_logits_of_4 = product(TAKE, 4, Into.FRESH, floats)

ROUTE = (
    "rows",
    "width",
    "kind",
    "experts",
    "choices",
    "groups",
    "kept_groups",
    "sigmoid",
    "normalized",
    "factor",
    "shared_gate",
    "x",
    "weight",
    "bias",
    "ids",
    "weights",
    "shared",
    "counts",
    "scratch",
    "scratch_bytes",
    "ticket",
)
_route_arguments = unpack(len(ROUTE) + 1)


def padded(experts: int) -> int:
    """Columns of logits: the experts', one more for a shared expert's gate, filled up."""
    return -(-(experts + 1) // COLUMNS) * COLUMNS


def pack(weight: torch.Tensor, shared_gate: torch.Tensor | None) -> torch.Tensor:
    """Router weights [experts, hidden] and those of a shared expert's gate [1, hidden], float32.

    Laid out [blocks, hidden, 64]: 64 columns of logits after the other, zeros at the end.
    """
    experts, hidden = weight.shape
    columns = torch.zeros((padded(experts), hidden), dtype=torch.float32)
    columns[:experts] = weight
    if shared_gate is not None:
        columns[experts] = shared_gate
    return columns.view(-1, COLUMNS, hidden).transpose(1, 2).contiguous()


def scratch_bytes(width: int, experts: int, groups: int) -> int:
    """Memory that a thread needs, as `route` divides it."""
    end = 4 * (TAKE * width + (TAKE + 2) * padded(experts) + groups)
    return -(-end // 4096) * 4096


@entry
def route(arguments: int) -> None:
    """Experts and their weights for every row.

    x [rows, width] of `kind`; weight as `pack` lays it out; bias float32 [padded(experts)], added
    for the choice alone. Scores are sigmoids or a softmax. With groups > 1 only the experts of the
    kept_groups best groups can be chosen; a group is as good as its two best biased scores' sum.
    Out: ids int32, weights float32 [rows, choices], best first: unbiased scores, divided by their
    sum if `normalized`, times factor (bits of a float32); shared float32 [rows]: the shared
    expert's weight, 1 without shared_gate. counts int64 [experts] are increased. scratch:
    scratch_bytes for each thread; ticket: address of a zero.
    """
    (
        _, rows, width, kind, experts, choices, groups, kept_groups, by_sigmoid, normalized, factor,
        shared_gate, x, weight, bias, ids, weights, shared, counts, scratch, scratch_size, ticket,
    ) = _route_arguments(arguments)  # fmt: skip
    columns = -(-(experts + 1) // COLUMNS) * COLUMNS
    wide = scratch + scratch_size * fetch_add(ticket, 1)
    logits = wide + 4 * TAKE * width
    scores = logits + 4 * TAKE * columns
    choice = scores + 4 * columns
    best = choice + 4 * columns
    while True:
        first = fetch_add(arguments, TAKE)
        if first >= rows:
            return
        count = min(TAKE, rows - first)
        for i in range(0, count * width, LANES):
            store_f32(wide + 4 * i, load_values(x, first * width + i, kind))
        _logits(logits, wide, weight, width, columns, count)
        for r in range(count):
            row = first + r
            mine = logits + 4 * r * columns
            one = splat_f32(1.0)
            if shared_gate:
                one = sigmoid(splat_f32(peek_f32(mine + 4 * experts)))
            poke_f32(shared + 4 * row, largest_lane(one))
            _score(mine, scores, experts, by_sigmoid)
            for i in range(experts):
                biased = peek_f32(scores + 4 * i) + peek_f32(bias + 4 * i)
                # What is not a number can be chosen last: something always can.
                poke_f32(choice + 4 * i, biased if biased > LOWEST else LOWEST)
            if groups > 1:
                _keep_groups(choice, best, experts // groups, groups, kept_groups)
            at = 4 * row * choices
            _choose(choice, scores, experts, choices, ids + at, weights + at, counts)
            _weigh(weights + at, choices, normalized, float_bits(factor))


@njit(cache=True, error_model="numpy")
def _logits(out: int, x: int, weight: int, width: int, columns: int, count: int) -> None:
    """Out [count, columns] = x [count, width] @ weight."""
    step, after = 4 * COLUMNS, 4 * LANES
    for block in range(0, columns, COLUMNS):
        b = weight + 4 * block * width
        if count == TAKE:
            _logits_of_4(out + 4 * block, 4 * columns, x, 4 * width, 4, b, step, after, width, 0)
        else:
            for r in range(count):
                target = out + 4 * (r * columns + block)
                _logits_of_1(target, 0, x + 4 * r * width, 0, 4, b, step, after, width, 0)


@njit(cache=True, error_model="numpy")
def _score(logits: int, scores: int, experts: int, by_sigmoid: int) -> None:
    """Sigmoids of the logits, or their softmax."""
    # Columns beyond the experts weigh nothing.
    for i in range(experts, -(-experts // LANES) * LANES):
        poke_f32(logits + 4 * i, MINUS_INFINITY)
    if by_sigmoid:
        for i in range(0, experts, LANES):
            store_f32(scores + 4 * i, sigmoid(load_f32(logits + 4 * i)))
        return
    most = load_f32(logits)
    for i in range(LANES, experts, LANES):
        most = larger(load_f32(logits + 4 * i), most)
    top = splat_f32(largest_lane(most))
    total = splat_f32(0.0)
    for i in range(0, experts, LANES):
        power = multiply(subtract(load_f32(logits + 4 * i), top), splat_f32(LOG2_E))
        value = power_of_two(power)
        store_f32(scores + 4 * i, value)
        total = add(total, value)
    whole = splat_f32(sum_lanes(total))
    for i in range(0, experts, LANES):
        store_f32(scores + 4 * i, divide(load_f32(scores + 4 * i), whole))


@njit(cache=True, error_model="numpy")
def _keep_groups(choice: int, best: int, size: int, groups: int, kept: int) -> None:
    """Experts outside the `kept` best groups can't be chosen any more."""
    for group in range(groups):
        first, second = MINUS_INFINITY, MINUS_INFINITY
        for i in range(group * size, (group + 1) * size):
            value = peek_f32(choice + 4 * i)
            if value > first:
                first, second = value, first
            elif value > second:
                second = value
        poke_f32(best + 4 * group, max(first + second, LOWEST))
    for _ in range(kept):
        poke_f32(best + 4 * _largest(best, groups), MINUS_INFINITY)
    for group in range(groups):
        if peek_f32(best + 4 * group) > MINUS_INFINITY:
            for i in range(group * size, (group + 1) * size):
                poke_f32(choice + 4 * i, MINUS_INFINITY)


@njit(cache=True, error_model="numpy")
def _largest(values: int, count: int) -> int:
    """Where the largest is, the first of equal ones."""
    where = 0
    for i in range(1, count):
        if peek_f32(values + 4 * i) > peek_f32(values + 4 * where):
            where = i
    return where


@njit(cache=True, error_model="numpy")
def _choose(
    choice: int, scores: int, experts: int, choices: int, ids: int, weights: int, counts: int
) -> None:
    for slot in range(choices):
        expert = _largest(choice, experts)
        poke_f32(choice + 4 * expert, MINUS_INFINITY)
        poke_i32(ids + 4 * slot, expert)
        poke_f32(weights + 4 * slot, peek_f32(scores + 4 * expert))
        fetch_add(counts + 8 * expert, 1)


@njit(cache=True, error_model="numpy")
def _weigh(weights: int, choices: int, normalized: int, factor: Any) -> None:
    total = splat_f32(1.0)
    if normalized:
        total = splat_f32(0.0)
        for slot in range(choices):
            total = add(total, splat_f32(peek_f32(weights + 4 * slot)))
        # Sigmoids may all be zero.
        total = larger(total, splat_f32(1e-20))
    for slot in range(choices):
        share = divide(splat_f32(peek_f32(weights + 4 * slot)), total)
        poke_f32(weights + 4 * slot, largest_lane(multiply(share, splat_f32(factor))))


COMBINE = ("rows", "width", "kind", "choices", "outputs", "where", "weights", "common", "shared",
           "out")  # fmt: skip
_combine_arguments = unpack(len(COMBINE) + 1)


@entry
def combine(arguments: int) -> None:
    """Out [rows, width] = the sum of choices' outputs by weight, in their order, and of `common`.

    outputs [m, width], out, common [rows, width] or 0, all of `kind`; where int32, weights float32
    [rows, choices]; shared float32 [rows]: the weight of `common`. One chain of multiply-adds.
    """
    _, rows, width, kind, choices, outputs, where, weights, common, shared, out = (
        _combine_arguments(arguments)
    )
    while True:
        first = fetch_add(arguments, TAKE)
        if first >= rows:
            return
        for row in range(first, min(first + TAKE, rows)):
            at = 4 * row * choices
            for i in range(0, width, LANES):
                total = splat_f32(0.0)
                for slot in range(choices):
                    place = peek_i32(where + at + 4 * slot)
                    if place >= 0:
                        weight = splat_f32(peek_f32(weights + at + 4 * slot))
                        total = fma(load_values(outputs, place * width + i, kind), weight, total)
                if common != 0:
                    weight = splat_f32(peek_f32(shared + 4 * row))
                    total = fma(load_values(common, row * width + i, kind), weight, total)
                store_values(out, row * width + i, kind, total)
