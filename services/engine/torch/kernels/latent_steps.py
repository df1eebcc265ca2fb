"""Multi-head latent attention of one step: its buffers, and the kernels called on them.

The absorbed form (DeepSeek-V2, arXiv 2405.04434, section 2.1; FlashMLA): a head's no-position
query is carried into the space of latents by that head's key projection, so that all heads attend
over the latents themselves, as the pool stores them; what comes out is carried into the head's
values afterwards. Prefill and decode do the same, row by row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvtransfer.layout import KvLayout
from services.engine.models.errors import UnsupportedModelError
from services.engine.torch.kernels import formats, latent, latent_rows, rows
from services.engine.torch.kernels.batch import Plan
from services.engine.torch.kernels.latent_rows import HEAD_ROWS, WIDE
from services.engine.torch.kernels.latent_tasks import deal
from services.engine.torch.kernels.simd import LANES
from services.engine.torch.kernels.team import Call, float_argument

LOG2_E = 1.4426950408889634
# Codes are widened by 32 at a time.
LEAST_LATENT = 32
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LatentShape:
    """What latent attention is made of; `latent`, `rope`, `nope`, `value` in multiples of 16."""

    heads: int
    latent: int
    """kv_lora_rank"""
    rope: int
    """qk_rope_head_dim"""
    nope: int
    """qk_nope_head_dim"""
    value: int
    """v_head_dim"""
    softmax_scale: float
    """What scores are multiplied by, YaRN's factor included."""
    epsilon: float
    """Of the latent's RMSNorm."""
    interleaved: bool = True
    """Rotary pairs are neighbours (0, 1), (2, 3), as DeepSeek's; else (0, rope / 2), ..."""


@dataclass(frozen=True, slots=True)
class LatentWeights:
    """A layer's kv_b_proj by head, laid out for the kernels; `pack` makes it."""

    norm: torch.Tensor
    """Of the latent, float32 [latent]."""
    keys: torch.Tensor
    """nope to latent, as _tiled lays it out."""
    values: torch.Tensor
    """latent to value, as _tiled lays it out."""


def pack(shape: LatentShape, kv_b: torch.Tensor, norm: torch.Tensor) -> LatentWeights:
    """From the weight of kv_b_proj [heads * (nope + value), latent], of the engine's dtype."""
    by_head = kv_b.view(shape.heads, shape.nope + shape.value, shape.latent)
    keys, values = by_head[:, : shape.nope], by_head[:, shape.nope :]
    return LatentWeights(norm.float().contiguous(), _tiled(keys), _tiled(values.transpose(1, 2)))


def _tiled(weight: torch.Tensor) -> torch.Tensor:
    """[heads, inputs, outputs] in the order that latent_rows reads it.

    Columns in blocks of WIDE (or LANES) that lie one after another, and of bfloat16 two inputs side
    by side: [heads, blocks, inputs / 2, columns, 2].
    """
    heads, inputs, outputs = weight.shape
    columns = WIDE if outputs % WIDE == 0 else LANES
    pair = 2 if weight.dtype == torch.bfloat16 else 1
    blocks = weight.reshape(heads, inputs // pair, pair, outputs // columns, columns)
    return blocks.permute(0, 3, 1, 4, 2).contiguous()


def _check(shape: LatentShape, layout: KvLayout) -> None:
    """Raises UnsupportedModelError, which names the key of config.json."""
    sizes = {
        "kv_lora_rank": shape.latent,
        "qk_rope_head_dim": shape.rope,
        "qk_nope_head_dim": shape.nope,
        "v_head_dim": shape.value,
    }
    for key, value in sizes.items():
        least = LEAST_LATENT if key == "kv_lora_rank" else LANES
        if value % LANES or value < least:
            raise UnsupportedModelError(
                f"config.json: {key}={value} is not supported; expected a multiple of {LANES}, at "
                f"least {least}",
                key=key,
                value=value,
            )
    names = [component.name for component in layout.components if component.name != "latent_scale"]
    if names != ["latent", "rope"] or layout.interleaved:
        raise ValueError(f"layout: components {names}, expected mla_layout's, by component")
    widths = layout.component("latent").width, layout.component("rope").width
    if widths != (shape.latent, shape.rope):
        raise ValueError(f"layout: widths {widths}, expected {(shape.latent, shape.rope)}")


class LatentSteps:
    """Buffers and calls of a model's latent attention: begin a step, then layers in their order.

    Raises UnsupportedModelError, by name, for shapes that the kernels don't have.
    """

    def __init__(
        self,
        shape: LatentShape,
        layout: KvLayout,
        dtype: torch.dtype,
        threads: int,
        cosines: Floats,
        sines: Floats,
    ) -> None:
        """cosines, sines: float32 [positions, rope / 2], with YaRN's factor if the model has one.

        layout: kvtransfer.layout.mla_layout, by component.
        """
        _check(shape, layout)
        self._shape = shape
        self._layout = layout
        self._layer_bytes = layout.layer_bytes
        self._dtype = dtype
        self._threads = threads
        self._cosines, self._sines = cosines, sines
        stored = layout.component("latent").dtype
        # A pool of float32 is read as such, whatever the rest is computed in.
        pairs = dtype == torch.bfloat16 and stored != "float32"
        self._word_dtype = torch.bfloat16 if pairs else torch.float32
        self._groups = layout.component("latent_scale").width if stored == "fp8_e4m3" else 1
        room = max(
            latent.scratch_bytes(shape.latent, shape.rope, self._groups),
            latent_rows.scratch_bytes(shape.rope),
        )
        self._scratch = np.zeros((threads, room), np.uint8)
        self._ticket = np.zeros(1, np.int64)
        self._write, self._absorb, self._attend, self._merge, self._project = self._calls()
        self._set_aside(0)
        self._capacity = 0
        self._grow(64)

    def _calls(self) -> tuple[Call, Call, Call, Call, Call]:
        shape, layout = self._shape, self._layout
        kind = formats.BFLOAT16 if self._dtype == torch.bfloat16 else formats.FLOAT32
        word_kind = formats.BFLOAT16 if self._word_dtype == torch.bfloat16 else formats.FLOAT32
        scratch = {
            "scratch": self._scratch.ctypes.data,
            "scratch_bytes": self._scratch.shape[1],
            "ticket": self._ticket.ctypes.data,
        }
        pool = {f"to_{c.name.removeprefix('latent_')}": layout.component_offset(c.name)
                for c in layout.components}  # fmt: skip
        pool |= {
            "kv_kind": formats.KINDS[layout.component("latent").dtype],
            "rope_kind": formats.KINDS[layout.component("rope").dtype],
            "groups": self._groups,
        }
        sizes = {"latent": shape.latent, "rope": shape.rope, "kind": kind}
        turns = {"interleaved": int(shape.interleaved)}
        write = Call(
            latent_rows.write,
            latent_rows.WRITE,
            epsilon=float_argument(shape.epsilon),
            **sizes,
            **turns,
            **pool,
        )
        absorb = Call(
            latent_rows.absorb,
            latent_rows.ABSORB,
            heads=shape.heads,
            nope=shape.nope,
            out_kind=word_kind,
            scale=float_argument(LOG2_E * shape.softmax_scale),
            **sizes,
            **turns,
            **scratch,
        )
        attend = Call(
            latent.attend,
            latent.ATTEND,
            heads=shape.heads,
            word_kind=word_kind,
            block_tokens=layout.block_tokens,
            **sizes,
            **pool,
            **scratch,
        )
        merge = Call(latent.merge, latent.MERGE, latent=shape.latent, kind=kind, **scratch)
        project = Call(
            latent_rows.project,
            latent_rows.PROJECT,
            heads=shape.heads,
            latent=shape.latent,
            value=shape.value,
            kind=kind,
            **scratch,
        )
        return write, absorb, attend, merge, project

    def _grow(self, count: int) -> None:
        """Makes room for steps of `count` rows."""
        shape = self._shape
        self._capacity = count
        self._work = torch.zeros((count, shape.latent + 2 * shape.rope))
        width = shape.heads * (shape.latent + shape.rope)
        # Transposing reads up to a vector beyond the last row.
        self._queries = torch.zeros(count * width + 2 * LANES, dtype=self._word_dtype)
        self._attended = torch.zeros((count, shape.heads * shape.latent), dtype=self._dtype)
        self._out = torch.zeros((count, shape.heads * shape.value), dtype=self._dtype)
        self._write.set(work=self._work.data_ptr())
        self._absorb.set(out=self._queries.data_ptr())
        self._attend.set(q=self._queries.data_ptr(), out=self._attended.data_ptr())
        self._merge.set(out=self._attended.data_ptr())
        self._project.set(attended=self._attended.data_ptr(), out=self._out.data_ptr())

    def _set_aside(self, count: int) -> None:
        """Makes room for the states of `count` query rows of one segment."""
        self._partial_rows = count
        self._partial = np.empty(count * (self._shape.latent + 2), np.float32)
        for call in (self._attend, self._merge):
            call.set(partial=self._partial.ctypes.data, partial_rows=count)

    def begin(self, step: Plan, pool: npt.NDArray[np.uint8], room: int) -> None:
        """A step over `pool`; linear layers may read up to `room` rows of what is returned.

        Rows whose `step.blocks` is negative are not written.
        """
        if room > self._capacity:
            self._grow(max(room, 2 * self._capacity))
        # Kernels hold addresses of its arrays.
        self._step = step
        self._pool = pool.ctypes.data
        self._rows = len(step.positions)
        self._row_bytes = step.blocks * pool.strides[0]
        self._tasks = deal(step, self._shape.heads, self._threads)
        if self._tasks.partial_rows > self._partial_rows:
            self._set_aside(2 * self._tasks.partial_rows)
        self._turn(step.positions)
        self._write.set(
            rows=self._rows,
            row_bytes=self._row_bytes.ctypes.data,
            row_tokens=step.tokens.ctypes.data,
        )
        self._absorb.set(rows=self._rows)
        self._attend.set(
            tasks=len(self._tasks.attends),
            block_bytes=pool.strides[0],
            tables=step.tables.ctypes.data,
            table_width=step.tables.shape[1],
            positions=step.positions.ctypes.data,
            task=self._tasks.attends.ctypes.data,
        )
        self._merge.set(tasks=len(self._tasks.merges), task=self._tasks.merges.ctypes.data)
        self._project.set(rows=self._rows)

    def _turn(self, positions: npt.NDArray[np.int32]) -> None:
        """The rows' cosines and sines, value by value: see latent_rows.rotate."""
        cosines, sines = self._cosines[positions], self._sines[positions]
        if self._shape.interleaved:
            self._row_cosines = np.repeat(cosines, 2, axis=1)
            self._row_sines = np.repeat(sines, 2, axis=1)
            self._row_sines[:, ::2] *= -1
        else:
            self._row_cosines = np.concatenate([cosines, cosines], axis=1)
            self._row_sines = np.concatenate([-sines, sines], axis=1)
        for call in (self._write, self._absorb):
            call.set(
                cosines=self._row_cosines.ctypes.data,
                sines=self._row_sines.ctypes.data,
            )

    def write(self, layer: int, kv: torch.Tensor, weights: LatentWeights) -> None:
        """Normalizes latents, rotates keys, and writes both into the pool, rounded to its kind.

        kv [rows or more, latent + rope] of the engine's dtype, as kv_a_proj_with_mqa gives it; rows
        may be apart (a part of a wider, joined product), values in a row may not.
        """
        self._write.set(
            pool=self._pool + layer * self._layer_bytes,
            norm=weights.norm.data_ptr(),
            kv=kv.data_ptr(),
            kv_bytes=kv.stride(0) * kv.element_size(),
        )
        self._write.run(min(self._threads, -(-self._rows // rows.TAKE)))

    def attend(self, layer: int, q: torch.Tensor, weights: LatentWeights) -> torch.Tensor:
        """Attention over the pool: [room, heads * value] of the engine's dtype, reused every call.

        q [rows or more, heads * (nope + rope)]; rows may be apart, as in write().
        """
        by_head = self._shape.heads * -(-self._rows // HEAD_ROWS)
        self._absorb.set(
            q=q.data_ptr(),
            q_bytes=q.stride(0) * q.element_size(),
            keys=weights.keys.data_ptr(),
        )
        self._run(self._absorb, by_head)
        self._attend.set(pool=self._pool + layer * self._layer_bytes)
        self._run(self._attend, len(self._tasks.attends))
        if len(self._tasks.merges):
            self._run(self._merge, len(self._tasks.merges))
        self._project.set(values=weights.values.data_ptr())
        self._run(self._project, by_head)
        return self._out

    def _run(self, call: Call, items: int) -> None:
        self._ticket[0] = 0
        call.run(min(self._threads, items))
