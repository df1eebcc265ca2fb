"""Attention of a layer, from its normalized input to what the output projection takes."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from kvtransfer.layout import KvLayout
from services.engine.torch.config import ModelConfig
from services.engine.torch.kernels.batch import Plan
from services.engine.torch.kernels.grouped_steps import GroupedSteps
from services.engine.torch.kernels.latent_steps import LatentSteps
from services.engine.torch.kernels.steps import Norm
from services.engine.torch.linears import Linears
from services.engine.torch.parallel.tensor_cuts import Cuts
from services.engine.torch.rope import rotary_tables
from services.engine.torch.shapes import GroupedShape, MlaShape
from services.engine.torch.weights import RANK_EPSILON, GroupedWeights, MlaWeights, latent_shape


class Attention(Protocol):
    """Of all layers of a model. Begin a step, then call it layer by layer."""

    def begin(self, step: Plan, pool: npt.NDArray[np.uint8], room: int) -> None:
        """A step over `pool`; linear layers may read up to `room` rows of what is returned."""

    def __call__(
        self, layer: int, weights: GroupedWeights | MlaWeights, x: torch.Tensor, count: int
    ) -> torch.Tensor:
        """Writes the KV of x [room, hidden], of which `count` rows count, then attends.

        Returns what the heads here make of it, [room, heads * width of a value], which stands
        until the next call.
        """


class GroupedAttention:
    """Grouped-query attention."""

    def __init__(
        self,
        config: ModelConfig,
        shape: GroupedShape,
        layout: KvLayout,
        dtype: torch.dtype,
        threads: int,
        linear: Linears,
        cuts: Cuts,
    ) -> None:
        cosines, sines = rotary_tables(config.rope, shape.rotary, config.positions)
        epsilon, here = config.norm_epsilon, cuts.grouped(shape)[cuts.rank]
        self._steps = GroupedSteps(shape, layout, dtype, threads, cosines, sines, epsilon, here)
        self._linear = linear

    def begin(self, step: Plan, pool: npt.NDArray[np.uint8], room: int) -> None:
        """See Attention."""
        self._steps.begin(step, pool, room)

    def __call__(
        self, layer: int, weights: GroupedWeights | MlaWeights, x: torch.Tensor, count: int
    ) -> torch.Tensor:
        """See Attention."""
        assert isinstance(weights, GroupedWeights), "read for this configuration"
        return self._steps.attend(layer, self._linear(weights.qkv, x, count), weights.norms)


class LatentAttention:
    """Multi-head latent attention."""

    def __init__(
        self,
        config: ModelConfig,
        shape: MlaShape,
        layout: KvLayout,
        dtype: torch.dtype,
        threads: int,
        linear: Linears,
        cuts: Cuts,
    ) -> None:
        cosines, sines = rotary_tables(config.rope, shape.rotary, config.positions)
        heads = len(cuts.here(cuts.heads(shape.heads)))
        latent = latent_shape(config, shape, heads)
        self._steps = LatentSteps(latent, layout, dtype, threads, cosines, sines)
        self._q_width = shape.q_rank or heads * (shape.nope + shape.rope)
        self._norm = None
        if shape.q_rank is not None:
            self._norm = Norm(shape.q_rank, RANK_EPSILON, dtype, threads)
        self._linear = linear
        self._room = 0

    def begin(self, step: Plan, pool: npt.NDArray[np.uint8], room: int) -> None:
        """See Attention."""
        self._room = room
        self._steps.begin(step, pool, room)

    def __call__(
        self, layer: int, weights: GroupedWeights | MlaWeights, x: torch.Tensor, count: int
    ) -> torch.Tensor:
        """See Attention."""
        assert isinstance(weights, MlaWeights), "read for this configuration"
        down = self._linear(weights.down, x, count)
        q = down[:, : self._q_width]
        if self._norm is not None and weights.q_norm is not None and weights.q_up is not None:
            normed = self._norm(q, weights.q_norm, count, self._room)
            q = self._linear(weights.q_up, normed, count)
        self._steps.write(layer, down[:, self._q_width :], weights.latent)
        return self._steps.attend(layer, q, weights.latent)


def attention_of(
    config: ModelConfig,
    layout: KvLayout,
    dtype: torch.dtype,
    threads: int,
    linear: Linears,
    cuts: Cuts,
) -> Attention:
    """The one that the model has, with the heads that are here."""
    shape = config.attention
    if isinstance(shape, GroupedShape):
        return GroupedAttention(config, shape, layout, dtype, threads, linear, cuts)
    return LatentAttention(config, shape, layout, dtype, threads, linear, cuts)
