"""Training in several processes, each with windows of its own: their gradients are averaged.

Processes, and not more threads in one: an operator that waits for its slowest thread many times a
step loses most of a core that others use too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Together:
    """One process among `size`."""

    rank: int = 0
    size: int = 1

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor (float32) becomes its mean over the processes, with the same bits in all."""
        if self.size == 1:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        parts = torch.split(flat, [t.numel() for t in tensors])
        for tensor, mean in zip(tensors, parts, strict=True):
            tensor.copy_(mean.view_as(tensor))

    def first(self, value: float) -> float:
        """What the first process says."""
        if self.size == 1:
            return value
        said = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(said, src=0)
        return said.item()


def join(rank: int, size: int, address: str) -> Together:
    """Meets the other processes at `address` (host:port), with torch.distributed over gloo."""
    if size > 1:
        dist.init_process_group("gloo", f"tcp://{address}", rank=rank, world_size=size)
    return Together(rank, size)
