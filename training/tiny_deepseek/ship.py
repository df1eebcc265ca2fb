"""`python -m training.tiny_deepseek.ship`: the trained model as a folder with its card."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer

from training.tiny_deepseek import data, export, tokens, train
from training.tiny_deepseek.card import OPENINGS, QUESTIONS, Run, card
from training.tiny_deepseek.evaluate import answer, evaluate
from training.tiny_deepseek.model import TinyDeepseek
from training.tiny_deepseek.shape import Shape

_MOST_TOKENS = 48
_LONG_WINDOWS = 4
_MANIFEST = "tandem.json"


def ship(out: Path, folder: Path) -> None:
    """Exports the checkpoint in `out`, measures what was exported, writes card and manifest."""
    found = data.load(out / "data")
    state = torch.load(out / train.CHECKPOINT, weights_only=True)
    trained = train.load(out / train.CHECKPOINT)
    export.export(trained, found.tokenizer, folder, fp8=True)
    shipped = export.load(folder)
    run = Run(
        shape=trained.shape,
        parameters=sum(p.numel() for p in trained.parameters()),
        active=active_parameters(trained.shape),
        tokens=state["tokens"],
        steps=state["steps"],
        minutes=state["seconds"] / 60,
        domain_tokens={name: len(ids) for name, ids in found.train.items()},
        packages=found.packages,
        before=evaluate(trained, found),
        after=evaluate(shipped, found),
        long=evaluate(shipped, found, _LONG_WINDOWS, trained.shape.context),
        answers=[(q, _say(shipped, found.tokenizer, _question(q))) for q in QUESTIONS],
        continuations=[(t, _say(shipped, found.tokenizer, tokens.BEGIN + t)) for t in OPENINGS],
    )
    (folder / "README.md").write_text(card(run), encoding="utf-8")
    files = sorted(f for f in folder.iterdir() if f.name not in (_MANIFEST, "README.md"))
    sums = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    manifest = {"source": "training.tiny_deepseek", "sha256": sums}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def active_parameters(shape: Shape) -> int:
    """Parameters that a token meets, without drafts: all but the experts that it did not choose."""
    model = TinyDeepseek(shape)
    every = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("draft."))
    expert = 3 * shape.width * shape.expert_width
    unused = (shape.experts - shape.chosen) * (shape.layers - shape.dense_layers)
    return every - unused * expert


def _question(text: str) -> str:
    return f"{tokens.BEGIN}{tokens.USER}{text}{tokens.ASSISTANT}"


def _say(model: TinyDeepseek, tokenizer: Tokenizer, prompt: str) -> str:
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    said: str = tokenizer.decode(answer(model, ids, tokens.END_ID, _MOST_TOKENS))
    return said


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder that training wrote")
    given = parser.parse_args()
    ship(given.out, given.folder)


if __name__ == "__main__":
    main()
