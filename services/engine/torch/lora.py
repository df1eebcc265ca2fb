"""LoRA adapters (arXiv 2106.09685) on the projections of a step, several in one batch.

A row of a sequence with an adapter gets y + B(A x) where others get y, for each module that the
adapter has; the scale is part of B. Rows are gathered by adapter, so nothing of one adapter is
computed with another's rows, and rows without one are not touched: they have the base model's bits.
A and B are linear layers under rules of their own (numerics.py), found when an adapter is loaded:
so a sequence's bits depend neither on who else is in the batch nor on how many rows it has there.
Ranks are filled up with zeros to a multiple of RANK, which changes nothing and keeps shapes few.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from services.engine.adapters import Adapter, AdapterFiles, AdapterLimits
from services.engine.torch.kernels.linear import Linear
from services.engine.torch.linears import Projection
from services.engine.torch.numerics import RowRule, Rules, choose_rule
from services.engine.torch.peft import LoraModule, read_modules

RANK = 16
# Rows computed at once, at most: a usual chunk of a prompt. More would take longer to probe.
MOST_ROWS = 256
# The same where a row of the result is as wide as a vocabulary.
MOST_WIDE_ROWS = 64
WIDE = 32768


@dataclass(frozen=True, slots=True)
class Part:
    """A module's share of a projection: what comes of `ranks` of A's results goes to `outputs`."""

    outputs: slice
    ranks: slice
    up: Linear


@dataclass(frozen=True, slots=True)
class Delta:
    """What an adapter adds to a projection: one A for all its modules, a B for each."""

    down: Linear
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """An adapter's weights by the linear layer that they are added to, and their rules."""

    deltas: Mapping[Linear, Delta]
    rules: Rules


@dataclass(frozen=True, slots=True)
class _Group:
    """The rows of one adapter: `count` of them, and `padded` with the first one again."""

    weights: LoraWeights
    count: int
    padded: torch.Tensor
    together: bool
    """They follow each other."""

    def add(self, linear: Linear, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds B(A x) to y, in these rows."""
        delta = self.weights.deltas.get(linear)
        if delta is None:
            return
        apply, rows, count = self.weights.rules.apply, len(self.padded), self.count
        low = apply(delta.down, torch.index_select(x, 0, self.padded), rows)
        mine = self.padded[:count]
        if self.together:
            first = int(mine[0])
            found = y[first : first + count]
        else:
            found = torch.index_select(y, 0, mine)
        for part in delta.parts:
            ranks = low[:, part.ranks].contiguous()
            found[:, part.outputs] += apply(part.up, ranks, rows)[:count]
        if not self.together:
            y.index_copy_(0, mine, found)


class LoraRows:
    """The rows of a step that have adapters."""

    def __init__(
        self, weights: Mapping[str, LoraWeights], adapters: npt.NDArray[np.object_]
    ) -> None:
        """adapters: of each row, empty for none."""
        self._weights = weights
        self._adapters = adapters
        self._groups = [
            _group(weights[name], np.flatnonzero(adapters == name))
            for name in dict.fromkeys(adapters.tolist())
            if name
        ]

    def pick(self, rows: npt.NDArray[np.int64]) -> LoraRows:
        """Of these rows alone, in that order."""
        return LoraRows(self._weights, self._adapters[rows])

    def add(self, linear: Linear, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds to y, the layer's result of x, what the rows' adapters do."""
        for group in self._groups:
            group.add(linear, x, y)


def _group(weights: LoraWeights, mine: npt.NDArray[np.int64]) -> _Group:
    count = len(mine)
    rows = count
    # All layers get as many rows as the one that needs most: what one gives is what another takes.
    while (room := weights.rules.room(rows)) != rows:
        rows = room
    padded = np.concatenate([mine, np.full(rows - count, mine[0])])
    together = int(mine[-1] - mine[0]) == count - 1
    return _Group(weights, count, torch.from_numpy(padded), together)


class LoraAdapters:
    """See stepped.batch.Adapters. `projections`: those that can be added to."""

    def __init__(
        self,
        projections: Iterable[Projection],
        dtype: torch.dtype,
        *,
        packed: bool,
        batch_invariant: bool,
    ) -> None:
        self._places: dict[str, tuple[Linear, slice]] = {}
        for projection in projections:
            start = 0
            for name, outputs in projection.parts:
                self._places[name] = projection.linear, slice(start, start + outputs)
                start += outputs
        self._dtype = dtype
        self._packed = packed
        self._batch_invariant = batch_invariant
        self._rules: dict[tuple[int, int], RowRule] = {}
        self._weights: dict[str, LoraWeights] = {}

    def read(self, files: AdapterFiles, limits: AdapterLimits) -> tuple[Adapter, LoraWeights]:
        """Any thread, one at a time.

        Raises UnsupportedAdapterError, AdapterLimitError, and NotInvariantError if its shapes can't
        be made batch-invariant.
        """
        shapes = {
            name: (linear.inputs, outputs.stop - outputs.start)
            for name, (linear, outputs) in self._places.items()
        }
        with torch.inference_mode():
            modules = read_modules(files, shapes, limits)
            deltas = self._deltas(modules)
            used = [x for d in deltas.values() for x in (d.down, *(p.up for p in d.parts))]
            rules = self._rules_for(used)
        size = self._dtype.itemsize * sum(x.inputs * x.outputs for x in used)
        rank = max(module.rank for module in modules.values())
        return Adapter(files.id, rank, size), LoraWeights(deltas, rules)

    def put(self, adapter_id: str, weights: LoraWeights) -> None:
        """Steps may name it."""
        self._weights[adapter_id] = weights

    def drop(self, adapter_id: str) -> None:
        """No step will name it."""
        del self._weights[adapter_id]

    def rows(self, adapters: tuple[str, ...], of: npt.NDArray[np.int64]) -> LoraRows | None:
        """A step whose row i is of sequence of[i]; None if no sequence has an adapter.

        Raises ValueError for one that is not here.
        """
        if not any(adapters):
            return None
        missing = {name for name in adapters if name and name not in self._weights}
        if missing:
            raise ValueError(f"adapters: {', '.join(sorted(missing))} not loaded")
        return LoraRows(self._weights, np.array(adapters, dtype=object)[of])

    def _deltas(self, modules: Mapping[str, LoraModule]) -> dict[Linear, Delta]:
        by_linear: dict[Linear, list[tuple[slice, LoraModule]]] = {}
        for name, module in modules.items():
            linear, outputs = self._places[name]
            by_linear.setdefault(linear, []).append((outputs, module))
        return {linear: self._delta(some) for linear, some in by_linear.items()}

    def _delta(self, modules: list[tuple[slice, LoraModule]]) -> Delta:
        downs, parts, start = [], [], 0
        for outputs, module in sorted(modules, key=lambda one: one[0].start):
            rank = -(-module.rank // RANK) * RANK
            down = torch.zeros((rank, module.down.shape[1]))
            down[: module.rank] = module.down
            up = torch.zeros((module.up.shape[0], rank))
            up[:, : module.rank] = module.up * module.scale
            downs.append(down)
            parts.append(Part(outputs, slice(start, start + rank), self._linear(up)))
            start += rank
        return Delta(self._linear(torch.cat(downs)), tuple(parts))

    def _linear(self, weight: torch.Tensor) -> Linear:
        most = MOST_WIDE_ROWS if weight.shape[0] > WIDE else MOST_ROWS
        return Linear(weight.to(self._dtype), None, packed=self._packed, most_rows=most)

    def _rules_for(self, linears: Iterable[Linear]) -> Rules:
        if not self._batch_invariant:
            return Rules({})
        found = {}
        for linear in linears:
            shape = linear.inputs, linear.outputs
            if shape not in self._rules:
                self._rules[shape] = choose_rule(linear, self._dtype)
            found[shape] = self._rules[shape]
        return Rules(found)
