"""All linear layers of a step but experts' are applied here: so here they can be added to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from services.engine.torch.kernels.linear import Linear
from services.engine.torch.numerics import Rules


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear layer, of one or several modules of the Hugging Face model side by side.

    parts: each module's name ("model.layers.0.self_attn.q_proj") and outputs, in the outputs'
    order.
    """

    linear: Linear
    parts: tuple[tuple[str, int], ...]


class Linears:
    """Applies projections to a step's rows, by the rules that make them invariant."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules

    def room(self, count: int) -> int:
        """Rows that buffers must have for `count` of them."""
        return self._rules.room(count)

    def __call__(self, projection: Projection, x: torch.Tensor, count: int) -> torch.Tensor:
        """Of the first `count` rows of x [room, inputs]: [count or more, outputs]."""
        return self._rules.apply(projection.linear, x, count)
