"""What several processes have of rows, brought together: behind every layer that they share.

A gather is one all-to-all in which each sends its columns to all others; everybody knows how many
rows and columns there are, so nothing else is said. Values are moved and never added up: bits are
those of one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from services.engine.torch.parallel.mesh import Mesh
from services.runtime.errors import WorkerLostError


@dataclass(slots=True)
class Traffic:
    """What gathers have cost here so far."""

    calls: int = 0
    bytes: int = 0
    """Sent to others."""
    seconds: float = 0.0
    """Waiting for others included."""


class TensorGather:
    """See linears.Gather."""

    def __init__(self, mesh: Mesh, clock: Callable[[], float] = time.perf_counter) -> None:
        self._mesh = mesh
        self._clock = clock
        self.traffic = Traffic()

    def __call__(
        self, x: torch.Tensor, count: int, room: int, widths: tuple[int, ...]
    ) -> torch.Tensor:
        """See linears.Gather."""
        began, rank = self._clock(), self._mesh.rank
        own = widths[rank]
        kept = x.shape[1] - own
        mine = x[:count, kept:]
        sizes = [0 if r == rank else count * width for r, width in enumerate(widths)]
        received = x.new_empty(sum(sizes))
        self._exchange(received, mine, sizes)
        out = x.new_empty((room, kept + sum(widths)))
        out[:count, :kept] = x[:count, :kept]
        end = kept
        taken = 0
        for r, (width, size) in enumerate(zip(widths, sizes, strict=True)):
            part = mine if r == rank else received[taken : taken + size].view(count, width)
            out[:count, end : end + width] = part
            end, taken = end + width, taken + size
        self.traffic.calls += 1
        self.traffic.bytes += mine.nbytes * (len(widths) - 1)
        self.traffic.seconds += self._clock() - began
        return out

    def _exchange(self, received: torch.Tensor, mine: torch.Tensor, sizes: list[int]) -> None:
        """`sizes` of what comes, in values; what goes is `mine`, to everybody else."""
        mesh, each = self._mesh, received.element_size()
        others = mesh.ranks - 1
        sent = torch.cat([mine.reshape(-1)] * others) if others > 1 else mine.reshape(-1)
        going = [0 if r == mesh.rank else mine.numel() * each for r in range(mesh.ranks)]
        try:
            mesh.exchange(
                received.view(torch.uint8),
                sent.view(torch.uint8),
                [size * each for size in sizes],
                going,
            )
        except RuntimeError as error:
            raise lost(error) from error


def lost(error: RuntimeError) -> WorkerLostError:
    """What an exchange that failed means."""
    words = str(error).splitlines()[0]
    return WorkerLostError(f"a process that this worker's model is shared with is gone: {words}")
