"""One step's residual state, and the kernels called on it.

All arrays a step needs live here and beside it (grouped_steps.py, latent_steps.py, moe_steps.py)
and are used again; they grow to the largest step seen. Rows beyond the batch's, which linear layers
may be filled up with, hold what was there before: no row's result depends on another row.
"""

from __future__ import annotations

import torch

from services.engine.torch.kernels import formats, rows
from services.engine.torch.kernels.batch import Plan
from services.engine.torch.kernels.team import Call, float_argument


def kind_of(dtype: torch.dtype) -> int:
    """The kernels' name for a dtype of activations."""
    return formats.BFLOAT16 if dtype == torch.bfloat16 else formats.FLOAT32


class Steps:
    """Residual state, its norms, and gates. Begin a step, then call the rest in layers' order.

    widest: of all gates.
    """

    def __init__(
        self, hidden: int, widest: int, epsilon: float, dtype: torch.dtype, threads: int
    ) -> None:
        self._hidden = hidden
        self._widest = widest
        self._dtype = dtype
        self._threads = threads
        kind = kind_of(dtype)
        self._normalize = Call(
            rows.normalize,
            rows.NORMALIZE,
            width=hidden,
            kind=kind,
            epsilon=float_argument(epsilon),
        )
        self._gate = Call(rows.gate, rows.GATE, kind=kind)
        self._capacity = 0
        self.rows = 0
        """That normalizing and gating go on with."""
        self._grow(64)

    def _grow(self, count: int) -> None:
        """Makes room for steps of `count` rows."""
        self._capacity = count
        self.state = torch.zeros((count, self._hidden), dtype=torch.float32)
        """The residual, float32 [room, hidden]."""
        self._normed = torch.zeros((count, self._hidden), dtype=self._dtype)
        # Gates are of different widths; each takes of one buffer what it needs.
        self._gated = torch.zeros(count * self._widest, dtype=self._dtype)
        self._gates: dict[int, torch.Tensor] = {}
        self._normalize.set(state=self.state.data_ptr(), out=self._normed.data_ptr())
        self._gate.set(out=self._gated.data_ptr())

    def begin(self, step: Plan, room: int) -> None:
        """A step; linear layers may read up to `room` rows of what is returned."""
        if room > self._capacity:
            self._grow(max(room, 2 * self._capacity))
        self._step = step
        self._set_rows(len(step.positions))

    def _set_rows(self, count: int) -> None:
        """Normalizing and gating go on with the first `count` rows."""
        self.rows = count
        self._normalize.set(rows=count)
        self._gate.set(rows=count)

    def _team(self) -> int:
        """Threads for the rows."""
        return min(self._threads, -(-self.rows // rows.TAKE))

    def embed(self, embedding: torch.Tensor) -> None:
        """The residual state becomes the tokens' embeddings."""
        self.replace(torch.index_select(embedding, 0, torch.from_numpy(self._step.token_ids)))

    def replace(self, values: torch.Tensor) -> None:
        """The residual state becomes the first rows of `values`, of any dtype."""
        self.state[: self.rows].copy_(values[: self.rows])

    def normalize(self, delta: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
        """State += delta; its RMSNorm [room, hidden]."""
        self._normalize.set(
            delta=0 if delta is None else delta.data_ptr(), weight=weight.data_ptr()
        )
        self._normalize.run(self._team())
        return self._normed

    def pick(self, *buffers: torch.Tensor) -> int:
        """Brings rows whose logits are wanted to these buffers' start: they alone go on.

        In their order; `state` is among them if more of a layer follows. Returns how many.
        """
        picked = torch.from_numpy(self._step.logit_rows)
        count = len(picked)
        for buffer in buffers:
            buffer[:count] = torch.index_select(buffer, 0, picked)
        self._set_rows(count)
        return count

    def gate(self, both: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up [room, width], of gate and up side by side [rows, 2 * width]."""
        width = both.shape[1] // 2
        if width not in self._gates:
            self._gates[width] = self._gated[: self._capacity * width].view(-1, width)
        self._gate.set(both=both.data_ptr(), width=width)
        self._gate.run(self._team())
        return self._gates[width]


class Norm:
    """RMSNorm of a part of each row, `width` values wide."""

    def __init__(self, width: int, epsilon: float, dtype: torch.dtype, threads: int) -> None:
        self._threads = threads
        self._out = torch.zeros((64, width), dtype=dtype)
        self._call = Call(
            rows.normalize_part,
            rows.PART,
            width=width,
            kind=kind_of(dtype),
            epsilon=float_argument(epsilon),
        )

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, count: int, room: int
    ) -> torch.Tensor:
        """Of the first `count` rows of x, which may be apart: [room, width]."""
        if room > len(self._out):
            self._out = self._out.new_zeros((room, self._out.shape[1]))
        self._call.set(
            rows=count,
            x=x.data_ptr(),
            stride=x.stride(0),
            weight=weight.data_ptr(),
            out=self._out.data_ptr(),
        )
        self._call.run(min(self._threads, -(-count // rows.TAKE)))
        return self._out
