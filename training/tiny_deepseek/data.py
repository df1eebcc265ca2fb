"""The corpus as tokens on disk, and the windows that a step takes from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from training.tiny_deepseek import corpus, tokens


@dataclass(frozen=True, slots=True)
class Tokens:
    """Every domain's tokens: to train on, and held out. packages: versions of what was read."""

    tokenizer: Tokenizer
    train: Mapping[str, np.ndarray]
    held_out: Mapping[str, np.ndarray]
    packages: Mapping[str, str]


def prepare(folder: Path, vocabulary: int, seed: int) -> Tokens:
    """Fetches, reads and encodes the corpus below `folder`, or loads what is there already."""
    if not (folder / "packages.json").exists():
        packages = corpus.fetch(folder / "packages")
        domains = corpus.read(folder / "packages")
        tokenizer = tokens.train(domains, vocabulary, seed)
        tokenizer.save(str(folder / "tokenizer.json"))
        for name, domain in domains.items():
            np.save(folder / f"{name}.train.npy", tokens.encode(tokenizer, domain.train))
            np.save(folder / f"{name}.held_out.npy", tokens.encode(tokenizer, domain.held_out))
        (folder / "packages.json").write_text(json.dumps(packages, indent=2) + "\n")  # the last
    return load(folder)


def load(folder: Path) -> Tokens:
    """What `prepare` left."""
    names = [source.domain for source in corpus.SOURCES]
    return Tokens(
        Tokenizer.from_file(str(folder / "tokenizer.json")),
        {name: np.load(folder / f"{name}.train.npy", mmap_mode="r") for name in names},
        {name: np.load(folder / f"{name}.held_out.npy", mmap_mode="r") for name in names},
        json.loads((folder / "packages.json").read_text()),
    )


class Windows:
    """Draws training windows: each domain as often as its share says.

    A window begins with BOS, as every prompt does: at a document's start in a chat, anywhere in
    other text.
    """

    def __init__(self, train: Mapping[str, np.ndarray], seed: Sequence[int]) -> None:
        self._train = train
        self._chance = np.random.default_rng(seed)
        self._shares = np.array([s.share for s in corpus.SOURCES if s.domain in train], float)
        self._names = [s.domain for s in corpus.SOURCES if s.domain in train]
        self._starts = {
            name: np.flatnonzero(ids == tokens.BEGIN_ID)
            for name, ids in train.items()
            if name == "chat"
        }

    def draw(self, batch: int, length: int) -> torch.Tensor:
        """int64 [batch, length]."""
        shares = self._shares / self._shares.sum()
        rows = [
            self._one(self._names[i], length)
            for i in self._chance.choice(len(shares), batch, p=shares)
        ]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _one(self, name: str, length: int) -> np.ndarray:
        ids = self._train[name]
        starts = self._starts.get(name)
        last = len(ids) - length
        if starts is not None:
            start = int(self._chance.choice(starts[: np.searchsorted(starts, last)]))
        else:
            start = int(self._chance.integers(last))
        window = np.array(ids[start : start + length])
        window[0] = tokens.BEGIN_ID
        return window


def held_out_windows(ids: np.ndarray, count: int, length: int) -> torch.Tensor:
    """int64 [count, length]: evenly spread over the held-out tokens, fewer if they are few."""
    count = min(count, max(1, len(ids) // length))
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    windows = np.stack([ids[start : start + length] for start in starts]).astype(np.int64)
    windows[:, 0] = tokens.BEGIN_ID
    return torch.from_numpy(windows)
