"""Model folders with a tokenizer of bytes, for engines that follow guides."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
EOS = 2
VOCABULARY = 272


def write_tokenizer(folder: Path) -> None:
    """Control tokens, the 256 bytes, a few pairs."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "r"), ("u", "e"), ("tr", "ue"), ("n", "u"), ("{", '"'), ('"', ":"), ("1", "2")]
    tokens = [*CONTROL, *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.save(str(folder / "tokenizer.json"))


def scripted_folder(folder: Path) -> Path:
    """What the scripted engine and frontends need of a model."""
    write_tokenizer(folder)
    config = {"max_position_embeddings": 8192, "vocab_size": VOCABULARY, "eos_token_id": EOS}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
