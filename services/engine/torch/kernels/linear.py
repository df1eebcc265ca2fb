"""Linear layers, with the weight laid out once in the order its kernels read it.

In bfloat16 on a machine that multiplies pairs of them (AVX512-BF16) they are our own kernel, that
of experts (experts.apply): against oneDNN's it takes about half the time for few rows and a few
percent less for hundreds, and a row's bits depend on the row alone. Else they are torch's.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from services.engine.torch.kernels import experts
from services.engine.torch.kernels.formats import BFLOAT16
from services.engine.torch.kernels.latent_tiles import PAIRS_IN_HARDWARE, ROWS_AT_ONCE
from services.engine.torch.kernels.simd import LANES
from services.engine.torch.kernels.team import Call

# The row count that oneDNN is told to lay a weight out for. It chooses well for any up to
# hundreds from this, and badly from 1.
LAYOUT_ROWS = 32
# Rows computed at once, at most: enough for full speed. See numerics.py.
MOST_ROWS = 512
# Work items for each thread, at least, where there are rows enough: so that all end together.
ITEMS = 4


def can_pack() -> bool:
    """Tells if this torch has oneDNN and the operators that take its weight layouts."""
    return torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


class Linear:
    """x [rows, inputs] -> x @ weight.T + bias [rows, outputs]; weight [outputs, inputs].

    With `packed` the layout is our kernel's or oneDNN's own: torch would reorder the weight in
    every call, which costs as much as the product itself when there are few rows.
    whole_outputs: of the layer that these are some outputs of, which decides on the kernel: so
    that bits are that layer's.
    """

    __slots__ = ("_bias", "_own", "_packed", "_weight", "inputs", "most_rows", "outputs")

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        packed: bool,
        most_rows: int = MOST_ROWS,
        whole_outputs: int = 0,
    ) -> None:
        self.outputs, self.inputs = weight.shape
        self.most_rows = most_rows
        self._bias = bias
        self._packed = packed
        self._weight = weight
        self._own: _Own | None = None
        if packed and bias is None and _Own.fits(weight, whole_outputs or self.outputs):
            self._own = _Own(weight)
            self._weight = self._own.weight
        elif packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, LAYOUT_ROWS)

    @property
    def own(self) -> bool:
        """Whether our kernel computes it, column by column and row by row."""
        return self._own is not None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """A new tensor; x must be contiguous."""
        if self._own is not None:
            return self._own(x)
        if self._packed:
            result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self._weight, self._bias, "none", [], ""
            )
            return result
        return functional.linear(x, self._weight, self._bias)


class _Own:
    """Our kernel's call. Rows are split like those of several experts with the same weight."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.outputs, inputs = weight.shape
        self._blocks = -(-self.outputs // experts.COLUMNS)
        self.weight = _in_words(weight, self._blocks)
        self._ticket = np.zeros(1, np.int64)
        self._scratch = np.zeros(0, np.uint8)
        self._parts = np.arange(MOST_ROWS, dtype=np.int32)
        self._all = np.zeros(2, np.int32)
        self._all_at = self._all.ctypes.data
        self._call = Call(
            experts.apply,
            experts.APPLY,
            kind=BFLOAT16,
            gated=0,
            inputs=inputs,
            outputs=self.outputs,
            weight=self.weight.data_ptr(),
            weight_bytes=0,
            chosen=self._parts.ctypes.data,
            ticket=self._ticket.ctypes.data,
        )

    @staticmethod
    def fits(weight: torch.Tensor, outputs: int) -> bool:
        """Tells if the kernel takes it: it reads whole words, and writes whole vectors."""
        whole = outputs % LANES == 0 and weight.shape[1] % 2 == 0
        return PAIRS_IN_HARDWARE and whole and weight.dtype == torch.bfloat16

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows, threads = len(x), torch.get_num_threads()
        if len(self._scratch) < threads * experts.TILE_BYTES:
            self._scratch = np.zeros(threads * experts.TILE_BYTES, np.uint8)
            self._call.set(scratch=self._scratch.ctypes.data)
        # Few columns and many rows: threads share the columns' blocks.
        parts = max(1, min(-(-ITEMS * threads // self._blocks), rows // ROWS_AT_ONCE))
        self._all[1], starts_at = rows, self._all_at
        if parts > 1:
            starts = np.linspace(0, rows, parts + 1).astype(np.int32)
            starts_at = starts.ctypes.data
        out = x.new_empty((rows, self.outputs))
        self._ticket[0] = 0
        self._call.set(chosen_count=parts, x=x.data_ptr(), starts=starts_at, out=out.data_ptr())
        self._call.run(min(threads, parts * self._blocks))
        return out


def _in_words(weight: torch.Tensor, blocks: int) -> torch.Tensor:
    """As experts.pack(), of bfloat16; pairs are moved as one."""
    words = weight.contiguous().view(torch.int32)
    full = words
    if len(words) < blocks * experts.COLUMNS:
        full = words.new_zeros((blocks * experts.COLUMNS, words.shape[1]))
        full[: len(words)] = words
    return full.view(blocks, experts.COLUMNS, -1).transpose(1, 2).contiguous()
