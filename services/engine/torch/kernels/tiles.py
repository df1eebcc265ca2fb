"""The two pieces of code that kernels spend their time in: a small product, a transposition."""

# ruff: noqa: ANN001, ANN201, ANN202 -- intrinsics are generators over Numba's untyped objects.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, import-untyped"

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from services.engine.torch.kernels import simd
from services.engine.torch.kernels.simd import F32_VECTOR, I32_VECTOR, LANES

_I64 = ir.IntType(64)
ROWS = 4
WORDS = 16


def _product(rows: int, vectors: int, rescale: bool) -> Any:
    """An intrinsic (c, c_stride, a, a_stride, b, b_stride, n, factors) -> None.

    c [rows, 16 * vectors] = c * factors[:, None] + a [rows, n] @ b [n, 16 * vectors], all float32,
    strides in bytes between rows, n at least 1; without `rescale` c is not read and factors is
    ignored. Every element is one chain of fused multiply-adds over n in order, so it depends on
    its own row of a and column of b alone. All of c stays in registers.
    """

    def generate(context, builder, signature, values):
        c, c_stride, a, a_stride, b, b_stride, n, factors = values
        cells = [(r, v) for r in range(rows) for v in range(vectors)]

        def place(base, stride, row, vector=0):
            offset = builder.add(builder.mul(stride, _I64(row)), _I64(vector * LANES * 4))
            return builder.add(base, offset)

        start = []
        for r, v in cells:
            if rescale:
                factor = simd.splat(
                    builder, simd.load(builder, builder.add(factors, _I64(4 * r)), ir.FloatType())
                )
                old = simd.load(builder, place(c, c_stride, r, v), F32_VECTOR)
                start.append(builder.fmul(old, factor))
            else:
                start.append(simd.constant(F32_VECTOR, 0.0))
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
        row_of_b = builder.add(b, builder.mul(step, b_stride))
        columns = [
            simd.load(builder, builder.add(row_of_b, _I64(v * LANES * 4)), F32_VECTOR)
            for v in range(vectors)
        ]
        step_of_a = builder.mul(step, _I64(4))
        weights = [
            simd.splat(
                builder,
                simd.load(builder, builder.add(place(a, a_stride, r), step_of_a), ir.FloatType()),
            )
            for r in range(rows)
        ]
        results = [
            simd.fused(builder, weights[r], columns[v], running[i])
            for i, (r, v) in enumerate(cells)
        ]
        following = builder.add(step, _I64(1))
        step.add_incoming(following, loop)
        for phi, value in zip(running, results, strict=True):
            phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, n), loop, after)
        builder.position_at_end(after)
        for (r, v), last in zip(cells, results, strict=True):
            simd.store(builder, place(c, c_stride, r, v), last)
        return context.get_dummy_value()

    def typing(typingctx, c, c_stride, a, a_stride, b, b_stride, n, factors):
        return types.void(*[types.int64] * 8), generate

    return intrinsic(typing)


# Scores of 4 query rows and 64 keys; outputs of 4 rows and 64 or 16 of the head's dimensions.
scores_4x64 = _product(ROWS, 4, rescale=False)
outputs_4x64 = _product(ROWS, 4, rescale=True)
outputs_4x16 = _product(ROWS, 1, rescale=True)


@intrinsic
def transpose_words(typingctx, addresses, offset, out):
    """The 32-bit words of 16 keys, transposed: out [16 words, 16 keys].

    addresses: of 16 int64 addresses; offset: bytes added to each. Reads 64 bytes at each.
    """

    def generate(context, builder, signature, values):
        table, offset, out = values
        rows = []
        for key in range(LANES):
            base = simd.load(builder, builder.add(table, _I64(8 * key)), _I64)
            rows.append(simd.load(builder, builder.add(base, offset), I32_VECTOR))
        # Four rounds of exchanging halves between rows 8, 4, 2, 1 apart.
        distance = LANES // 2
        while distance:
            low = [
                lane if not lane & distance else lane - distance + LANES for lane in range(LANES)
            ]
            high = [
                lane + distance if not lane & distance else lane + LANES for lane in range(LANES)
            ]
            fresh = list(rows)
            for key in range(LANES):
                if not key & distance:
                    a, b = rows[key], rows[key + distance]
                    fresh[key] = simd.shuffle(builder, a, b, low)
                    fresh[key + distance] = simd.shuffle(builder, a, b, high)
            rows = fresh
            distance //= 2
        for word in range(WORDS):
            simd.store(builder, builder.add(out, _I64(word * LANES * 4)), rows[word])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate
