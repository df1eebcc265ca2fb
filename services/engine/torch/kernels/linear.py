"""Linear layers: torch's, with the weight laid out once in the order its kernels read it."""

from __future__ import annotations

import torch
from torch.nn import functional

# The row count that oneDNN is told to lay a weight out for. It chooses well for any up to
# hundreds from this, and badly from 1.
LAYOUT_ROWS = 32
# Rows computed at once, at most: enough for full speed. See numerics.py.
MOST_ROWS = 512


def can_pack() -> bool:
    """Tells if this torch has oneDNN and the operators that take its weight layouts."""
    return torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


class Linear:
    """x [rows, inputs] -> x @ weight.T + bias [rows, outputs]; weight [outputs, inputs].

    With `packed` the layout is oneDNN's own: without it every call would reorder the weight, which
    costs as much as the product itself when there are few rows.
    """

    __slots__ = ("_bias", "_packed", "_weight", "inputs", "most_rows", "outputs")

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        packed: bool,
        most_rows: int = MOST_ROWS,
    ) -> None:
        self.outputs, self.inputs = weight.shape
        self.most_rows = most_rows
        self._bias = bias
        self._packed = packed
        self._weight = weight
        if packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, LAYOUT_ROWS)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """A new tensor; x must be contiguous."""
        if self._packed:
            result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self._weight, self._bias, "none", [], ""
            )
            return result
        return functional.linear(x, self._weight, self._bias)
