"""Rounds over a mesh: one small exchange before each step."""

from __future__ import annotations

from collections.abc import Callable

from services.engine.stepped.rounds import Round
from services.engine.torch.parallel.experts import RankExperts
from services.engine.torch.parallel.mesh import Mesh


class MeshRounds:
    """See stepped.rounds.Rounds. Between two rounds experts move, when all ranks know where to."""

    shared = True

    def __init__(self, mesh: Mesh, want: Callable[[int], None], experts: RankExperts) -> None:
        """`want` has the other ranks called to a round that they don't know of."""
        self._mesh = mesh
        self._want = want
        self._experts = experts
        self._next = 1
        self._called = 0
        self._awake = False

    @property
    def due(self) -> bool:
        """Another rank waits, or experts are to be moved."""
        return self._called >= self._next or self._experts.waiting

    def called(self, number: int) -> None:
        """One thread calls, another reads."""
        self._called = max(self._called, number)

    def meet(self, *, work: bool, draft_calls: int, leaving: bool) -> Round:
        """See Rounds."""
        if not self._awake and self._called < self._next:
            self._want(self._next)
        said = self._mesh.gather([work, draft_calls, leaving, self._experts.known])
        self._next += 1
        works, calls, leaves, plans = said.T
        self._awake = bool(works.any())
        self._experts.move_some(int(plans.min()))
        return Round(self._awake, int(calls.max()), bool(leaves.all()))
