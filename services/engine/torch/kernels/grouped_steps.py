"""Grouped-query attention of one step: its buffers, and the kernels called on them."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from kvtransfer.layout import KvLayout
from services.engine.torch.kernels import attention, formats, rows
from services.engine.torch.kernels.batch import Plan
from services.engine.torch.kernels.steps import kind_of
from services.engine.torch.kernels.team import Call, float_argument
from services.engine.torch.shapes import GroupedHeads, GroupedShape

LOG2_E = 1.4426950408889634
Floats = npt.NDArray[np.float32]


class GroupedSteps:
    """Buffers and kernel calls of a model's attention: begin a step, then layers in their order."""

    def __init__(
        self,
        shape: GroupedShape,
        layout: KvLayout,
        dtype: torch.dtype,
        threads: int,
        cosines: Floats,
        sines: Floats,
        epsilon: float,
        here: GroupedHeads | None = None,
    ) -> None:
        """cosines, sines: float32 [positions, head_dim / 2]; epsilon: of the norms of heads.

        here: the heads to attend with, all of them if that is None. KV is written of all.
        """
        self._shape = shape
        self._here = here = here or shape.all_heads
        self._layer_bytes = layout.layer_bytes
        self._dtype = dtype
        self._threads = threads
        self._capacity = 0
        self._cosines, self._sines = cosines, sines
        self._scratch = np.zeros((threads, attention.scratch_bytes(shape.head_dim)), np.uint8)
        self._ticket = np.zeros(1, np.int64)
        head = {
            "head_dim": shape.head_dim,
            "kind": kind_of(dtype),
            "kv_kind": formats.KINDS[layout.components[0].dtype],
        }
        pool = {c.name: layout.component_offset(c.name) for c in layout.components}
        self._rotate = Call(
            rows.rotate,
            rows.ROTATE,
            q_heads=here.heads,
            kv_heads=shape.kv_heads,
            cosines=cosines.ctypes.data,
            sines=sines.ctypes.data,
            q_scale=float_argument(LOG2_E / math.sqrt(shape.head_dim)),
            epsilon=float_argument(epsilon),
            **head,
            **pool,
        )
        self._attend = Call(
            attention.attend,
            attention.ATTEND,
            kv_heads=here.kv_heads,
            first_kv=here.first_kv,
            pool_heads=shape.kv_heads,
            group=here.group,
            block_tokens=layout.block_tokens,
            scratch=self._scratch.ctypes.data,
            scratch_bytes=self._scratch.shape[1],
            ticket=self._ticket.ctypes.data,
            **head,
            **pool,
        )
        self._grow(64)

    def _grow(self, count: int) -> None:
        """Makes room for steps of `count` rows."""
        shape = self._shape
        width = self._here.heads * shape.head_dim
        self._capacity = count
        self._q = torch.zeros((count, width), dtype=torch.float32)
        self._turned_k = torch.zeros((count, shape.kv_heads * shape.head_dim), dtype=torch.float32)
        self._attended = torch.zeros((count, width), dtype=self._dtype)
        self._rotate.set(q=self._q.data_ptr(), turned_k=self._turned_k.data_ptr())
        self._attend.set(q=self._q.data_ptr(), out=self._attended.data_ptr())

    def begin(self, step: Plan, pool: npt.NDArray[np.uint8], room: int) -> None:
        """A step over `pool`; linear layers may read up to `room` rows of what is returned.

        Rows whose `step.blocks` is negative are not written.
        """
        if room > self._capacity:
            self._grow(max(room, 2 * self._capacity))
        self._step = step
        self._pool = pool.ctypes.data
        self._row_bytes = step.blocks * pool.strides[0]
        self._rotate.set(
            rows=len(step.positions),
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

    def attend(
        self,
        layer: int,
        qkv: torch.Tensor,
        norms: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Writes the rows' KV of a layer, then attention [room, heads * head_dim], of heads here.

        qkv [rows or more, (heads here + 2 * KV heads) * head_dim], contiguous; norms: of queries
        and keys, float32 [head_dim] each.
        """
        pool = self._pool + layer * self._layer_bytes
        q_norm, k_norm = (0, 0) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr())
        self._rotate.set(qkv=qkv.data_ptr(), pool=pool, q_norm=q_norm, k_norm=k_norm)
        self._rotate.run(min(self._threads, -(-len(self._step.positions) // rows.TAKE)))
        self._ticket[0] = 0
        self._attend.set(pool=pool)
        self._attend.run(min(self._threads, len(self._step.tasks) * self._here.kv_heads))
        return self._attended
