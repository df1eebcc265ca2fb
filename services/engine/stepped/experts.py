"""Experts that are all in one process, each once: how they are used is told, and nothing moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from services.engine.api import ExpertMap, ExpertMove, ExpertShape
from services.runtime.errors import InvalidRequestError


class ExpertsHere:
    """See batch.Experts."""

    def __init__(
        self, groups: int, expert_bytes: int, counts: Callable[[], NDArray[np.int64]]
    ) -> None:
        """`groups`: that rows choose among. `counts`: rows that chose each, [layers, experts]."""
        layers, experts = counts().shape
        self.shape = ExpertShape(
            layers=layers,
            logical=experts,
            physical=experts,
            groups=groups,
            hosts=1,
            gpus=1,
            expert_bytes=expert_bytes,
        )
        self.map = ExpertMap(tuple(range(experts)) * layers)
        self._counts = counts

    def tokens(self) -> tuple[int, ...]:
        """See EngineStats.expert_tokens."""
        return tuple(self._counts().ravel().tolist())

    def move(self, plan: ExpertMap, moves: Sequence[ExpertMove]) -> NoReturn:
        """Raises InvalidRequestError: there is no other place."""
        allowed = "none: this worker has each expert once, in one process"
        raise InvalidRequestError("expert_plan", plan.plan, allowed)
