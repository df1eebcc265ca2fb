"""What the model can do, measured on held-out text.

`python -m training.tiny_deepseek.evaluate FOLDER --out OUT` prints the figures of an exported
folder, on the corpus that training kept in OUT.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from training.tiny_deepseek import data, export
from training.tiny_deepseek.data import Tokens, held_out_windows
from training.tiny_deepseek.model import TinyDeepseek
from training.tiny_deepseek.tokens import byte_lengths

WINDOWS, LENGTH = 64, 256
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
        return (
            f"loss {self.loss:.3f}, {self.bits:.3f} bits a byte, drafts agreed {self.agreed:.3f}, "
            f"load {self.load:.2f}"
        )


@torch.no_grad()
def evaluate(
    model: TinyDeepseek, found: Tokens, windows: int = WINDOWS, length: int = LENGTH
) -> Mapping[str, Figures]:
    """Of every domain: `windows` windows of `length` tokens, spread over what is held out."""
    lengths = torch.from_numpy(byte_lengths(found.tokenizer))
    return {
        name: _measure(model, held_out_windows(ids, windows, length + 1), lengths)
        for name, ids in found.held_out.items()
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


@torch.no_grad()
def answer(model: TinyDeepseek, ids: list[int], end: int, most: int) -> list[int]:
    """The likeliest tokens after `ids`, one by one, without `end`; `most` at most."""
    given = len(ids)
    ids = list(ids)
    while len(ids) < given + most:
        chosen = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if chosen == end:
            break
        ids.append(chosen)
    return ids[given:]


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder that training wrote")
    given = parser.parse_args()
    model = export.load(given.folder)
    for name, figures in evaluate(model, data.load(given.out / "data")).items():
        print(f"{name}: {figures}")


if __name__ == "__main__":
    main()
