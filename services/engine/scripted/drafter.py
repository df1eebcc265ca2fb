"""A draft layer without weights, for the scripted model: right as often as it is told to be.

It holds its callers to what a real one needs. Into slot j it writes the token there and the hidden
state that it was given, which stands for all tokens before j; and whenever it reads slots it checks
that each has its own. So a slot that was left out, one that still has what a draft wrote there, and
a hidden state of another row stop it.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from services.engine.scripted.model import (
    GENERATED,
    LAYERS,
    ScriptedModel,
    logits_of,
    prefix_digests,
)
from services.engine.stepped.batch import DraftBatch

Words = NDArray[np.uint32]

_LAYER = range(LAYERS, LAYERS + 1)
_OF_DRAFT = np.uint32(0x5BD1E995)
"""Marks hidden states that this layer made, and so what is written with them."""


class ScriptedDrafter:
    """See stepped.batch.Drafter. What it drafts depends on the tokens alone."""

    layers = 1

    def __init__(self, model: ScriptedModel, chance: float) -> None:
        """`model` has a layer more than it computes; drafts are right with probability `chance`."""
        self._model = model
        self._chance = chance
        self._hidden: Words = np.zeros(0, np.uint32)
        self._depth = 0

    def draft(self, batch: DraftBatch) -> NDArray[np.float32]:
        """Writes K = token, V = hidden state; logits [R, GENERATED]. Raises RuntimeError."""
        model = self._model
        self._depth = self._depth + 1 if batch.deeper else 0
        known = self._hidden if batch.deeper else model.hidden
        rows = batch.hidden_rows
        given = np.where(rows < 0, np.uint32(0), known[rows] if len(known) else np.uint32(0))
        model.write(batch, _LAYER, given)
        self._hidden = np.zeros(len(batch.token_ids), np.uint32)
        tokens: list[Words] = []
        for s, end in enumerate(batch.query_starts[1:]):
            length = int(batch.positions[end - 1]) + 1
            tokens.append(self._read(batch, s, length))
            own = slice(batch.query_starts[s], end)
            self._hidden[own] = prefix_digests(tokens[s])[batch.positions[own]] ^ _OF_DRAFT
        logits = np.empty((len(batch.logit_rows), GENERATED), dtype=np.float32)
        for i, row in enumerate(batch.logit_rows):
            s = int(np.searchsorted(batch.query_starts, row, side="right")) - 1
            logits[i] = self._logits(tokens[s][: batch.positions[row] + 1], model.mask(batch, s))
        return logits

    def _read(self, batch: DraftBatch, sequence: int, length: int) -> Words:
        read, given = self._model.read(batch, sequence, _LAYER, length)
        tokens: Words = read[0]
        hidden: Words = given[0]
        expected = np.concatenate([np.zeros(1, np.uint32), prefix_digests(tokens)[:-1]])
        if self._depth:
            expected[-self._depth :] ^= _OF_DRAFT
        if (hidden != expected).any():
            at = int(np.flatnonzero(hidden != expected)[0])
            raise RuntimeError(f"slot {at} of the draft layer does not hold what belongs there")
        return tokens

    def _logits(self, tokens: Words, adapter: int) -> NDArray[np.float32]:
        said = tokens.astype("<u4").tobytes()
        point = int.from_bytes(hashlib.blake2b(said, digest_size=4).digest(), "little") / 2**32
        return logits_of(said if point < self._chance else said + b"wrong", adapter)
