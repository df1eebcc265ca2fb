"""A model without weights: its KV is the tokens themselves, its logits a hash of what it reads.

What it computes for a token depends on every token before it *as read back from the KV pool*, so
a block table that is wrong by one, a block that was reused too early or bytes that arrived
damaged change its answer or stop it, as they would a real model.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kvtransfer.layout import KvLayout, gqa_layout
from services.engine.scripted.adapters import ScriptedAdapters
from services.engine.scripted.experts import ScriptedExperts
from services.engine.stepped.batch import AfterLayers, DraftBatch, StepBatch

LAYERS = 4
WIDTH = 16
"""Numbers a token has in K and in V, all equal."""
VOCABULARY = 2**16
"""Token ids taken in a prompt: any tokenizer's."""
GENERATED = 512
"""Generated token ids are below this, and not one of the first three."""
EOS = 2
"""Generated only where a guide leaves nothing else."""
CONTEXT_TOKENS = 8192

_SPREAD = 8.0
"""Logits are in [0, this)."""
_NEVER = -1e30
"""A logit that has no chance beside any other, whatever the temperature and penalties."""


class ScriptedModel:
    """See stepped.batch.Model."""

    def __init__(
        self,
        name: str,
        *,
        block_tokens: int,
        step_seconds: float = 0.0,
        experts: ScriptedExperts | None = None,
        adapters: ScriptedAdapters | None = None,
        draft_layers: int = 0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`draft_layers`: of the layout, beside those that this writes."""
        self.layout: KvLayout = gqa_layout(
            name,
            layers=LAYERS + draft_layers,
            kv_heads=1,
            head_dim=WIDTH,
            dtype="float32",
            block_tokens=block_tokens,
        )
        self.numerics = f"scripted-1-{name}"
        self._step_seconds = step_seconds
        self._experts = experts
        self._adapters = adapters or ScriptedAdapters()
        self._sleep = sleep
        self.hidden: NDArray[np.uint32] = np.zeros(0, np.uint32)
        """Of the rows of the last step that asked for them: digests of the tokens up to each."""

    def bind(self, memory: NDArray[np.uint8]) -> None:
        """The pool: [blocks, layout.block_bytes]."""
        layout = self.layout
        words = memory.reshape(len(memory), layout.layers, layout.layer_bytes).view(np.uint32)
        shape = (layout.block_tokens, WIDTH)
        size = layout.block_tokens * WIDTH
        self._k, self._v = (
            words[:, :, at : at + size].reshape(len(memory), layout.layers, *shape)
            for at in (layout.component_offset(n) // 4 for n in ("k", "v"))
        )
        if not np.shares_memory(self._k, memory) or not np.shares_memory(self._v, memory):
            raise ValueError("the pool's memory can't be viewed as tokens")

    def warm_up(self) -> None:
        """Nothing is cold."""

    def forward(
        self, batch: StepBatch, after_layers: AfterLayers | None, layers_per_piece: int
    ) -> NDArray[np.float32]:
        """Writes K = token and layer, V = position; logits [R, GENERATED] of all tokens read."""
        if self._step_seconds:
            self._sleep(self._step_seconds)
        if self._experts is not None:
            self._experts.route(batch.token_ids)
        for first in range(0, LAYERS, layers_per_piece):
            layers = min(layers_per_piece, LAYERS - first)
            positions = batch.positions.astype(np.uint32)
            self.write(batch, range(first, first + layers), positions, batch.fresh)
            if after_layers is not None:
                after_layers(first, layers)
        logits = np.empty((len(batch.logit_rows), GENERATED), dtype=np.float32)
        for i, row in enumerate(batch.logit_rows):
            sequence = int(np.searchsorted(batch.query_starts, row, side="right")) - 1
            read = self._read(batch, sequence, int(batch.positions[row]) + 1)
            logits[i] = logits_of(read.astype("<u4").tobytes(), self.mask(batch, sequence))
        if batch.hidden:
            self.hidden = self._hidden(batch)
        return logits

    def write(
        self,
        batch: StepBatch | DraftBatch,
        layers: range,
        values: NDArray[np.uint32],
        fresh: NDArray[np.int32] | None = None,
    ) -> None:
        """Writes the rows' tokens and `values` as K and V, but for rows before `fresh`.

        Raises RuntimeError if what is there of those is not theirs.
        """
        blocks, offsets = self._places(batch)
        counts = np.diff(batch.query_starts)
        adapters = self._adapters.masks(batch.adapters, len(counts))
        tokens = batch.token_ids.astype(np.uint32) ^ np.repeat(adapters, counts)
        if fresh is not None:
            new = batch.positions >= np.repeat(fresh, counts)
            again = blocks[~new], layers[0], offsets[~new], 0
            if ((self._k[again] ^ _mask(layers[0])) != tokens[~new]).any() or (
                self._v[again] != values[~new]
            ).any():
                raise RuntimeError("a row that is computed again differs from what is there")
            blocks, offsets, tokens, values = blocks[new], offsets[new], tokens[new], values[new]
        for layer in layers:
            self._k[blocks, layer, offsets] = (tokens ^ _mask(layer))[:, None]
            self._v[blocks, layer, offsets] = values[:, None]

    def mask(self, batch: StepBatch | DraftBatch, sequence: int) -> int:
        """Of its LoRA adapter; 0 for none."""
        return int(self._adapters.masks(batch.adapters, len(batch.block_tables))[sequence])

    def read(
        self, batch: StepBatch | DraftBatch, sequence: int, layers: range, length: int
    ) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """The first tokens of a sequence, and the values beside them, as layers have them.

        Each [layers, length].
        """
        blocks = batch.block_tables[sequence, : -(-length // self.layout.block_tokens)]
        some = slice(layers.start, layers.stop)
        k, v = (
            x[blocks, some, :, 0].transpose(1, 0, 2).reshape(len(layers), -1)[:, :length]
            for x in (self._k, self._v)
        )
        masks = np.array([_mask(layer) for layer in layers])
        return k ^ masks[:, None] ^ np.uint32(self.mask(batch, sequence)), v

    def _places(self, batch: StepBatch | DraftBatch) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Block and offset of each of the batch's tokens."""
        counts = np.diff(batch.query_starts)
        sequences = np.repeat(np.arange(len(counts)), counts)
        index, offsets = np.divmod(batch.positions, self.layout.block_tokens)
        blocks = batch.block_tables[sequences, index]
        if (blocks < 0).any():
            raise IndexError("a token has no block")
        return blocks.astype(np.intp), offsets.astype(np.intp)

    def _read(
        self, batch: StepBatch | DraftBatch, sequence: int, length: int
    ) -> NDArray[np.uint32]:
        """The tokens of a sequence by its KV. Raises RuntimeError if layers or places disagree."""
        tokens, values = self.read(batch, sequence, range(LAYERS), length)
        if (tokens != tokens[0]).any() or (values != np.arange(length)).any():
            raise RuntimeError("the KV pool does not hold what was computed")
        found: NDArray[np.uint32] = tokens[0]
        return found

    def _hidden(self, batch: StepBatch) -> NDArray[np.uint32]:
        hidden = np.empty(len(batch.token_ids), np.uint32)
        for sequence, end in enumerate(batch.query_starts[1:]):
            rows = slice(batch.query_starts[sequence], end)
            tokens = self._read(batch, sequence, int(batch.positions[end - 1]) + 1)
            hidden[rows] = prefix_digests(tokens)[batch.positions[rows]]
        return hidden


def prefix_digests(tokens: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A digest of tokens 0 to i, for each i. Stands for a hidden state."""
    weights = np.cumprod(np.full(len(tokens), 0x01000193, np.uint32), dtype=np.uint32)
    digests: NDArray[np.uint32] = np.cumsum((tokens + np.uint32(1)) * weights, dtype=np.uint32)
    return digests


def _mask(layer: int) -> np.uint32:
    return np.uint32((layer + 1) * 0x9E3779B1 & 0xFFFFFFFF)


def logits_of(tokens: bytes, adapter: int = 0) -> NDArray[np.float32]:
    """What the model says after these tokens, each a little-endian uint32: [GENERATED].

    `adapter` is the mask of the LoRA adapter, 0 for none.
    """
    said = tokens + adapter.to_bytes(4, "little") if adapter else tokens
    bits = np.frombuffer(hashlib.shake_128(said).digest(2 * GENERATED), dtype="<u2")
    logits = bits.astype(np.float32) * np.float32(_SPREAD / 2**16)
    logits[:EOS] = -np.inf
    logits[EOS] = _NEVER
    return logits
