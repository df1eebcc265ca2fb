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
from services.engine.stepped.batch import AfterLayers, StepBatch

LAYERS = 4
WIDTH = 16
"""Numbers a token has in K and in V, all equal."""
VOCABULARY = 2**16
"""Token ids taken in a prompt: any tokenizer's."""
GENERATED = 512
"""Generated token ids are below this, and not one of the first three."""
EOS = 2
"""Never generated."""
CONTEXT_TOKENS = 8192

_SPREAD = 8.0
"""Logits are in [0, this)."""


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
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.layout: KvLayout = gqa_layout(
            name,
            layers=LAYERS,
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
        blocks, offsets = self._places(batch)
        counts = np.diff(batch.query_starts)
        adapters = self._adapters.masks(batch.adapters, len(counts))
        marked = batch.token_ids.astype(np.uint32) ^ np.repeat(adapters, counts)
        for first in range(0, LAYERS, layers_per_piece):
            layers = min(layers_per_piece, LAYERS - first)
            for layer in range(first, first + layers):
                tokens = marked ^ _mask(layer)
                self._k[blocks, layer, offsets] = tokens[:, None]
                self._v[blocks, layer, offsets] = batch.positions[:, None]
            if after_layers is not None:
                after_layers(first, layers)
        logits = np.empty((len(batch.logit_rows), GENERATED), dtype=np.float32)
        for i, row in enumerate(batch.logit_rows):
            sequence = int(np.searchsorted(batch.query_starts, row, side="right")) - 1
            length = int(batch.positions[row]) + 1
            adapter = adapters[sequence]
            read = self._read(batch.block_tables[sequence], length, adapter)
            logits[i] = logits_of(read, int(adapter))
        return logits

    def _places(self, batch: StepBatch) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Block and offset of each of the batch's tokens."""
        counts = np.diff(batch.query_starts)
        sequences = np.repeat(np.arange(len(counts)), counts)
        index, offsets = np.divmod(batch.positions, self.layout.block_tokens)
        blocks = batch.block_tables[sequences, index]
        if (blocks < 0).any():
            raise IndexError("a token has no block")
        return blocks.astype(np.intp), offsets.astype(np.intp)

    def _read(self, table: NDArray[np.int32], length: int, adapter: np.uint32) -> bytes:
        """The tokens of a sequence by its KV. Raises RuntimeError if layers or places disagree."""
        blocks = table[: -(-length // self.layout.block_tokens)]
        masks = np.array([_mask(layer) for layer in range(LAYERS)])
        k = self._k[blocks, :, :, 0].transpose(1, 0, 2).reshape(LAYERS, -1)[:, :length]
        v = self._v[blocks, :, :, 0].transpose(1, 0, 2).reshape(LAYERS, -1)[:, :length]
        tokens = k ^ masks[:, None] ^ adapter
        if (tokens != tokens[0]).any() or (v != np.arange(length)).any():
            raise RuntimeError("the KV pool does not hold what was computed")
        return bytes(tokens[0].astype("<u4"))


def _mask(layer: int) -> np.uint32:
    return np.uint32((layer + 1) * 0x9E3779B1 & 0xFFFFFFFF)


def logits_of(tokens: bytes, adapter: int = 0) -> NDArray[np.float32]:
    """What the model says after these tokens, each a little-endian uint32: [GENERATED].

    `adapter` is the mask of the LoRA adapter, 0 for none.
    """
    said = tokens + adapter.to_bytes(4, "little") if adapter else tokens
    bits = np.frombuffer(hashlib.shake_128(said).digest(2 * GENERATED), dtype="<u2")
    logits = bits.astype(np.float32) * np.float32(_SPREAD / 2**16)
    logits[: EOS + 1] = -np.inf
    return logits
