"""Small products of 32-bit words, which latent attention spends its time in.

A word is a float32, or a pair of bfloat16 along the dimension that is summed over, the first one in
the low half. The products of a pair, and their sums, are float32. Where the machine has an
instruction for it (AVX512-BF16's vdpbf16ps, which does two bfloat16 products a lane at the price of
one of float32) that is used, else two multiply-adds. The instruction takes denormal numbers for 0,
so machines of both sorts need not compute the same bits; `numerics` tells them apart if they don't.
"""

# ruff: noqa: ANN001, ANN201, ANN202 -- intrinsics are generators over Numba's untyped objects.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, import-untyped"

from __future__ import annotations

import enum
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, config, types
from numba.extending import intrinsic

from services.engine.torch.kernels import simd
from services.engine.torch.kernels.simd import F32_VECTOR, I32_VECTOR, LANES

_I64 = ir.IntType(64)


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_PAIRS = ir.VectorType(_BFloat(), 2 * LANES)


def _has_pairs() -> bool:
    """Tells if code is compiled for this very machine, and it multiplies pairs of bfloat16."""
    settings: Any = config
    given = settings.CPU_NAME or settings.CPU_FEATURES
    return not given and bool(llvm.get_host_cpu_features().get("avx512bf16", False))


PAIRS_IN_HARDWARE = _has_pairs()


def _pairs_by_instruction(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    kind = ir.FunctionType(F32_VECTOR, [F32_VECTOR, _PAIRS, _PAIRS])
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [c, builder.bitcast(a, _PAIRS), builder.bitcast(b, _PAIRS)])


def _pairs_by_parts(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    def low(value):
        return builder.bitcast(builder.shl(value, simd.constant(I32_VECTOR, 16)), F32_VECTOR)

    def high(value):
        mask = simd.constant(I32_VECTOR, -65536)
        return builder.bitcast(builder.and_(value, mask), F32_VECTOR)

    first = simd.fused(builder, high(a), high(b), c)
    return simd.fused(builder, low(a), low(b), first)


def _floats(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    return simd.fused(builder, builder.bitcast(a, F32_VECTOR), builder.bitcast(b, F32_VECTOR), c)


class Into(enum.Enum):
    """What becomes of a product p and what stood in c."""

    FRESH = "c = p"
    SCALED = "c = c + factors[:, None] * p"
    FADED = "c = c * factors[:, None] + p"


def product(rows: int, vectors: int, into: Into, multiply: Any) -> Any:
    """An intrinsic (c, c_stride, a, a_row, a_step, b, b_step, b_next, n, factors) -> None.

    c float32 [rows, 16 * vectors]; p = a [rows, n] @ b [n, 16 * vectors], words; word (r, i) of a
    at a + r * a_row + i * a_step, the v-th sixteen words of b's row i at b + i * b_step + v *
    b_next; all in bytes; n at least 1. Every element is one chain over n in order, so it depends on
    its own row of a and column of b alone.
    """

    def generate(context, builder, signature, values):
        c, c_stride, a, a_row, a_step, b, b_step, b_next, n, factors = values
        cells = [(r, v) for r in range(rows) for v in range(vectors)]

        def place(r, v):
            offset = builder.add(builder.mul(c_stride, _I64(r)), _I64(v * LANES * 4))
            return builder.add(c, offset)

        def factor(r):
            at = builder.add(factors, _I64(4 * r))
            return simd.splat(builder, simd.load(builder, at, ir.FloatType()))

        start = [simd.constant(F32_VECTOR, 0.0)] * len(cells)
        if into is Into.FADED:
            start = [
                builder.fmul(simd.load(builder, place(r, v), F32_VECTOR), factor(r))
                for r, v in cells
            ]
        before = builder.block
        loop = builder.append_basic_block("product")
        after = builder.append_basic_block("product.end")
        builder.branch(loop)
        builder.position_at_end(loop)
        step = builder.phi(_I64)
        step.add_incoming(_I64(0), before)
        running = [builder.phi(F32_VECTOR) for _ in cells]
        for phi, value in zip(running, start, strict=True):
            phi.add_incoming(value, before)
        row_of_b = builder.add(b, builder.mul(step, b_step))
        columns = [
            simd.load(builder, builder.add(row_of_b, builder.mul(b_next, _I64(v))), I32_VECTOR)
            for v in range(vectors)
        ]
        column_of_a = builder.add(a, builder.mul(step, a_step))
        words = [
            simd.splat(
                builder,
                simd.load(
                    builder, builder.add(column_of_a, builder.mul(a_row, _I64(r))), ir.IntType(32)
                ),
            )
            for r in range(rows)
        ]
        results = [
            multiply(builder, words[r], columns[v], running[i]) for i, (r, v) in enumerate(cells)
        ]
        following = builder.add(step, _I64(1))
        step.add_incoming(following, loop)
        for phi, value in zip(running, results, strict=True):
            phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, n), loop, after)
        builder.position_at_end(after)
        for (r, v), last in zip(cells, results, strict=True):
            if into is Into.SCALED:
                old = simd.load(builder, place(r, v), F32_VECTOR)
                last = simd.fused(builder, factor(r), last, old)
            simd.store(builder, place(r, v), last)
        return context.get_dummy_value()

    def typing(typingctx, c, c_stride, a, a_row, a_step, b, b_step, b_next, n, factors):
        return types.void(*[types.int64] * 10), generate

    return intrinsic(typing)


# What a product of words is.
floats = _floats
pairs = _pairs_by_instruction if PAIRS_IN_HARDWARE else _pairs_by_parts

# Scores of 8 keys with 32 or 16 query rows.
KEYS_AT_ONCE = 8
scores_8x32_pairs = product(KEYS_AT_ONCE, 2, Into.FRESH, pairs)
scores_8x16_pairs = product(KEYS_AT_ONCE, 1, Into.FRESH, pairs)
more_8x32_pairs = product(KEYS_AT_ONCE, 2, Into.SCALED, pairs)
more_8x16_pairs = product(KEYS_AT_ONCE, 1, Into.SCALED, pairs)
scores_8x32_floats = product(KEYS_AT_ONCE, 2, Into.FRESH, floats)
scores_8x16_floats = product(KEYS_AT_ONCE, 1, Into.FRESH, floats)
# Outputs of 4 query rows, 64 or 16 dimensions.
ROWS_AT_ONCE = 4
outputs_4x64_pairs = product(ROWS_AT_ONCE, 4, Into.FADED, pairs)
outputs_4x16_pairs = product(ROWS_AT_ONCE, 1, Into.FADED, pairs)
outputs_4x64_floats = product(ROWS_AT_ONCE, 4, Into.FADED, floats)
outputs_4x16_floats = product(ROWS_AT_ONCE, 1, Into.FADED, floats)
# A head's linear layer: 4 rows or a single one, 64 or 16 columns.
linear_4x64_pairs = product(ROWS_AT_ONCE, 4, Into.FRESH, pairs)
linear_1x64_pairs = product(1, 4, Into.FRESH, pairs)
linear_4x16_pairs = product(ROWS_AT_ONCE, 1, Into.FRESH, pairs)
linear_1x16_pairs = product(1, 1, Into.FRESH, pairs)
linear_4x64_floats = product(ROWS_AT_ONCE, 4, Into.FRESH, floats)
linear_1x64_floats = product(1, 4, Into.FRESH, floats)
linear_4x16_floats = product(ROWS_AT_ONCE, 1, Into.FRESH, floats)
linear_1x16_floats = product(1, 1, Into.FRESH, floats)


@intrinsic
def swap_neighbours(typingctx, values):
    """Lanes 1, 0, 3, 2 and so on."""

    def generate(context, builder, signature, given):
        return simd.shuffle(builder, given[0], given[0], [lane ^ 1 for lane in range(LANES)])

    return simd.f32s(simd.f32s), generate
