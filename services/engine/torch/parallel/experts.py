"""A rank's share of the experts, and how replicas get from rank to rank while they serve.

A plan is carried out layer by layer, a few between two steps: what a rank sends is read before
anything is written, and where a layer's experts are changes on all ranks between the same two
steps.
So every step finds every expert where it looks for it, and no token changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from services.engine.api import ExpertMap, ExpertMove, ExpertShape
from services.engine.torch.kernels.moe_steps import ExpertWeights
from services.engine.torch.parallel.mesh import Mesh
from services.engine.torch.parallel.placement import Replicas, by_layer, first_map

BYTES_BETWEEN_STEPS = 64 * 2**20
"""Of experts moved between two steps, before the rest has to wait for the next ones."""

_Part = tuple[ExpertMap, tuple[ExpertMove, ...]]


class RankExperts:
    """See stepped.batch.Experts. The step thread calls, but for `map`, tokens() and move()."""

    def __init__(
        self,
        mesh: Mesh,
        shape: ExpertShape,
        layers: Sequence[ExpertWeights],
    ) -> None:
        """`layers`: the places here, as first_map fills them."""
        self.shape = shape
        self.map = first_map(shape)
        self._mesh = mesh
        self._layers = layers
        self.counts: Callable[[], npt.NDArray[np.int64]] = lambda: np.zeros(0, np.int64)
        """Tokens routed from here, [layers, logical]: the model's, once there is one."""
        self._replicas = self._of(self.map)
        self._plans: deque[tuple[ExpertMap, tuple[ExpertMove, ...]]] = deque()
        self._parts: deque[_Part] = deque()

    def tokens(self) -> tuple[int, ...]:
        """Routed from here, layers x logical."""
        return tuple(self.counts().ravel().tolist())

    def replicas(self, layer: int) -> Replicas:
        """Where a layer's experts are, in this step."""
        return self._replicas[layer]

    def move(self, plan: ExpertMap, moves: Sequence[ExpertMove]) -> None:
        """Takes a plan, which begins when all ranks have taken it. Any thread."""
        self._plans.append((plan, tuple(moves)))

    @property
    def waiting(self) -> bool:
        """A plan is to be carried out, or on with."""
        return bool(self._plans or self._parts)

    @property
    def known(self) -> int:
        """Number of the next plan here, or of the last one."""
        return self._plans[0][0].plan if self._plans else self.map.plan

    def move_some(self, known_to_all: int) -> None:
        """Some layers of the plan under way; `known_to_all`: the least `known` of any rank.

        All ranks call it with the same number, between two steps.
        """
        if not self._parts and self._plans and self._plans[0][0].plan <= known_to_all:
            plan, moves = self._plans[0]
            self._parts.extend(by_layer(self.shape, self.map, plan, moves))
        moved = 0
        while self._parts and moved < BYTES_BETWEEN_STEPS:
            placed, moves = self._parts.popleft()
            self._exchange(moves)
            self._replicas = self._of(placed)
            self.map = placed
            moved += len(moves) * self.shape.expert_bytes
        if self._plans and self.map.plan == self._plans[0][0].plan:
            self._plans.popleft()

    def _of(self, placed: ExpertMap) -> list[Replicas]:
        shape = self.shape
        rows = np.array(placed.physical_to_logical).reshape(shape.layers, shape.physical)
        return [Replicas.of(row, shape.logical) for row in rows.tolist()]

    def _exchange(self, moves: tuple[ExpertMove, ...]) -> None:
        """Copies experts of one layer."""
        if not moves:
            return
        mesh, each = self._mesh, self.shape.physical // self.shape.gpus
        weights = self._layers[moves[0].layer]
        going: list[list[ExpertMove]] = [[] for _ in range(mesh.ranks)]
        coming: list[list[ExpertMove]] = [[] for _ in range(mesh.ranks)]
        for move in moves:
            source, target = move.from_place // each, move.to_place // each
            if source == mesh.rank:
                going[target].append(move)
            if target == mesh.rank:
                coming[source].append(move)
        sent = torch.stack(
            [_bytes(weights, m.from_place % each) for m in chain(*going)]
            or [torch.empty(0, dtype=torch.uint8)]
        )
        wide = weights.gate_up[0].nbytes
        received = torch.empty((sum(map(len, coming)), self.shape.expert_bytes), dtype=torch.uint8)
        mesh.exchange(received, sent, [len(p) for p in coming], [len(p) for p in going])
        for move, row in zip(chain(*coming), received, strict=True):
            place = move.to_place % each
            _flat(weights.gate_up[place]).copy_(row[:wide])
            _flat(weights.down[place]).copy_(row[wide:])


def _flat(weight: torch.Tensor) -> torch.Tensor:
    return weight.view(-1).view(torch.uint8)


def _bytes(weights: ExpertWeights, place: int) -> torch.Tensor:
    """A copy of one expert."""
    return torch.cat([_flat(weights.gate_up[place]), _flat(weights.down[place])])
