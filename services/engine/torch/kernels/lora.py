"""What LoRA adapters add to a linear layer's result, for all rows of a step in one call.

A work item is one row, or four that follow each other and have the same adapter. Every element is
one chain of multiply-adds over its row and its column (latent_tiles.product), then one addition to
what the layer itself gave: so neither company nor the number of rows matters.
"""

from __future__ import annotations

import torch
from numba import njit

from services.engine.torch.kernels.formats import FLOAT32, SIZES, load_values, store_values
from services.engine.torch.kernels.latent_tiles import Into, floats, pairs, product
from services.engine.torch.kernels.simd import (
    LANES,
    add,
    fetch_add,
    load_f32,
    peek_i64,
    unpack,
)
from services.engine.torch.kernels.team import entry

ROWS = 4
COLUMNS = 64
# Bytes from one vector of columns to the next.
NEXT = 4 * LANES
# Of a table, in words of 8 bytes: what comes before its parts, and what a part has.
HEAD, PART = 3, 5

_f1x16 = product(1, 1, Into.FRESH, floats)
_f1x64 = product(1, 4, Into.FRESH, floats)
_f4x16 = product(4, 1, Into.FRESH, floats)
_f4x64 = product(4, 4, Into.FRESH, floats)
_p1x16 = product(1, 1, Into.FRESH, pairs)
_p1x64 = product(1, 4, Into.FRESH, pairs)
_p4x16 = product(4, 1, Into.FRESH, pairs)
_p4x64 = product(4, 4, Into.FRESH, pairs)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A weight [outputs, inputs] as [words, outputs, values]; outputs a multiple of LANES.

    A word is what product() multiplies: one float32, or two bfloat16 values of neighbouring inputs.
    """
    values = 4 // weight.element_size()
    outputs, inputs = weight.shape
    return weight.view(outputs, inputs // values, values).transpose(0, 1).contiguous()


def scratch_bytes(ranks: int) -> int:
    """For each thread, where `ranks` is the most that a table has."""
    return ROWS * (4 * ranks + 4 * ranks + 4 * COLUMNS)


ADD = (
    "items",
    "kind",
    "projection",
    "inputs",
    "x",
    "x_bytes",
    "y",
    "y_values",
    "rows",
    "counts",
    "directories",
    "scratch",
    "scratch_bytes",
    "ticket",
)
_add_arguments = unpack(len(ADD) + 1)


@entry
def add_rows(arguments: int) -> None:
    """Adds up(down(x)) to y in each item's rows, by its adapter.

    rows, counts int64 [items]: first row and how many, 1 or ROWS; directories int64 [items]: the
    address of the adapter's tables by projection, 0 where it adds nothing. A table, int64: address
    of down, its ranks, number of parts; then of each part first column of y, columns, first rank,
    ranks, address of up. Weights as `pack` lays them out, ranks and columns multiples of LANES.
    x [.., inputs], y of `kind`, their rows x_bytes and y_values apart. scratch: scratch_bytes for
    each thread; ticket: address of a zero.
    """
    (
        _, items, kind, projection, inputs, x, x_bytes, y, y_values, rows, counts, directories,
        scratch, size, ticket,
    ) = _add_arguments(arguments)  # fmt: skip
    mine = 0
    while True:
        item = fetch_add(arguments, 1)
        if item >= items:
            return
        table = peek_i64(peek_i64(directories + 8 * item) + 8 * projection)
        if table == 0:
            continue
        if mine == 0:
            mine = scratch + size * fetch_add(ticket, 1)
        row, count = peek_i64(rows + 8 * item), peek_i64(counts + 8 * item)
        low = _down(table, count, kind, inputs, x + row * x_bytes, x_bytes, mine)
        _up(table, count, kind, low, y, row * y_values, y_values, mine)


@njit(cache=True, error_model="numpy")
def _down(table: int, count: int, kind: int, inputs: int, x: int, x_bytes: int, mine: int) -> int:
    """down(x) of `kind` [count, ranks]: its address."""
    down, ranks = peek_i64(table), peek_i64(table + 8)
    words = inputs * SIZES[kind] // 4
    for rank in range(0, ranks, LANES):
        _multiply(
            count, LANES, kind, mine + 4 * rank, 4 * ranks, x, x_bytes, down + 4 * rank, 4 * ranks,
            words,
        )  # fmt: skip
    low: int = mine + ROWS * 4 * ranks
    for i in range(0, count * ranks, LANES):
        store_values(low, i, kind, load_f32(mine + 4 * i))
    return low


@njit(cache=True, error_model="numpy")
def _up(
    table: int, count: int, kind: int, low: int, y: int, start: int, y_values: int, mine: int
) -> None:
    """Adds up(low) to y, in rows from value `start` on."""
    ranks, size = peek_i64(table + 8), SIZES[kind]
    sums = mine + ROWS * 8 * ranks
    for part in range(peek_i64(table + 16)):
        at = table + 8 * (HEAD + PART * part)
        column, columns = peek_i64(at), peek_i64(at + 8)
        first, own, up = peek_i64(at + 16), peek_i64(at + 24), peek_i64(at + 32)
        for i in range(0, columns, COLUMNS):
            width = COLUMNS if i + COLUMNS <= columns else LANES
            for j in range(i, min(i + COLUMNS, columns), width):
                _multiply(
                    count, width, kind, sums, 4 * COLUMNS, low + first * size, ranks * size,
                    up + 4 * j, 4 * columns, own * size // 4,
                )  # fmt: skip
                for row in range(count):
                    for k in range(0, width, LANES):
                        value = start + row * y_values + column + j + k
                        more = load_f32(sums + 4 * (row * COLUMNS + k))
                        store_values(y, value, kind, add(load_values(y, value, kind), more))


@njit(cache=True, error_model="numpy")
def _multiply(
    count: int, width: int, kind: int, c: int, c_row: int, a: int, a_row: int, b: int, b_step: int,
    words: int,
) -> None:  # fmt: skip
    """Makes c [count, width] a [count, words] @ b [words, width]; count 1 or 4, width 16 or 64."""
    if kind == FLOAT32:
        if count == 1 and width == LANES:
            _f1x16(c, c_row, a, a_row, 4, b, b_step, NEXT, words, 0)
        elif count == 1:
            _f1x64(c, c_row, a, a_row, 4, b, b_step, NEXT, words, 0)
        elif width == LANES:
            _f4x16(c, c_row, a, a_row, 4, b, b_step, NEXT, words, 0)
        else:
            _f4x64(c, c_row, a, a_row, 4, b, b_step, NEXT, words, 0)
    elif count == 1 and width == LANES:
        _p1x16(c, c_row, a, a_row, 4, b, b_step, NEXT, words, 0)
    elif count == 1:
        _p1x64(c, c_row, a, a_row, 4, b, b_step, NEXT, words, 0)
    elif width == LANES:
        _p4x16(c, c_row, a, a_row, 4, b, b_step, NEXT, words, 0)
    else:
        _p4x64(c, c_row, a, a_row, 4, b, b_step, NEXT, words, 0)
