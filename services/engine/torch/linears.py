"""All linear layers of a step but experts' are applied here: so here they can be added to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from services.engine.torch.kernels.linear import Linear
from services.engine.torch.numerics import Rows, Rules
from services.engine.torch.shapes import Module

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear layer, of one or several modules of the Hugging Face model side by side.

    parts: the modules, in the order of their columns, as far as they are computed here. Where
    several processes share the layer (parallel/tensor_gather.py): `spread`, by rank, is how many
    values of a row of its input each has, () if all have all; `gathered` how many of its last
    columns are to be had by all, () for none.
    """

    linear: Linear
    parts: tuple[Module, ...]
    spread: tuple[int, ...] = ()
    gathered: tuple[int, ...] = ()


class Gather(Protocol):
    """Puts together what several processes have of rows. All call it alike."""

    def __call__(
        self, x: torch.Tensor, count: int, room: int, widths: tuple[int, ...]
    ) -> torch.Tensor:
        """Of the first `count` rows of x [count or more, own]: [room, own - last + all].

        The last widths[rank] columns of each rank, in ranks' order, stand behind the others here.
        Rows from `count` on are anything; x may not change before the next call. Raises
        WorkerLostError.
        """


class AddedRows(Protocol):
    """What adapters add to the rows of a step."""

    def pick(self, rows: Int64s) -> AddedRows:
        """Of these rows alone, in that order."""

    def add(self, linear: Linear, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds to y, the layer's result of x."""


class Linears:
    """Applies projections to a step's rows, by the rules that make them invariant."""

    def __init__(self, rules: Rules, gather: Gather | None = None) -> None:
        self._rules = rules
        self._gather = gather
        self._added: AddedRows | None = None

    def prepare(self, linears: Iterable[Rows], counts: Iterable[int], dtype: torch.dtype) -> None:
        """Lets oneDNN make what it needs for so many rows: once a shape, not once a layer."""
        for linear in linears:
            fitting = {min(count, linear.most_rows) for count in counts}
            x = torch.zeros((self._rules.room(max(fitting)), linear.inputs), dtype=dtype)
            for count in sorted(fitting):
                self._rules.apply(linear, x, count)

    def room(self, count: int) -> int:
        """Rows that buffers must have for `count` of them."""
        return self._rules.room(count)

    def begin(self, added: AddedRows | None) -> None:
        """A step to whose rows this is added."""
        self._added = added

    def pick(self, rows: Int64s) -> None:
        """These rows alone go on, in that order."""
        if self._added is not None:
            self._added = self._added.pick(rows)

    def __call__(self, projection: Projection, x: torch.Tensor, count: int) -> torch.Tensor:
        """Of the first `count` rows of x [room, inputs]: [count or more, outputs]."""
        if projection.spread:
            x = self.gather(x, count, projection.spread)
        result = self._rules.apply(projection.linear, x, count)
        if self._added is not None:
            self._added.add(projection.linear, x, result)
        if projection.gathered:
            result = self.gather(result, count, projection.gathered)
        return result

    def gather(self, x: torch.Tensor, count: int, widths: tuple[int, ...]) -> torch.Tensor:
        """See Gather; x itself where no other process has anything."""
        return x if self._gather is None else self._gather(x, count, self.room(count), widths)
