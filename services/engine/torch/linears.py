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

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear layer, of one or several modules of the Hugging Face model side by side.

    parts: each module's name ("model.layers.0.self_attn.q_proj") and outputs, in the outputs'
    order.
    """

    linear: Linear
    parts: tuple[tuple[str, int], ...]


class AddedRows(Protocol):
    """What adapters add to the rows of a step."""

    def pick(self, rows: Int64s) -> AddedRows:
        """Of these rows alone, in that order."""

    def add(self, linear: Linear, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds to y, the layer's result of x."""


class Linears:
    """Applies projections to a step's rows, by the rules that make them invariant."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
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
        result = self._rules.apply(projection.linear, x, count)
        if self._added is not None:
            self._added.add(projection.linear, x, result)
        return result
