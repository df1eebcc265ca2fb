"""Where the replicas of experts are, and which of them a row goes to. Pure.

A layer has `physical` places, an equal share on each rank, in order: rank r has those from
r * physical / ranks on. An expert is in one place at least. Rows take the replicas of an expert in
turn; since every replica computes the same bits it is no matter which one a row takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.engine.api import ExpertMap, ExpertMove, ExpertShape

Int32s = npt.NDArray[np.int32]


def first_map(shape: ExpertShape) -> ExpertMap:
    """Before any plan: experts in order, and what is redundant with the first ones again."""
    row = tuple(place % shape.logical for place in range(shape.physical))
    return ExpertMap(row * shape.layers)


def places_of(shape: ExpertShape, placed: ExpertMap, rank: int) -> list[list[int]]:
    """The expert in each place of a rank, by layer."""
    rows = np.array(placed.physical_to_logical).reshape(shape.layers, shape.gpus, -1)
    found: list[list[int]] = rows[:, rank].tolist()
    return found


@dataclass(frozen=True, slots=True)
class Replicas:
    """Where the experts of one layer are: replica r of expert e is in places[e, r % counts[e]]."""

    places: Int32s
    """[logical, most replicas], -1 for none."""
    counts: Int32s
    """[logical]"""

    @classmethod
    def of(cls, placed: Sequence[int], logical: int) -> Replicas:
        """From the expert in each place."""
        row = np.array(placed)
        counts = np.bincount(row, minlength=logical).astype(np.int32)
        places = np.full((logical, counts.max()), -1, np.int32)
        for expert in range(logical):
            found = np.flatnonzero(row == expert)
            places[expert, : len(found)] = found
        return cls(places, counts)

    def choose(self, ids: Int32s, turn: int) -> Int32s:
        """A place for each row and choice: ids [n, k] of experts, turn of the first row."""
        turns = np.arange(turn, turn + len(ids), dtype=np.int32)[:, None]
        found: Int32s = self.places[ids, turns % self.counts[ids]]
        return found


def by_layer(
    shape: ExpertShape, placed: ExpertMap, plan: ExpertMap, moves: Sequence[ExpertMove]
) -> Iterator[tuple[ExpertMap, tuple[ExpertMove, ...]]]:
    """A plan in parts: after each the experts of one more layer are where the plan has them.

    The last part has the plan's number.
    """
    now = list(placed.physical_to_logical)
    layers = sorted({move.layer for move in moves})
    for layer in layers[:-1]:
        row = slice(layer * shape.physical, (layer + 1) * shape.physical)
        now[row] = plan.physical_to_logical[row]
        yield ExpertMap(tuple(now), placed.plan), tuple(m for m in moves if m.layer == layer)
    yield plan, tuple(m for m in moves if layers and m.layer == layers[-1])
