"""LoRA adapters (arXiv 2106.09685) on the projections of a step, several in one batch.

A row of a sequence with an adapter gets y + B(A x) where others get y, for each module that the
adapter has; the scale is part of B. Rows without one are not touched: they have the base model's
bits. Those with one are computed by a kernel to which only the row and its adapter matter, so a
sequence's bits depend neither on who else is in the batch nor on how many rows it has there.
Ranks are filled up with zeros to a multiple of RANK, which changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from services.engine.adapters import WEIGHTS, Adapter, AdapterFiles, AdapterLimits
from services.engine.models.errors import UnsupportedAdapterError
from services.engine.torch.kernels import lora
from services.engine.torch.kernels.linear import Linear
from services.engine.torch.kernels.simd import LANES
from services.engine.torch.kernels.steps import kind_of
from services.engine.torch.kernels.team import Call
from services.engine.torch.linears import Projection
from services.engine.torch.peft import LoraModule, read_modules

RANK = LANES
Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """An adapter's weights, and where the kernel finds them.

    directory int64 [projections]: the address of each projection's table, 0 for none. ranks: of
    all modules of a projection together, at most.
    """

    directory: Int64s
    tables: tuple[Int64s, ...]
    packed: tuple[torch.Tensor, ...]
    ranks: int

    @property
    def bytes(self) -> int:
        """That the weights take."""
        return sum(tensor.nbytes for tensor in self.packed)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a module is: in which projection, from which column on, and how many of its outputs."""

    projection: int
    column: int
    inputs: int
    outputs: int
    here: range


class LoraAdapters:
    """See stepped.batch.Adapters. `projections`: those that can be added to."""

    def __init__(self, projections: Iterable[Projection], dtype: torch.dtype, threads: int) -> None:
        self._dtype = dtype
        self._threads = threads
        self._index: dict[Linear, int] = {}
        self._places: dict[str, _Place] = {}
        for projection in projections:
            number = self._index.setdefault(projection.linear, len(self._index))
            column = 0
            for part in projection.parts:
                inputs = projection.linear.inputs
                place = _Place(number, column, inputs, part.outputs, part.columns)
                self._places[part.name] = place
                column += len(part.columns)
        self._weights: dict[str, LoraWeights] = {}
        self._ticket = np.zeros(1, np.int64)
        self._call: Call | None = None
        self._ranks = 0

    def read(self, files: AdapterFiles, limits: AdapterLimits) -> tuple[Adapter, LoraWeights]:
        """Any thread. Raises UnsupportedAdapterError, AdapterLimitError."""
        shapes = {name: (place.inputs, place.outputs) for name, place in self._places.items()}
        with torch.inference_mode():
            modules = read_modules(files, shapes, limits)
            weights = self._weights_of(modules)
        # Compiled here if it has to be: not between two steps.
        _ = lora.add_rows.address
        rank = max(module.rank for module in modules.values())
        return Adapter(files.id, rank, weights.bytes), weights

    def put(self, adapter_id: str, weights: LoraWeights) -> None:
        """Steps may name it."""
        self._weights[adapter_id] = weights
        if self._call is None or weights.ranks > self._ranks:
            self._ranks = max(self._ranks, weights.ranks)
            size = lora.scratch_bytes(self._ranks)
            self._scratch = np.zeros((self._threads, size), np.uint8)
            self._call = Call(
                lora.add_rows,
                lora.ADD,
                kind=kind_of(self._dtype),
                scratch=self._scratch.ctypes.data,
                scratch_bytes=size,
                ticket=self._ticket.ctypes.data,
            )

    def drop(self, adapter_id: str) -> None:
        """No step will name it."""
        del self._weights[adapter_id]

    def rows(self, adapters: Sequence[str], of: Int64s) -> LoraRows | None:
        """A step whose row i is of sequence of[i]; None if no sequence has an adapter.

        Raises ValueError for one that is not here.
        """
        if not any(adapters):
            return None
        missing = {name for name in adapters if name and name not in self._weights}
        if missing:
            raise ValueError(f"adapters: {', '.join(sorted(missing))} not loaded")
        names = list(dict.fromkeys(name for name in adapters if name))
        weights = [self._weights[name] for name in names]
        number = {name: i for i, name in enumerate(names)} | {"": -1}
        return LoraRows(self, weights, np.array([number[name] for name in adapters])[of])

    def add(
        self, linear: Linear, x: torch.Tensor, y: torch.Tensor, items: tuple[Int64s, ...]
    ) -> None:
        """Runs the kernel for items: their first rows, numbers of rows and directories."""
        projection = self._index.get(linear)
        if projection is None or not len(items[0]):
            return
        assert self._call is not None, "made with the first adapter"
        rows, counts, directories = items
        self._ticket[0] = 0
        self._call.set(
            items=len(rows),
            projection=projection,
            inputs=linear.inputs,
            x=x.data_ptr(),
            x_bytes=x.stride(0) * x.element_size(),
            y=y.data_ptr(),
            y_values=y.stride(0),
            rows=rows.ctypes.data,
            counts=counts.ctypes.data,
            directories=directories.ctypes.data,
        )
        self._call.run(min(self._threads, len(rows)))

    def _weights_of(self, modules: Mapping[str, LoraModule]) -> LoraWeights:
        by_projection: dict[int, list[tuple[_Place, LoraModule]]] = {}
        for name, module in modules.items():
            place = self._places[name]
            for width in (place.inputs, place.outputs):
                if width % LANES:
                    raise UnsupportedAdapterError(
                        f"{name} is {width} wide; adapters need a multiple of {LANES}", module=name
                    )
            if place.here:
                by_projection.setdefault(place.projection, []).append((place, module))
        directory = np.zeros(len(self._index), np.int64)
        tables, packed, most = [], [], 0
        for projection, some in by_projection.items():
            table, tensors, ranks = self._table(some)
            directory[projection] = table.ctypes.data
            tables.append(table)
            packed += tensors
            most = max(most, ranks)
        return LoraWeights(directory, tuple(tables), tuple(packed), most)

    def _table(
        self, some: list[tuple[_Place, LoraModule]]
    ) -> tuple[Int64s, list[torch.Tensor], int]:
        """What one projection's kernel reads: its table, the weights, and their ranks."""
        downs, parts, ups, rank = [], [], [], 0
        for place, module in sorted(some, key=lambda one: one[0].column):
            own = -(-module.rank // RANK) * RANK
            down = torch.zeros((own, place.inputs))
            down[: module.rank] = module.down
            up = torch.zeros((len(place.here), own))
            up[:, : module.rank] = module.up[place.here.start : place.here.stop] * module.scale
            downs.append(down)
            ups.append(lora.pack(self._held(up)))
            parts += [place.column, len(place.here), rank, own, ups[-1].data_ptr()]
            rank += own
        all_down = lora.pack(self._held(torch.cat(downs)))
        table = np.array([all_down.data_ptr(), rank, len(some), *parts], np.int64)
        return table, [all_down, *ups], rank

    def _held(self, matrix: torch.Tensor) -> torch.Tensor:
        """As the kernel reads it. Raises UnsupportedAdapterError for what becomes infinite."""
        found = matrix.to(self._dtype)
        if not bool(torch.isfinite(found).all()):
            raise UnsupportedAdapterError(
                f"{WEIGHTS}: scaled by lora_alpha, weights are beyond what {self._dtype} holds"
            )
        return found


class LoraRows:
    """The rows of a step that have adapters. `which` of `weights`, for each row; -1: none."""

    def __init__(
        self, adapters: LoraAdapters, weights: Sequence[LoraWeights], which: Int64s
    ) -> None:
        self._adapters = adapters
        self._weights = weights
        self._which = which
        self._items = _items(weights, which)

    def pick(self, rows: Int64s) -> LoraRows:
        """Of these rows alone, in that order."""
        return LoraRows(self._adapters, self._weights, self._which[rows])

    def add(self, linear: Linear, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds to y, the layer's result of x, what the rows' adapters do."""
        self._adapters.add(linear, x, y, self._items)


def _items(weights: Sequence[LoraWeights], which: Int64s) -> tuple[Int64s, Int64s, Int64s]:
    """Rows that follow each other with the same adapter by fours, what is left one by one."""
    edges = np.flatnonzero(np.diff(which, prepend=-2, append=-2))
    rows: list[int] = []
    counts: list[int] = []
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if which[start] >= 0:
            whole = end - (end - start) % lora.ROWS
            fours = range(start, whole, lora.ROWS)
            rows += [*fours, *range(whole, end)]
            counts += [lora.ROWS] * len(fours) + [1] * (end - whole)
    directories = np.array([w.directory.ctypes.data for w in weights], np.int64)
    first = np.array(rows, np.int64)
    return first, np.array(counts, np.int64), directories[which[first]]
