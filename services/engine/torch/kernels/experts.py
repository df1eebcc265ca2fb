"""Experts' linear layers, each over the rows that chose it, all experts in one call.

A work item is one expert and 64 columns of its output. An element of the output is one chain of
multiply-adds over its row and its column (latent_tiles.product), so company doesn't matter, nor in
what order rows come. Weights lie in the order in which the chains read them.
"""

from __future__ import annotations

import torch
from numba import njit

from services.engine.torch.kernels.formats import FLOAT32, SIZES, sigmoid, store_values
from services.engine.torch.kernels.latent_tiles import Into, floats, pairs, product
from services.engine.torch.kernels.simd import (
    LANES,
    fetch_add,
    load_f32,
    multiply,
    peek_i32,
    poke_i32,
    poke_i64,
    unpack,
)
from services.engine.torch.kernels.team import entry

COLUMNS = 64
TILE_BYTES = 4 * 4 * COLUMNS
# Bytes from one vector of columns to the next.
NEXT = 4 * LANES

_f1 = product(1, 4, Into.FRESH, floats)
_f2 = product(2, 4, Into.FRESH, floats)
_f4 = product(4, 4, Into.FRESH, floats)
_p1 = product(1, 4, Into.FRESH, pairs)
_p2 = product(2, 4, Into.FRESH, pairs)
_p4 = product(4, 4, Into.FRESH, pairs)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A weight [outputs, inputs] as [blocks, words, 64, values]: of 64 columns word after word.

    A word is what product() multiplies: one float32 or two bfloat16 values. Zeros fill up the end.
    """
    values = 4 // weight.element_size()
    outputs, inputs = weight.shape
    blocks = -(-outputs // COLUMNS)
    full = torch.zeros((blocks * COLUMNS, inputs), dtype=weight.dtype)
    full[:outputs] = weight
    words = full.view(blocks, COLUMNS, inputs // values, values)
    return words.transpose(1, 2).contiguous()


def pack_gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Two weights [outputs, inputs], 32 columns of each in a block: see `pack`."""
    half = COLUMNS // 2
    outputs, inputs = gate.shape
    blocks = -(-outputs // half)
    both = torch.zeros((2, blocks * half, inputs), dtype=gate.dtype)
    both[0, :outputs] = gate
    both[1, :outputs] = up
    return pack(both.view(2, blocks, half, inputs).transpose(0, 1).reshape(-1, inputs))


GROUP = ("assignments", "choices", "places", "ids", "starts", "chosen", "source", "where", "found")
_group_arguments = unpack(len(GROUP) + 1)


@entry
def group(arguments: int) -> None:
    """Orders assignments (a row and one of its choices) by place, those of one in rows' order.

    ids int32 [assignments]: places, negative for none; out: starts int32 [places + 1]: where each
    place's begin; chosen int32 [places]: the places that have any; source int64 [assignments]: the
    row of each; where int32 [assignments]: where each is now, -1 for none; found int64 [1]: how
    many of `chosen`. One thread does it all.
    """
    _, assignments, choices, places, ids, starts, chosen, source, where, found = _group_arguments(
        arguments
    )
    if fetch_add(arguments, 1) > 0:
        return
    for place in range(places + 1):
        poke_i32(starts + 4 * place, 0)
    for i in range(assignments):
        place = peek_i32(ids + 4 * i)
        if place >= 0:
            poke_i32(starts + 4 * place, peek_i32(starts + 4 * place) + 1)
    # From counts to ends; filling from the last on turns ends into starts.
    end = 0
    number = 0
    for place in range(places):
        count = peek_i32(starts + 4 * place)
        if count > 0:
            poke_i32(chosen + 4 * number, place)
            number += 1
        end += count
        poke_i32(starts + 4 * place, end)
    poke_i32(starts + 4 * places, end)
    poke_i64(found, number)
    for back in range(assignments):
        i = assignments - 1 - back
        place = peek_i32(ids + 4 * i)
        if place < 0:
            poke_i32(where + 4 * i, -1)
        else:
            to = peek_i32(starts + 4 * place) - 1
            poke_i32(starts + 4 * place, to)
            poke_i32(where + 4 * i, to)
            poke_i64(source + 8 * to, i // choices)


APPLY = (
    "chosen_count",
    "kind",
    "gated",
    "inputs",
    "outputs",
    "x",
    "weight",
    "weight_bytes",
    "starts",
    "chosen",
    "out",
    "scratch",
    "ticket",
)
_apply_arguments = unpack(len(APPLY) + 1)


@entry
def apply(arguments: int) -> None:
    """Out = x @ weight.T for each place's rows; `gated`: silu(first) * second, see pack_gated.

    x [m, inputs], out [m, outputs] of `kind`, ordered by place; weight: packed ones, weight_bytes
    from place to place; starts, chosen as `group` leaves them. scratch: TILE_BYTES for each thread;
    ticket: address of a zero.
    """
    (
        _, chosen_count, kind, gated, inputs, outputs, x, weight, weight_bytes, starts, chosen, out,
        scratch, ticket,
    ) = _apply_arguments(arguments)  # fmt: skip
    tile = scratch + TILE_BYTES * fetch_add(ticket, 1)
    words = inputs * SIZES[kind] // 4
    width = COLUMNS // 2 if gated else COLUMNS
    blocks = -(-outputs // width)
    while True:
        item = fetch_add(arguments, 1)
        if item >= chosen_count * blocks:
            return
        place = peek_i32(chosen + 4 * (item // blocks))
        block = item % blocks
        b = weight + place * weight_bytes + block * words * 4 * COLUMNS
        row = peek_i32(starts + 4 * place)
        end = peek_i32(starts + 4 * place + 4)
        columns = min(width, outputs - block * width)
        while row < end:
            count = 4 if end - row >= 4 else (2 if end - row >= 2 else 1)
            _multiply(tile, x + 4 * row * words, b, words, count, kind)
            for r in range(count):
                target = (row + r) * outputs + block * width
                _finish(tile + 4 * COLUMNS * r, out, target, columns, kind, gated)
            row += count


@njit(cache=True, error_model="numpy")
def _multiply(tile: int, x: int, b: int, words: int, count: int, kind: int) -> None:
    wide = 4 * COLUMNS
    if kind == FLOAT32:
        if count == 4:
            _f4(tile, wide, x, 4 * words, 4, b, wide, NEXT, words, 0)
        elif count == 2:
            _f2(tile, wide, x, 4 * words, 4, b, wide, NEXT, words, 0)
        else:
            _f1(tile, wide, x, 4 * words, 4, b, wide, NEXT, words, 0)
    elif count == 4:
        _p4(tile, wide, x, 4 * words, 4, b, wide, NEXT, words, 0)
    elif count == 2:
        _p2(tile, wide, x, 4 * words, 4, b, wide, NEXT, words, 0)
    else:
        _p1(tile, wide, x, 4 * words, 4, b, wide, NEXT, words, 0)


@njit(cache=True, error_model="numpy")
def _finish(tile: int, out: int, target: int, columns: int, kind: int, gated: int) -> None:
    """A row of the tile, rounded, to where it belongs."""
    for i in range(0, columns, LANES):
        value = load_f32(tile + 4 * i)
        if gated:
            up = load_f32(tile + 4 * (COLUMNS // 2 + i))
            value = multiply(multiply(value, sigmoid(value)), up)
        store_values(out, target + i, kind, value)
