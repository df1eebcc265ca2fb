"""Who computes in `tandem bench engine`: the embedded engine's model, and its peers.

All do the same: compute a prompt, copy what is kept of it for a batch of sequences (each with
memory of its own), and go on, one token a sequence and step, greedily.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from services.engine.stepped.batch import LoadedModel, StepBatch

# After the engine, which has a word to say before torch is loaded.
import torch  # isort: skip

Floats = NDArray[np.float32]
Tokens = NDArray[np.int32]


class Subject(Protocol):
    """One at a time is measured; each call ends when its work is done."""

    @property
    def precision(self) -> str:
        """Of weights, and of keys and values, in words."""

    @property
    def logits(self) -> Floats:
        """Of the last call's last position, float32 [sequences, vocabulary]."""

    def prefill(self, prompt: Tokens) -> None:
        """Forgets everything, then computes one prompt [tokens]."""

    def spread(self, batch: int, steps: int) -> None:
        """So many copies of the prompt's sequence, with room for `steps` more tokens each."""

    def decode(self) -> None:
        """One more token for every sequence."""


class Own:
    """A model of the embedded engine, called as its scheduler would."""

    def __init__(self, loaded: LoadedModel, chunk_tokens: int, precision: str) -> None:
        self._model = loaded.model
        self._chunk_tokens = chunk_tokens
        self.precision = precision
        self.logits: Floats = np.empty((0, 0), np.float32)

    def prefill(self, prompt: Tokens) -> None:
        """See Subject."""
        layout = self._model.layout
        blocks = layout.blocks_for(len(prompt))
        self._pool = np.zeros((blocks, layout.block_bytes), np.uint8)
        self._model.bind(self._pool)
        table = np.arange(blocks, dtype=np.int32)[None]
        for start in range(0, len(prompt), self._chunk_tokens):
            end = min(start + self._chunk_tokens, len(prompt))
            last = [end - start - 1] if end == len(prompt) else []
            self._step(prompt[start:end], np.arange(start, end), [0, end - start], table, last)
        self._position = len(prompt)

    def spread(self, batch: int, steps: int) -> None:
        """See Subject."""
        layout, kept = self._model.layout, self._pool
        width = layout.blocks_for(self._position + steps)
        pool = np.zeros((batch, width, layout.block_bytes), np.uint8)
        pool[:, : len(kept)] = kept
        self._pool = pool.reshape(-1, layout.block_bytes)
        self._model.bind(self._pool)
        self._tables = np.arange(batch * width, dtype=np.int32).reshape(batch, width)
        self.logits = np.repeat(self.logits, batch, axis=0)

    def decode(self) -> None:
        """See Subject."""
        batch = len(self._tables)
        tokens, positions = self.logits.argmax(-1), np.full(batch, self._position)
        self._step(tokens, positions, range(batch + 1), self._tables, range(batch))
        self._position += 1

    def _step(self, tokens: Any, positions: Any, starts: Any, tables: Tokens, last: Any) -> None:
        batch = StepBatch(
            token_ids=np.asarray(tokens, np.int32),
            positions=np.asarray(positions, np.int32),
            query_starts=np.asarray(starts, np.int32),
            block_tables=tables,
            logit_rows=np.asarray(last, np.int32),
        )
        self.logits = self._model.forward(batch, None, self._model.layout.layers)


class Transformers:
    """Hugging Face's model of the folder's architecture, with its own cache."""

    def __init__(self, folder: Path, dtype: str) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        # Loaded for inference: from_pretrained() calls eval().
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self._cache: Any = None
        self._logits = torch.empty((0, 0))
        self.precision = f"{dtype} weights and KV"

    @property
    def logits(self) -> Floats:
        """See Subject."""
        found: Floats = self._logits.float().numpy()
        return found

    def prefill(self, prompt: Tokens) -> None:
        """See Subject."""
        self._cache = None
        self._step(torch.from_numpy(prompt.astype(np.int64))[None])

    def spread(self, batch: int, steps: int) -> None:
        """See Subject."""
        self._cache.batch_repeat_interleave(batch)
        self._logits = self._logits.repeat(batch, 1)

    def decode(self) -> None:
        """See Subject."""
        self._step(self._logits.argmax(-1)[:, None])

    def _step(self, tokens: torch.Tensor) -> None:
        with torch.inference_mode():
            out = self._model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache, self._logits = out.past_key_values, out.logits[:, -1]
