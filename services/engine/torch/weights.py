"""A model's weights, joined and laid out as the kernels read them: loading.py reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from services.engine.torch.config import ModelConfig
from services.engine.torch.kernels.latent_steps import LatentShape, LatentWeights
from services.engine.torch.kernels.linear import Linear
from services.engine.torch.kernels.moe_steps import ExpertWeights, RouterWeights
from services.engine.torch.linears import Projection
from services.engine.torch.shapes import MlaShape

# Of the norms of ranks: DeepSeek's model has it so, whatever config.json says of the others.
RANK_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class GroupedWeights:
    """Grouped-query attention; norms of queries and keys float32 [head_dim]."""

    qkv: Projection
    output: Projection
    norms: tuple[torch.Tensor, torch.Tensor] | None

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All."""
        return self.qkv, self.output


@dataclass(frozen=True, slots=True)
class MlaWeights:
    """Latent attention: `down` gives the query (of rank q_rank, or whole), latent and rotary key.

    q_norm float32 [q_rank] and q_up lead from a query's rank to the query.
    """

    down: Projection
    q_norm: torch.Tensor | None
    q_up: Projection | None
    latent: LatentWeights
    output: Projection

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All."""
        up = () if self.q_up is None else (self.q_up,)
        return self.down, *up, self.output


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """Gate and up are one linear layer."""

    gate_up: Projection
    down: Projection

    @property
    def projections(self) -> tuple[Projection, ...]:
        """Both."""
        return self.gate_up, self.down


@dataclass(frozen=True, slots=True)
class MoeWeights:
    """What every rank has of a layer with experts, the `index`th of those."""

    index: int
    router: RouterWeights
    shared: DenseWeights | None

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The shared expert's."""
        return () if self.shared is None else self.shared.projections


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: norms float32 [hidden]."""

    attention_norm: torch.Tensor
    attention: GroupedWeights | MlaWeights
    feed_forward_norm: torch.Tensor
    feed_forward: DenseWeights | MoeWeights

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All."""
        return *self.attention.projections, *self.feed_forward.projections


@dataclass(frozen=True, slots=True)
class DraftWeights:
    """The module of multi-token prediction (DeepSeek-V3, section 2.2). Norms float32 [hidden]."""

    token_norm: torch.Tensor
    hidden_norm: torch.Tensor
    joined: Projection
    """Of the token's embedding and the hidden state, side by side."""
    layer: Layer
    norm: torch.Tensor
    embedding: torch.Tensor
    head: Projection


@dataclass(frozen=True, slots=True)
class Slice:
    """A linear layer of some columns of a whole one, which is not computed by our own kernel.

    `whole` makes that one; `columns`: which of its outputs are here, in their order.
    """

    linear: Linear
    whole: Callable[[], Linear]
    columns: tuple[range, ...]


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """Embedding [vocabulary, hidden], layers, last norm float32 [hidden], head.

    experts: by layer that has any, that of `draft` last; empty where others apply them.
    slices: one of each shape that there is.
    """

    embedding: torch.Tensor
    layers: tuple[Layer, ...]
    norm: torch.Tensor
    head: Projection
    draft: DraftWeights | None
    experts: list[ExpertWeights]
    slices: tuple[Slice, ...] = ()

    @property
    def projections(self) -> Iterator[Projection]:
        """All."""
        for layer in self.layers:
            yield from layer.projections
        yield self.head
        if self.draft is not None:
            yield from (self.draft.joined, *self.draft.layer.projections, self.draft.head)

    @property
    def shapes(self) -> Iterator[Linear]:
        """A linear layer of every shape there is, the one that takes the most rows at once.

        Of these one that is not computed by our own kernel, whose rows are independent anyway.
        """
        found: dict[tuple[int, int], Linear] = {}
        for linear in (p.linear for p in self.projections):
            other = found.setdefault((linear.inputs, linear.outputs), linear)
            if (linear.most_rows, other.own) > (other.most_rows, linear.own):
                found[linear.inputs, linear.outputs] = linear
        yield from found.values()


def latent_shape(config: ModelConfig, shape: MlaShape, heads: int) -> LatentShape:
    """What the kernels of latent attention need to know; `heads`: those here."""
    scale = float(shape.nope + shape.rope) ** -0.5
    return LatentShape(
        heads=heads,
        latent=shape.latent,
        rope=shape.rope,
        nope=shape.nope,
        value=shape.value,
        softmax_scale=scale * config.rope.all_dimensions**2,
        epsilon=RANK_EPSILON,
        interleaved=shape.interleaved,
    )
