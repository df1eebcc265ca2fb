"""One step's buffers, and the kernels called on them.

All arrays a step needs live here and are used again; they grow to the largest step seen. Rows
beyond the batch's, which linear layers may be filled up with, hold what was there before: no row's
result depends on another row.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from kvtransfer.layout import KvLayout
from services.engine.torch.config import ModelConfig, scaled_frequencies
from services.engine.torch.kernels import attention, formats, rows
from services.engine.torch.kernels.batch import Plan
from services.engine.torch.kernels.team import Call, float_argument

LOG2_E = 1.4426950408889634
Floats = npt.NDArray[np.float32]


def rotary_tables(config: ModelConfig) -> tuple[Floats, Floats]:
    """Cosines and sines float32 [positions, head_dim / 2].

    Frequencies and angles are rounded to float32 as Hugging Face does, since that is what models
    were trained with; the functions themselves are taken in float64, where libraries agree.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    plain = (1.0 / config.rope.theta**exponents).tolist()
    frequencies = np.array(scaled_frequencies(plain, config.rope), np.float32)
    angles = np.arange(config.positions, dtype=np.float32)[:, None] * frequencies
    exact = angles.astype(np.float64)
    return np.cos(exact).astype(np.float32), np.sin(exact).astype(np.float32)


class Steps:
    """Buffers and kernel calls of a model. Begin a step, then call the rest in layers' order."""

    def __init__(
        self, config: ModelConfig, layout: KvLayout, dtype: torch.dtype, threads: int
    ) -> None:
        self._config = config
        self._layout = layout
        self._dtype = dtype
        self._threads = threads
        self._capacity = 0
        self._cosines, self._sines = rotary_tables(config)
        self._scratch = np.zeros((threads, attention.scratch_bytes(config.head_dim)), np.uint8)
        self._ticket = np.zeros(1, np.int64)
        kind = formats.BFLOAT16 if dtype == torch.bfloat16 else formats.FLOAT32
        self._normalize, self._gate, self._rotate, self._attend = self._calls(kind)
        self._grow(64)

    def _calls(self, kind: int) -> tuple[Call, Call, Call, Call]:
        config, layout = self._config, self._layout
        head = {"kv_heads": config.kv_heads, "head_dim": config.head_dim, "kind": kind}
        kv_kind = formats.KINDS[layout.components[0].dtype]
        pool = {c.name: layout.component_offset(c.name) for c in layout.components}
        normalize = Call(
            rows.normalize,
            rows.NORMALIZE,
            width=config.hidden,
            kind=kind,
            epsilon=float_argument(config.norm_epsilon),
        )
        gate = Call(rows.gate, rows.GATE, width=config.intermediate, kind=kind)
        rotate = Call(
            rows.rotate,
            rows.ROTATE,
            q_heads=config.heads,
            cosines=self._cosines.ctypes.data,
            sines=self._sines.ctypes.data,
            q_scale=float_argument(LOG2_E / math.sqrt(config.head_dim)),
            kv_kind=kv_kind,
            **head,
            **pool,
        )
        attend = Call(
            attention.attend,
            attention.ATTEND,
            group=config.group,
            kv_kind=kv_kind,
            block_tokens=layout.block_tokens,
            scratch=self._scratch.ctypes.data,
            scratch_bytes=self._scratch.shape[1],
            ticket=self._ticket.ctypes.data,
            **head,
            **pool,
        )
        return normalize, gate, rotate, attend

    def _grow(self, count: int) -> None:
        """Makes room for steps of `count` rows."""
        config = self._config
        width = config.heads * config.head_dim
        self._capacity = count

        def floats(columns: int) -> torch.Tensor:
            return torch.zeros((count, columns), dtype=torch.float32)

        def values(columns: int) -> torch.Tensor:
            return torch.zeros((count, columns), dtype=self._dtype)

        self._state, self._normed = floats(config.hidden), values(config.hidden)
        self._q, self._turned_k = floats(width), floats(config.kv_heads * config.head_dim)
        self._attended, self._gated = values(width), values(config.intermediate)
        self._gate.set(out=self._gated.data_ptr())
        self._normalize.set(state=self._state.data_ptr(), out=self._normed.data_ptr())
        self._rotate.set(q=self._q.data_ptr(), turned_k=self._turned_k.data_ptr())
        self._attend.set(q=self._q.data_ptr(), out=self._attended.data_ptr())

    def begin(self, step: Plan, pool: npt.NDArray[np.uint8], room: int) -> None:
        """A step over `pool`; linear layers may read up to `room` rows of what is returned."""
        if room > self._capacity:
            self._grow(max(room, 2 * self._capacity))
        self._step = step
        self._pool = pool.ctypes.data
        self._row_bytes = step.blocks * pool.strides[0]
        self._set_rows(len(step.positions))
        self._rotate.set(
            rows=self._rows,
            positions=step.positions.ctypes.data,
            row_bytes=self._row_bytes.ctypes.data,
            row_tokens=step.tokens.ctypes.data,
        )
        self._attend.set(
            tasks=len(step.tasks),
            block_bytes=pool.strides[0],
            tables=step.tables.ctypes.data,
            table_width=step.tables.shape[1],
            positions=step.positions.ctypes.data,
            task=step.tasks.ctypes.data,
        )

    def _set_rows(self, count: int) -> None:
        """Normalizing and gating go on with the first `count` rows."""
        self._rows = count
        self._normalize.set(rows=count)
        self._gate.set(rows=count)

    def _team(self, items: int) -> int:
        """Threads for so many rows."""
        return min(self._threads, -(-items // rows.TAKE))

    def embed(self, embedding: torch.Tensor) -> None:
        """The residual state becomes the tokens' embeddings."""
        found = torch.index_select(embedding, 0, torch.from_numpy(self._step.token_ids))
        self._state[: self._rows].copy_(found)

    def normalize(self, delta: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
        """State += delta; its RMSNorm [room, hidden]."""
        self._normalize.set(
            delta=0 if delta is None else delta.data_ptr(), weight=weight.data_ptr()
        )
        self._normalize.run(self._team(self._rows))
        return self._normed

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """Writes the rows' KV of a layer, then attention [room, heads * head_dim]."""
        pool = self._pool + layer * self._layout.layer_bytes
        self._rotate.set(qkv=qkv.data_ptr(), pool=pool)
        self._rotate.run(self._team(self._rows))
        self._ticket[0] = 0
        self._attend.set(pool=pool)
        items = len(self._step.tasks) * self._config.kv_heads
        self._attend.run(min(self._threads, items))
        return self._attended

    def keep_picked(self) -> None:
        """After the last attention: only rows whose logits are wanted go on, in that order."""
        picked = torch.from_numpy(self._step.logit_rows)
        count = len(picked)
        for buffer in (self._state, self._attended):
            buffer[:count] = torch.index_select(buffer, 0, picked)
        self._set_rows(count)

    def gate(self, both: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up [room, intermediate]."""
        self._gate.set(both=both.data_ptr())
        self._gate.run(self._team(self._rows))
        return self._gated
