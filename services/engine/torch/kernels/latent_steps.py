"""Multi-head latent attention of one step: its buffers, and the kernels called on them.

The absorbed form (DeepSeek-V2, arXiv 2405.04434, section 2.1; FlashMLA): a head's no-position
query is carried into the space of latents by that head's key projection, so that all heads attend
over the latents themselves, as the pool stores them; what comes out is carried into the head's
values afterwards. Prefill and decode do the same, row by row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvtransfer.layout import KvLayout
from services.engine.torch.kernels.batch import Plan

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LatentShape:
    """What latent attention is made of; `latent`, `rope`, `nope`, `value` in multiples of 16."""

    heads: int
    latent: int
    """kv_lora_rank"""
    rope: int
    """qk_rope_head_dim"""
    nope: int
    """qk_nope_head_dim"""
    value: int
    """v_head_dim"""
    softmax_scale: float
    """What scores are multiplied by, YaRN's factor included."""
    epsilon: float
    """Of the latent's RMSNorm."""
    interleaved: bool = True
    """Rotary pairs are neighbours (0, 1), (2, 3), as DeepSeek's; else (0, rope / 2), ..."""


@dataclass(frozen=True, slots=True)
class LatentWeights:
    """A layer's kv_b_proj, split by head and laid out for the kernels; see `pack`."""

    norm: torch.Tensor
    """Of the latent, float32 [latent]."""
    keys: torch.Tensor
    values: torch.Tensor


def pack(shape: LatentShape, kv_b: torch.Tensor, norm: torch.Tensor) -> LatentWeights:
    """From kv_b_proj.weight [heads * (nope + value), latent] of the engine's dtype, and the norm."""
    raise NotImplementedError


class LatentSteps:
    """Buffers and calls of a model's latent attention: begin a step, then layers in their order.

    Raises UnsupportedModelError, by name, for shapes that the kernels don't have.
    """

    def __init__(
        self,
        shape: LatentShape,
        layout: KvLayout,
        dtype: torch.dtype,
        threads: int,
        cosines: Floats,
        sines: Floats,
    ) -> None:
        """cosines, sines: float32 [positions, rope / 2], with YaRN's factor if the model has one.

        layout: kvtransfer.layout.mla_layout, by component.
        """
        raise NotImplementedError

    def begin(self, step: Plan, pool: npt.NDArray[np.uint8], room: int) -> None:
        """A step over `pool`; linear layers may read up to `room` rows of what is returned.

        Rows whose `step.blocks` is negative are not written.
        """
        raise NotImplementedError

    def write(self, layer: int, kv: torch.Tensor, weights: LatentWeights) -> None:
        """Normalizes latents, rotates keys, and writes both into the pool, rounded to its kind.

        kv [rows or more, latent + rope] of the engine's dtype, as kv_a_proj_with_mqa gives it; rows
        may be apart (a part of a wider, joined product), values in a row may not.
        """
        raise NotImplementedError

    def attend(
        self, layer: int, q: torch.Tensor, weights: LatentWeights, first_key: int = 0
    ) -> torch.Tensor:
        """Attention over the pool: [room, heads * value] of the engine's dtype, reused every call.

        q [rows or more, heads * (nope + rope)]; rows may be apart, as in write(). Positions below
        first_key have no KV: nobody looks at them, and no row may stand there (ValueError).
        """
        raise NotImplementedError
