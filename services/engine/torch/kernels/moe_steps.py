"""A mixture of experts in one step: buffers, and the kernels called on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from services.engine.torch.kernels import experts, route
from services.engine.torch.kernels.steps import kind_of
from services.engine.torch.kernels.team import Call, float_argument
from services.engine.torch.shapes import MoeShape

Int32s = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RouterWeights:
    """A layer's: weight as route.pack lays it out; bias float32 [route.padded(experts)]."""

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Experts of a layer in their places: [places, ...] as experts.pack_gated, .pack lay them out.

    So an expert is one piece of each, gate_up[place] and down[place], and can be copied as such.
    """

    gate_up: torch.Tensor
    down: torch.Tensor


class Router:
    """Chooses experts, and adds up what they made of a row."""

    def __init__(
        self,
        shape: MoeShape,
        hidden: int,
        dtype: torch.dtype,
        threads: int,
        columns: int | None = None,
    ) -> None:
        """columns: of what experts return that are here, all if None."""
        self._shape = shape
        self._columns = columns or hidden
        self._dtype = dtype
        self._threads = threads
        size = route.scratch_bytes(hidden, shape.experts, shape.groups)
        self._scratch = np.zeros((threads, size), np.uint8)
        self._ticket = np.zeros(1, np.int64)
        common = {"choices": shape.choices, "kind": kind_of(dtype)}
        self._route = Call(
            route.route,
            route.ROUTE,
            width=hidden,
            experts=shape.experts,
            groups=shape.groups,
            kept_groups=shape.kept_groups,
            sigmoid=int(shape.sigmoid),
            normalized=int(shape.normalized),
            factor=float_argument(shape.factor),
            shared_gate=int(shape.shared_gate),
            scratch=self._scratch.ctypes.data,
            scratch_bytes=size,
            ticket=self._ticket.ctypes.data,
            **common,
        )
        self._combine = Call(route.combine, route.COMBINE, width=self._columns, **common)
        self._grow(64)

    def _grow(self, count: int) -> None:
        self._ids = np.zeros((count, self._shape.choices), np.int32)
        self._weights = np.zeros((count, self._shape.choices), np.float32)
        self._shared = np.zeros(count, np.float32)
        self._out = torch.zeros((count, self._columns), dtype=self._dtype)
        weights, shared = self._weights.ctypes.data, self._shared.ctypes.data
        self._route.set(ids=self._ids.ctypes.data, weights=weights, shared=shared)
        self._combine.set(weights=weights, shared=shared, out=self._out.data_ptr())

    def choose(
        self, x: torch.Tensor, count: int, weights: RouterWeights, counts: npt.NDArray[np.int64]
    ) -> Int32s:
        """Experts of the first `count` rows of x: ids int32 [count, choices].

        counts int64 [experts] grow by how often each was chosen. combine() of these rows is next.
        """
        if count > len(self._ids):
            self._grow(max(count, 2 * len(self._ids)))
        self._ticket[0] = 0
        self._route.set(
            rows=count,
            x=x.data_ptr(),
            weight=weights.weight.data_ptr(),
            bias=weights.bias.data_ptr(),
            counts=counts.ctypes.data,
        )
        self._route.run(min(self._threads, -(-count // route.TAKE)))
        return self._ids[:count]

    def combine(
        self, outputs: torch.Tensor, where: Int32s, common: torch.Tensor | None
    ) -> torch.Tensor:
        """What ExpertCompute returned and the shared expert's [rows, columns], by weight."""
        count = len(where)
        self._combine.set(
            rows=count,
            outputs=outputs.data_ptr(),
            where=where.ctypes.data,
            common=0 if common is None else common.data_ptr(),
        )
        self._combine.run(min(self._threads, -(-count // route.TAKE)))
        return self._out


@dataclass(frozen=True, slots=True)
class ExpertColumns:
    """What one of several processes computes of every expert's two linear layers.

    gather(x, count) gives all of a row's gated values of those that each process has.
    """

    gated: int
    outputs: int
    gather: Callable[[torch.Tensor, int], torch.Tensor]


class ExpertSteps:
    """Applies experts to the rows that chose them; `layers` is changed by whoever moves experts."""

    def __init__(
        self,
        layers: list[ExpertWeights],
        hidden: int,
        intermediate: int,
        dtype: torch.dtype,
        threads: int,
        columns: ExpertColumns | None = None,
    ) -> None:
        """columns: which of the experts' are in `layers`; None: all."""
        self._layers = layers
        self._hidden = hidden
        self._outputs = columns.outputs if columns else hidden
        self._intermediate = columns.gated if columns else intermediate
        self._columns = columns
        self._dtype = dtype
        self._threads = threads
        places = max((len(layer.gate_up) for layer in layers), default=0)
        self._starts = np.zeros(places + 1, np.int32)
        self._chosen = np.zeros(max(places, 1), np.int32)
        self._found = np.zeros(1, np.int64)
        self._scratch = np.zeros((threads, experts.TILE_BYTES), np.uint8)
        self._ticket = np.zeros(1, np.int64)
        order = {"starts": self._starts.ctypes.data, "chosen": self._chosen.ctypes.data}
        self._group = Call(experts.group, experts.GROUP, found=self._found.ctypes.data, **order)
        common = {
            "kind": kind_of(dtype),
            "scratch": self._scratch.ctypes.data,
            "ticket": self._ticket.ctypes.data,
        }
        self._gate_up = Call(
            experts.apply,
            experts.APPLY,
            gated=1,
            inputs=hidden,
            outputs=self._intermediate,
            **common,
            **order,
        )
        self._down = Call(
            experts.apply,
            experts.APPLY,
            inputs=intermediate,
            outputs=self._outputs,
            **common,
            **order,
        )
        self._grow(64)

    def _grow(self, assignments: int) -> None:
        self._source = np.zeros(assignments, np.int64)
        self._where = np.zeros(assignments, np.int32)
        self._x = torch.zeros((assignments, self._hidden), dtype=self._dtype)
        self._gated = torch.zeros((assignments, self._intermediate), dtype=self._dtype)
        self._out = torch.zeros((assignments, self._outputs), dtype=self._dtype)
        self._group.set(source=self._source.ctypes.data, where=self._where.ctypes.data)
        self._gate_up.set(x=self._x.data_ptr(), out=self._gated.data_ptr())
        self._down.set(x=self._gated.data_ptr(), out=self._out.data_ptr())

    def __call__(self, layer: int, x: torch.Tensor, ids: Int32s) -> tuple[torch.Tensor, Int32s]:
        """See moe.ExpertCompute; ids are places of the layer."""
        if ids.size == 0:
            return self._out[:0], ids
        if ids.size > len(self._source):
            self._grow(max(ids.size, 2 * len(self._source)))
        weights = self._layers[layer]
        places = len(weights.gate_up)
        ids = np.ascontiguousarray(ids)
        self._group.set(
            assignments=ids.size, choices=ids.shape[1], places=places, ids=ids.ctypes.data
        )
        self._group.run(1)
        chosen, count = int(self._found[0]), int(self._starts[places])
        source = torch.from_numpy(self._source[:count])
        torch.index_select(x, 0, source, out=self._x[:count])
        self._run(self._gate_up, weights.gate_up, chosen)
        if self._columns is not None:
            gated = self._columns.gather(self._gated, count)
            self._down.set(x=gated.data_ptr())
        self._run(self._down, weights.down, chosen)
        return self._out[:count], self._where[: ids.size].reshape(ids.shape)

    def _run(self, call: Call, weight: torch.Tensor, chosen: int) -> None:
        self._ticket[0] = 0
        step = weight.stride(0) * weight.element_size()
        call.set(weight=weight.data_ptr(), weight_bytes=step, chosen_count=chosen)
        call.run(self._threads)
