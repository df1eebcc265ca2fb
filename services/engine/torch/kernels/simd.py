"""Vectors of sixteen float32 or int32 for Numba: what the kernels are written in.

Numba leaves vectorizing to LLVM's guesses, and guesses may round differently from loop to loop.
Here every operation is one LLVM instruction on <16 x float> or <16 x i32>, whatever width the
machine has: LLVM splits them, and no lane's value depends on how. A multiply-add is the fused one
(`fma`), everywhere, and nothing is compiled with fast-math: so equal inputs give equal bits.

Memory is addressed by integers (bytes); loads and stores need no alignment and check no bounds.
"""

# ruff: noqa: ANN001, ANN002, ANN202 -- intrinsics are generators over Numba's untyped objects.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, import-untyped"

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

LANES = 16

_F32 = ir.FloatType()
_I32 = ir.IntType(32)
F32_VECTOR = ir.VectorType(_F32, LANES)
I32_VECTOR = ir.VectorType(_I32, LANES)


class Vector(types.Type):
    """Numba's type of a vector of LANES elements."""

    def __init__(self, name: str, llvm: ir.VectorType) -> None:
        self.llvm = llvm
        super().__init__(name=f"{name}x{LANES}")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


f32s = Vector("f32", F32_VECTOR)
i32s = Vector("i32", I32_VECTOR)


# Pieces of LLVM code, for the intrinsics below and in tiles.py.


def constant(vector: ir.VectorType, value: float) -> ir.Constant:
    """The same value in every lane."""
    return ir.Constant(vector, [value] * LANES)


def splat(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    """A scalar in every lane."""
    vector = ir.VectorType(scalar.type, LANES)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, _I32(0))
    zeros = ir.Constant(I32_VECTOR, [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)


def pointer(builder: ir.IRBuilder, address: ir.Value, pointee: ir.Type) -> ir.Value:
    """An integer as an address."""
    return builder.inttoptr(address, pointee.as_pointer())


def load(builder: ir.IRBuilder, address: ir.Value, type_: ir.Type) -> ir.Value:
    """Unaligned load."""
    found = builder.load(pointer(builder, address, type_))
    found.align = 1
    return found


def store(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
    """Unaligned store."""
    builder.store(value, pointer(builder, address, value.type)).align = 1


def fused(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """The fused multiply-add a * b + c of three vectors."""
    kind = ir.FunctionType(F32_VECTOR, [F32_VECTOR] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
    return builder.call(function, [a, b, c])


def shuffle(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, lanes: list[int]) -> ir.Value:
    """Lanes of a (0..15) and b (16..31)."""
    return builder.shuffle_vector(a, b, ir.Constant(I32_VECTOR, lanes))


# Intrinsics.

Emit = Callable[..., ir.Value]


def _define(result: Any, arguments: tuple[Any, ...], emit: Emit) -> Any:
    """An intrinsic of fixed types; emit(builder, *values) writes its code."""

    def typing(typingctx, *given):
        def generate(context, builder, signature, values):
            return (
                emit(builder, *values)
                if result is not types.void
                else _nothing(context, emit(builder, *values))
            )

        return result(*arguments), generate

    # Numba folds a call's arguments by this; it can't fold them into *given.
    names = ["typingctx", *(f"argument{i}" for i in range(len(arguments)))]
    typing.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    )
    return intrinsic(typing)


def _nothing(context: Any, _: object) -> ir.Value:
    return context.get_dummy_value()


def _widen(element: ir.Type) -> Emit:
    def emit(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
        return b.zext(load(b, address, ir.VectorType(element, LANES)), I32_VECTOR)

    return emit


def _narrow(element: ir.Type) -> Emit:
    def emit(b: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
        store(b, address, b.trunc(value, ir.VectorType(element, LANES)))

    return emit


def _select(compare: str, operator: str) -> Emit:
    def emit(
        b: ir.IRBuilder, x: ir.Value, y: ir.Value, then: ir.Value, other: ir.Value
    ) -> ir.Value:
        return b.select(getattr(b, compare)(operator, x, y), then, other)

    return emit


def _fold(b: ir.IRBuilder, value: ir.Value, join: Emit) -> ir.Value:
    """All lanes into one, by halves: the same tree on every machine."""
    width = LANES // 2
    while width:
        other = shuffle(b, value, value, [(lane + width) % LANES for lane in range(LANES)])
        value = join(b, value, other)
        width //= 2
    return b.extract_element(value, _I32(0))


def _larger(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """The larger; y where x is not a number."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


_f, _i, _a = f32s, i32s, types.int64
_scalar_f, _scalar_i = types.float32, types.int32

load_f32 = _define(_f, (_a,), lambda b, p: load(b, p, F32_VECTOR))
load_u16 = _define(_i, (_a,), _widen(ir.IntType(16)))
load_u8 = _define(_i, (_a,), _widen(ir.IntType(8)))
load_i32 = _define(_i, (_a,), lambda b, p: load(b, p, I32_VECTOR))
store_f32 = _define(types.void, (_a, _f), store)
store_i32 = _define(types.void, (_a, _i), store)
store_u16 = _define(types.void, (_a, _i), _narrow(ir.IntType(16)))
store_u8 = _define(types.void, (_a, _i), _narrow(ir.IntType(8)))

peek_f32 = _define(_scalar_f, (_a,), lambda b, p: load(b, p, _F32))
peek_i32 = _define(_scalar_i, (_a,), lambda b, p: load(b, p, _I32))
peek_i64 = _define(_a, (_a,), lambda b, p: load(b, p, ir.IntType(64)))
poke_f32 = _define(types.void, (_a, _scalar_f), store)
poke_i32 = _define(types.void, (_a, _scalar_i), store)
poke_i64 = _define(types.void, (_a, _a), store)

splat_f32 = _define(_f, (_scalar_f,), splat)
splat_i32 = _define(_i, (_scalar_i,), splat)
lanes = _define(_i, (), lambda b: ir.Constant(I32_VECTOR, list(range(LANES))))

fma = _define(_f, (_f, _f, _f), fused)
add = _define(_f, (_f, _f), lambda b, x, y: b.fadd(x, y))
subtract = _define(_f, (_f, _f), lambda b, x, y: b.fsub(x, y))
multiply = _define(_f, (_f, _f), lambda b, x, y: b.fmul(x, y))
divide = _define(_f, (_f, _f), lambda b, x, y: b.fdiv(x, y))
absolute = _define(
    _f,
    (_f,),
    lambda b, x: b.bitcast(
        b.and_(b.bitcast(x, I32_VECTOR), constant(I32_VECTOR, 0x7FFFFFFF)), F32_VECTOR
    ),
)
larger = _define(_f, (_f, _f), _larger)
add_i32 = _define(_i, (_i, _i), lambda b, x, y: b.add(x, y))
subtract_i32 = _define(_i, (_i, _i), lambda b, x, y: b.sub(x, y))
and_i32 = _define(_i, (_i, _i), lambda b, x, y: b.and_(x, y))
or_i32 = _define(_i, (_i, _i), lambda b, x, y: b.or_(x, y))
left = _define(_i, (_i, _scalar_i), lambda b, x, n: b.shl(x, splat(b, n)))
right = _define(_i, (_i, _scalar_i), lambda b, x, n: b.lshr(x, splat(b, n)))
bits = _define(_i, (_f,), lambda b, x: b.bitcast(x, I32_VECTOR))
from_bits = _define(_f, (_i,), lambda b, x: b.bitcast(x, F32_VECTOR))
to_i32 = _define(_i, (_f,), lambda b, x: b.fptosi(x, I32_VECTOR))
to_f32 = _define(_f, (_i,), lambda b, x: b.sitofp(x, F32_VECTOR))
# x < y ? then : other, lane by lane; false where a float is not a number.
if_less_i32 = _define(_f, (_i, _i, _f, _f), _select("icmp_signed", "<"))
if_less = _define(_f, (_f, _f, _f, _f), _select("fcmp_ordered", "<"))
pick_less = _define(_i, (_f, _f, _i, _i), _select("fcmp_ordered", "<"))
pick_less_i32 = _define(_i, (_i, _i, _i, _i), _select("icmp_signed", "<"))
sum_lanes = _define(_scalar_f, (_f,), lambda b, x: _fold(b, x, lambda b, p, q: b.fadd(p, q)))
largest_lane = _define(_scalar_f, (_f,), lambda b, x: _fold(b, x, _larger))
# The low 16 bits of each lane, read as IEEE half precision.
half_to_f32 = _define(
    _f,
    (_i,),
    lambda b, x: b.fpext(
        b.bitcast(
            b.trunc(x, ir.VectorType(ir.IntType(16), LANES)), ir.VectorType(ir.HalfType(), LANES)
        ),
        F32_VECTOR,
    ),
)
float_bits = _define(_scalar_f, (_a,), lambda b, x: b.bitcast(b.trunc(x, _I32), _F32))
# Adds to the 64-bit integer at an address and gives what was there, for all threads to see.
fetch_add = _define(
    _a, (_a, _a), lambda b, p, n: b.atomic_rmw("add", pointer(b, p, ir.IntType(64)), n, "seq_cst")
)


def unpack(count: int) -> Any:
    """An intrinsic that reads `count` int64 at an address, as a tuple: a kernel's arguments."""
    whole = types.UniTuple(types.int64, count)

    def generate(context, builder, signature, values):
        wide = ir.IntType(64)
        found = [load(builder, builder.add(values[0], wide(8 * i)), wide) for i in range(count)]
        return context.make_tuple(builder, whole, found)

    def typing(typingctx, address):
        return whole(types.int64), generate

    return intrinsic(typing)
