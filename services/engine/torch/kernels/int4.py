"""Linear layers with int4 weights: for few rows, where reading weights is what takes the time.

Weights are quantized in groups of 32 inputs to 16 evenly spaced values between the group's least
and greatest: what a Q4_1 block of a GGUF file holds, too. Values that came from such a block are on
its grid already, so they keep their codes; only scale and offset are rounded, to bfloat16.

Torch's int4 product takes a row at a time: beyond a few rows a bfloat16 product of the very same
numbers is faster, and is used there. The two round differently, so a row's bits depend on how many
share the step: batch invariance can't be had with it.
"""

from __future__ import annotations

import torch

from services.engine.models.errors import UnsupportedModelError
from services.engine.torch.kernels.linear import Linear

GROUP = 32
LEVELS = 15
"""The greatest code; the product takes codes relative to 8."""
# Rows up to which the int4 product is faster; both read what they have once.
FEW_ROWS = 4
# What torch's product asks of a layer.
OUTPUTS_MULTIPLE = 16


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes int32 [outputs, inputs] of 0 to 15, scale and offset bfloat16 [outputs, groups].

    A number is code * scale + offset. Raises UnsupportedModelError for sizes that torch's product
    does not take.
    """
    outputs, inputs = weight.shape
    if inputs % GROUP or outputs % OUTPUTS_MULTIPLE:
        raise UnsupportedModelError(
            f"engine.weights=int4: a linear layer of {inputs} inputs and {outputs} outputs can't "
            f"be quantized; expected multiples of {GROUP} and {OUTPUTS_MULTIPLE}"
        )
    groups = weight.float().reshape(outputs, inputs // GROUP, GROUP)
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (most - least) / LEVELS
    # All alike: any scale will do, the code is 0.
    codes = ((groups - least) / torch.where(scale > 0, scale, 1.0)).round()
    return (
        codes.to(torch.int32).reshape(outputs, inputs),
        scale.squeeze(-1).to(torch.bfloat16),
        least.squeeze(-1).to(torch.bfloat16),
    )


def dequantize(codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """The numbers, bfloat16 [outputs, inputs]."""
    grouped = codes.reshape(*scale.shape, GROUP)
    found = grouped * scale.float()[..., None] + offset.float()[..., None]
    return found.to(torch.bfloat16).reshape(codes.shape)


class Int4Linear(Linear):
    """As Linear; weight bfloat16 [outputs, inputs]. Raises as quantize() does."""

    __slots__ = ("_codes", "_scales")

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, *, packed: bool, **given: int
    ) -> None:
        codes, scale, offset = quantize(weight)
        super().__init__(dequantize(codes, scale, offset), bias, packed=packed, **given)
        # Of code - 8.
        middle = (offset.float() + 8 * scale.float()).to(torch.bfloat16)
        self._scales = torch.stack([scale.t(), middle.t()], -1).contiguous()
        self._codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """A new tensor; x must be contiguous."""
        if len(x) > FEW_ROWS:
            return super().__call__(x)
        found: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self._codes, GROUP, self._scales
        )
        return found if self._bias is None else found.add_(self._bias)
