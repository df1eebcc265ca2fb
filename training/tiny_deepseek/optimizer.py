"""Muon for the matrices, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_STEPS = 5
_NOT_MATRICES = ("embed", "lm_head", "gate.weight")
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@torch.no_grad()
def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrices to [..., rows, columns], roughly: all singular values near 1.

    Newton-Schulz iteration with the coefficients of Muon (Jordan et al. 2024), in bfloat16.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    found: Tensor = (x.mT if tall else x).to(matrices.dtype)
    return found


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal; a stack of matrices is stepped matrix by matrix."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                held = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(held, group["momentum"])
                # As large a step for a tall matrix as for a square one.
                scale = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
                p.add_(orthogonal(ahead), alpha=-group["lr"] * scale)


def optimizers(model: nn.Module, muon: float, adam: float) -> list[torch.optim.Optimizer]:
    """Both, over all parameters of the model; the learning rates are those at full speed."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        inner = p.ndim >= 2 and not any(
            part in name for part in ("embed", "lm_head", "gate.weight")
        )
        (matrices if inner else others).append(p)
    found: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=muon, momentum=0.95),
        torch.optim.AdamW(others, lr=adam, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0),
    ]
    for optimizer in found:
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    return found
