"""Mixture of experts: route, compute, combine.

A row chooses its experts (`route`), each expert's linear layers are applied to the rows that
chose it (`ExpertCompute`: here, or wherever the experts are), and the row's owner adds up what
comes back, in float32, in the order in which the row chose (`combine`). So a row's bits depend
neither on its company nor on where a replica of an expert ran.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from services.engine.torch.kernels.moe_steps import Router
from services.engine.torch.shapes import MoeShape
from services.engine.torch.weights import DenseWeights, MoeWeights

Int32s = npt.NDArray[np.int32]
Dense = Callable[[DenseWeights, torch.Tensor, int], torch.Tensor]


class ExpertCompute(Protocol):
    """Applies experts to the rows that chose them.

    It is called once for every layer with experts in every step, in their order, also where no row
    is left (n = 0): so ranks that exchange rows meet here. kernels.moe_steps.ExpertSteps is the
    one for experts that are all here; its ids are places.
    """

    def __call__(self, layer: int, x: torch.Tensor, ids: Int32s) -> tuple[torch.Tensor, Int32s]:
        """Experts ids [n, k] (-1: none) of the layer applied to x [n, hidden].

        layer counts the layers with experts alone, that of multi-token prediction last. Returns
        rows [m, hidden or the columns here] of x's dtype, unweighted, in any order, and where int32
        [n, k]: which of them is that of a row and choice, -1 where the id was. x must stay as it is
        until this returns; what is returned stands until the next call.
        """


class MixtureOfExperts:
    """The feed-forward part of layers with experts."""

    def __init__(
        self,
        shape: MoeShape,
        layers: int,
        hidden: int,
        dtype: torch.dtype,
        threads: int,
        *,
        compute: ExpertCompute,
        dense: Dense,
        columns: int | None = None,
        gather: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
    ) -> None:
        """layers: those with experts; dense: applies the shared expert.

        columns: of what both return that are here, which `gather` completes; None: all.
        """
        self._router = Router(shape, hidden, dtype, threads, columns)
        self._gather = gather
        self._choices = shape.choices
        self._compute = compute
        self._dense = dense
        self.tokens = np.zeros((layers, shape.experts), np.int64)
        """Rows that chose each expert, int64 [layers, experts]; it only grows."""

    def __call__(self, weights: MoeWeights, x: torch.Tensor, count: int) -> torch.Tensor:
        """Of the first `count` rows of x [room, hidden]: [count or more, hidden]."""
        if count == 0:
            self._compute(weights.index, x[:0], np.zeros((0, self._choices), np.int32))
            return x[:0]
        ids = self._router.choose(x, count, weights.router, self.tokens[weights.index])
        outputs, where = self._compute(weights.index, x[:count], ids)
        common = None if weights.shared is None else self._dense(weights.shared, x, count)
        found = self._router.combine(outputs, where, common)
        return found if self._gather is None else self._gather(found, count)
