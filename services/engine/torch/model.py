"""The model: Llama-family layers over a paged KV pool.

A step (`forward`) takes rows (tokens) of any number of sequences, prompts' chunks and single
decoded tokens alike. Every layer writes the rows' keys and values into the pool, rounded to the
pool's dtype, and only then attends, reading the pool: so a row sees the same numbers however its
context came to be there. Linear layers are torch's; everything else is kernels/.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from kvtransfer.layout import KvLayout, gqa_layout
from services.engine.torch import numerics
from services.engine.torch.config import ModelConfig
from services.engine.torch.kernels.batch import Batch, Limits, Plan, plan
from services.engine.torch.kernels.linear import can_pack
from services.engine.torch.kernels.steps import Steps
from services.engine.torch.numerics import Rules
from services.engine.torch.weights import ModelWeights, load_weights

__all__ = ["Batch", "LlamaModel"]

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Rows of the fixed prompt that the digest of numerics is taken of: more than a tile of keys.
DIGEST_ROWS = 80
# Steps that warm_up prepares for: decode batches, and chunks of prompts.
WARM_BATCH = 32
WARM_CHUNKS = (64, 128, 256)

AfterLayers = Callable[[int, int], None]
Pool = npt.NDArray[np.uint8]


class LlamaModel:
    """Weights, layout, and the pool that it is bound to. One thread at a time may call it."""

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        layout: KvLayout,
        *,
        dtype: torch.dtype,
        batch_invariant: bool,
        threads: int,
    ) -> None:
        self.config = config
        self.layout = layout
        self._weights = weights
        self._dtype = dtype
        self._pool: Pool | None = None
        self._threads = threads
        torch.set_num_threads(threads)
        self._rules = Rules({})
        self._steps = Steps(config, layout, dtype, threads)
        self.numerics = ""
        if batch_invariant:
            with torch.inference_mode():
                self._rules = numerics.choose_rules(weights.shapes, dtype)
            log.info("batch-invariant with %s", self._rules)
            self.numerics = numerics.digest([self._fixed_step()])

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        dtype: str = "bfloat16",
        kv_dtype: str = "fp8_e4m3",
        block_tokens: int = 32,
        batch_invariant: bool = True,
        threads: int = 0,
        device: str = "cpu",
        model_name: str = "",
    ) -> LlamaModel:
        """Reads a Hugging Face folder. threads 0: every core this process may use.

        Raises UnsupportedModelError, NotInvariantError; ValueError for another device than cpu.
        """
        if device != "cpu":
            raise ValueError(f"device {device!r} is not supported by this engine; expected 'cpu'")
        config = ModelConfig.from_folder(folder)
        layout = gqa_layout(
            model_name or folder.name,
            layers=config.layers,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            dtype=kv_dtype,
            block_tokens=block_tokens,
        )
        threads = threads or _cores()
        torch.set_num_threads(threads)
        with torch.inference_mode():
            weights = load_weights(folder, config, DTYPES[dtype], packed=can_pack())
        return cls(
            config,
            weights,
            layout,
            dtype=DTYPES[dtype],
            batch_invariant=batch_invariant,
            threads=threads,
        )

    def bind(self, memory: Pool) -> None:
        """Gives the model its pool, uint8 [blocks, layout.block_bytes], rows contiguous."""
        if memory.shape[1:] != (self.layout.block_bytes,) or memory.strides[1] != 1:
            raise ValueError(f"pool: expected [blocks, {self.layout.block_bytes}] contiguous bytes")
        self._pool = memory

    def forward(
        self,
        batch: Batch,
        after_layers: AfterLayers | None = None,
        layers_per_piece: int = 1,
    ) -> npt.NDArray[np.float32]:
        """Computes a step: writes the rows' KV, returns logits float32 [R, vocabulary].

        after_layers(first_layer, layers) is called on this thread as soon as the KV of those
        layers is final, for every layers_per_piece layers and the rest at the end. Raises
        ValueError for a batch that can't be computed; the pool is then untouched.
        """
        if self._pool is None:
            raise ValueError("no pool: call bind() first")
        limits = Limits(
            vocabulary=self.config.vocabulary,
            positions=self.config.positions,
            blocks=len(self._pool),
            block_tokens=self.layout.block_tokens,
        )
        checked = plan(batch, limits, self.config.group)
        with torch.inference_mode():
            return self._compute(checked, self._pool, after_layers, layers_per_piece)

    def _compute(
        self, step: Plan, pool: Pool, after_layers: AfterLayers | None, layers_per_piece: int
    ) -> npt.NDArray[np.float32]:
        steps, linear = self._steps, self._rules.apply
        count, picked = len(step.positions), len(step.logit_rows)
        # A row's logits may be wanted twice: so these may be more than the step's rows.
        steps.begin(step, pool, self._rules.room(max(count, picked)))
        steps.embed(self._weights.embedding)
        delta: torch.Tensor | None = None
        for index, layer in enumerate(self._weights.layers):
            x = steps.normalize(delta, layer.attention_norm)
            attended = steps.attend(index, linear(layer.qkv, x, count))
            self._tell(index, after_layers, layers_per_piece)
            if index == self.config.layers - 1:
                if not picked:
                    return np.empty((0, self.config.vocabulary), np.float32)
                steps.keep_picked()
                count = picked
            x = steps.normalize(linear(layer.output, attended, count), layer.mlp_norm)
            gated = steps.gate(linear(layer.gate_up, x, count))
            delta = linear(layer.down, gated, count)
        x = steps.normalize(delta, self._weights.norm)
        logits = linear(self._weights.head, x, count)[:count]
        found: npt.NDArray[np.float32] = logits.float().numpy()
        return found

    def _tell(self, index: int, after_layers: AfterLayers | None, piece: int) -> None:
        """Calls after_layers if a piece ends with this layer."""
        done = index + 1
        if after_layers is not None and (done % piece == 0 or done == self.config.layers):
            first = index // piece * piece
            after_layers(first, done - first)

    def warm_up(self) -> None:
        """Compiles what is not yet, and lets oneDNN prepare the row counts of usual steps.

        Others cost a few milliseconds when they come first.
        """
        for count in (*numerics.probe_counts(WARM_BATCH), *WARM_CHUNKS):
            self._fixed_step(count)

    def _fixed_step(self, rows: int = DIGEST_ROWS) -> npt.NDArray[np.float32]:
        """Logits of a prompt that is always the same, in a pool of its own."""
        rows = min(rows, self.config.positions)
        blocks = self.layout.blocks_for(rows)
        tokens = np.arange(1, rows + 1) * 7919 % self.config.vocabulary
        bound = self._pool
        self._pool = np.zeros((blocks, self.layout.block_bytes), np.uint8)
        try:
            return self.forward(
                Batch(
                    token_ids=tokens.astype(np.int32),
                    positions=np.arange(rows, dtype=np.int32),
                    query_starts=np.array([0, rows], np.int32),
                    block_tables=np.arange(blocks, dtype=np.int32)[None],
                    logit_rows=np.arange(min(rows, 32), dtype=np.int32),
                )
            )
        finally:
            self._pool = bound


def _cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
