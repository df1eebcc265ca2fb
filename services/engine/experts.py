"""What engines with experts owe: they take only plans that lead somewhere, and report their loads.

Where experts go is the coordinator's to decide. A plan was made for a map that may be another one
by now, so it is checked as a whole before the first byte moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from services.engine.api import EngineStats, ExpertMap, ExpertMove, ExpertShape
from services.runtime.errors import InvalidRequestError

BEATS = 10
"""Of so many reports one says how tokens were routed: 58 layers of 256 experts are 30 kB."""


def check_plan(
    shape: ExpertShape, now: ExpertMap, plan: ExpertMap, moves: Sequence[ExpertMove]
) -> None:
    """Raises InvalidRequestError unless the plan is newer than `now` and the moves lead to it."""
    if plan.plan <= now.plan:
        raise InvalidRequestError("expert_plan.plan", plan.plan, f"newer than {now.plan}")
    size = shape.layers * shape.physical
    if len(plan.physical_to_logical) != size:
        allowed = f"{size}: {shape.layers} layers x {shape.physical} places"
        raise InvalidRequestError("expert_plan.map", len(plan.physical_to_logical), allowed)
    before = np.array(now.physical_to_logical).reshape(shape.layers, shape.physical)
    after = before.copy()
    written: set[tuple[int, int]] = set()
    for number, move in enumerate(moves):
        field, to = f"expert_plan.moves[{number}]", (move.layer, move.to_place)
        if not (
            0 <= move.layer < shape.layers
            and 0 <= move.from_place < shape.physical
            and 0 <= move.to_place < shape.physical
        ):
            raise InvalidRequestError(field, move, "a layer and places that there are")
        if before[move.layer, move.from_place] != move.expert:
            raise InvalidRequestError(field, move, "a source that has the expert")
        if to in written:
            raise InvalidRequestError(field, move, "a place that no other move fills")
        written.add(to)
        after[to] = move.expert
    if (after.ravel() != np.array(plan.physical_to_logical)).any():
        raise InvalidRequestError("expert_plan.moves", len(moves), "moves that lead to its map")


class ExpertReports:
    """What one stream to a coordinator has been told, so that each hears of every token once."""

    def __init__(self) -> None:
        self._beat = 0
        self._map: ExpertMap | None = None
        self._tokens: tuple[int, ...] = ()

    def of(self, stats: EngineStats) -> EngineStats:
        """The report to send: tokens since the last report with any, and the map if it is news."""
        beat, self._beat = self._beat, self._beat + 1
        fresh = stats.expert_map if stats.expert_map != self._map else None
        self._map = stats.expert_map
        tokens: tuple[int, ...] = ()
        if beat % BEATS == 0:
            if beat and stats.expert_tokens != self._tokens:
                pairs = zip(stats.expert_tokens, self._tokens, strict=True)
                tokens = tuple(total - told for total, told in pairs)
            self._tokens = stats.expert_tokens
        return replace(stats, expert_map=fresh, expert_tokens=tokens)
