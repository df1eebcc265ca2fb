"""What the model can do, measured on held-out text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from training.tiny_deepseek.data import Tokens, held_out_windows
from training.tiny_deepseek.model import TinyDeepseek
from training.tiny_deepseek.tokens import byte_lengths

_BATCH_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one domain. loss: nats a token; bits: bits a byte of text.

    agreed: share of positions where the draft's likeliest token is the model's own. load: rows of
    the busiest expert over the mean, the mean over the layers, the drafts' included.
    """

    loss: float
    bits: float
    agreed: float
    load: float

    def __str__(self) -> str:
        return f"{self.loss:.3f} {self.bits:.3f} b/B agreed {self.agreed:.3f} load {self.load:.2f}"


@torch.no_grad()
def evaluate(model: TinyDeepseek, data: Tokens, windows: int, length: int) -> Mapping[str, Figures]:
    """Of every domain: `windows` windows of `length` tokens, spread over what is held out."""
    lengths = torch.from_numpy(byte_lengths(data.tokenizer))
    return {
        name: _measure(model, held_out_windows(ids, windows, length + 1), lengths)
        for name, ids in data.held_out.items()
    }


def _measure(model: TinyDeepseek, windows: torch.Tensor, lengths: torch.Tensor) -> Figures:
    nats, agreed = 0.0, 0
    loads: list[torch.Tensor] = []
    for part in torch.split(windows, max(1, _BATCH_TOKENS // windows.shape[1])):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(part[:, :-1], draft=True)
        assert out.drafts is not None
        nats += functional.cross_entropy(
            out.logits.float().flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
        ).item()
        agreed += int((out.drafts.argmax(-1) == out.logits.argmax(-1)).sum())
        loads.append(torch.stack(out.loads))
    targets = windows[:, 1:]
    load = torch.stack(loads).sum(0).float()
    return Figures(
        loss=nats / targets.numel(),
        bits=nats / math.log(2) / int(lengths[targets].sum()),
        agreed=agreed / targets.numel(),
        load=float((load.amax(-1) / load.mean(-1)).mean()),
    )
