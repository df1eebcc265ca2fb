"""Experts without weights worth the name: a place holds the number of its expert, nothing else.

Tokens are routed to them, through the places they are in, in the layers of a model; what they add
to it is nothing, so where they are changes no token. But a place that does not hold the expert that
the map says stops the model, as wrong weights should stop a real one.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from services.engine.api import ExpertMap, ExpertMove, ExpertShape
from services.runtime.load import SettingsError


def shape_of(counts: str) -> ExpertShape | None:
    """The setting engine.scripted_experts. Raises SettingsError if the counts don't fit."""
    if not counts:
        return None
    layers, logical, physical, groups, hosts, gpus = map(int, counts.split("/"))
    for name, whole, part in (
        ("logical", logical, groups),
        ("physical", physical, gpus),
        ("gpus", gpus, hosts),
    ):
        if whole % part:
            raise SettingsError(
                f"engine.scripted_experts: {name}: {whole} is no multiple of {part}"
            )
    if physical < logical:
        raise SettingsError(
            f"engine.scripted_experts: {logical} experts don't fit {physical} places"
        )
    weight = np.dtype(np.int64).itemsize
    return ExpertShape(layers, logical, physical, groups, hosts, gpus, expert_bytes=weight)


class ScriptedExperts:
    """See stepped.batch.Experts. A layer's experts get tokens by Zipf's law."""

    def __init__(self, shape: ExpertShape) -> None:
        self.shape = shape
        share = 1.0 / np.arange(1, shape.logical + 1)
        self._until = np.cumsum(share) / share.sum()
        self._tokens = np.zeros((shape.layers, shape.logical), np.int64)
        self._weights = np.tile(
            np.arange(shape.physical, dtype=np.int64) % shape.logical, (shape.layers, 1)
        )
        self._map = ExpertMap(tuple(self._weights.ravel().tolist()))
        self._find()
        self._lock = threading.Lock()

    @property
    def map(self) -> ExpertMap:
        """Where experts are."""
        return self._map

    def tokens(self) -> tuple[int, ...]:
        """Routed to each since start, layers x logical."""
        return tuple(self._tokens.ravel().tolist())

    def move(self, plan: ExpertMap, moves: Sequence[ExpertMove]) -> None:
        """Copies, for a plan that was checked. Any thread; a step is either before or after it."""
        with self._lock:
            before = self._weights.copy()
            for move in moves:
                source = before[move.layer, move.from_place]
                self._weights[move.layer, move.to_place] = source
            self._map = plan
            self._find()

    def route(self, token_ids: NDArray[np.int32]) -> None:
        """Sends the tokens of a step to a replica of one expert in each layer.

        Raises RuntimeError if it is not there.
        """
        spread = token_ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        chance = (spread >> np.uint64(40)).astype(np.float64) / 2**24
        heat = np.searchsorted(self._until, chance, side="right")
        turns = np.arange(len(token_ids))
        with self._lock:
            for layer in range(self.shape.layers):
                experts = (heat + layer) % self.shape.logical
                replica = turns % self._count[layer, experts]
                places = self._places[layer, self._first[layer, experts] + replica]
                if (self._weights[layer, places] != experts).any():
                    raise RuntimeError("an expert is not where the map says")
                self._tokens[layer] += np.bincount(experts, minlength=self.shape.logical)

    def _find(self) -> None:
        """Places by expert, from the map alone: [layers, physical], and where each one's begin."""
        shape = self.shape
        placed = np.array(self._map.physical_to_logical).reshape(shape.layers, shape.physical)
        self._places = np.argsort(placed, axis=1, kind="stable")
        self._count = np.stack([np.bincount(row, minlength=shape.logical) for row in placed])
        self._first = np.cumsum(self._count, axis=1) - self._count
