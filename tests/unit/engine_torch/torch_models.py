"""Tiny random Llama models in Hugging Face folders, and ways to run them in steps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from services.engine.torch.model import Batch, TorchModel

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 640,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def tensors(config: dict[str, object], seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights under Hugging Face's names, large enough for attention to have opinions."""
    random = np.random.default_rng(seed)
    c = {**TINY, **config}
    hidden, wide, dim = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * dim, c["num_key_value_heads"] * dim

    def draw(*shape: int, scale: float = 1.5) -> torch.Tensor:
        values = random.standard_normal(shape) * scale / np.sqrt(shape[-1])
        return torch.from_numpy(values.astype(np.float32))

    found = {"model.embed_tokens.weight": draw(c["vocab_size"], hidden, scale=8)}
    found["model.norm.weight"] = 1 + draw(hidden)
    if not c["tie_word_embeddings"]:
        found["lm_head.weight"] = draw(c["vocab_size"], hidden, scale=4)
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        found[p + "input_layernorm.weight"] = 1 + draw(hidden)
        found[p + "post_attention_layernorm.weight"] = 1 + draw(hidden)
        shapes = {
            "self_attn.q_proj": (q, hidden, "attention_bias"),
            "self_attn.k_proj": (kv, hidden, "attention_bias"),
            "self_attn.v_proj": (kv, hidden, "attention_bias"),
            "self_attn.o_proj": (hidden, q, "attention_bias"),
            "mlp.gate_proj": (wide, hidden, "mlp_bias"),
            "mlp.up_proj": (wide, hidden, "mlp_bias"),
            "mlp.down_proj": (hidden, wide, "mlp_bias"),
        }
        for name, (outputs, inputs, bias) in shapes.items():
            found[f"{p}{name}.weight"] = draw(outputs, inputs)
            if c.get(bias):
                found[f"{p}{name}.bias"] = draw(outputs)
    return found


def write(folder: Path, *, shards: int = 1, **config: object) -> Path:
    """A Hugging Face folder, in one safetensors file or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**TINY, **config}))
    found = tensors(config)
    if shards == 1:
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    where = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {k: v for i, (k, v) in enumerate(found.items()) if i % shards == shard}
        save_file(part, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(part, name))
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@dataclass
class Sequence:
    """Tokens, the blocks they live in, and how many of them are computed."""

    tokens: np.ndarray
    table: np.ndarray
    done: int = 0


def sequences(model: TorchModel, lengths: list[int], seed: int = 0) -> list[Sequence]:
    """Random tokens, in blocks drawn at random from a fresh pool full of rubbish."""
    random = np.random.default_rng(seed)
    counts = [model.layout.blocks_for(n) for n in lengths]
    pool = random.integers(0, 256, (sum(counts) + 3, model.layout.block_bytes), np.uint8)
    model.bind(pool)
    blocks = random.permutation(len(pool)).astype(np.int32)
    ends = np.cumsum(counts)
    return [
        Sequence(
            # Of the sequence alone, not of which others there are.
            np.random.default_rng(n).integers(0, model.config.vocabulary, n).astype(np.int32),
            blocks[end - count : end],
        )
        for n, count, end in zip(lengths, counts, ends, strict=True)
    ]


def batch(parts: list[tuple[Sequence, int]]) -> Batch:
    """The next tokens of some sequences, logits of all rows wanted."""
    counts = [count for _, count in parts]
    width = max(len(s.table) for s, _ in parts)
    tables = np.full((len(parts), width), -1, np.int32)
    for row, (sequence, _) in enumerate(parts):
        tables[row, : len(sequence.table)] = sequence.table
    total = sum(counts)
    return Batch(
        token_ids=np.concatenate([s.tokens[s.done : s.done + n] for s, n in parts]),
        positions=np.concatenate([np.arange(s.done, s.done + n, dtype=np.int32) for s, n in parts]),
        query_starts=np.cumsum([0, *counts]).astype(np.int32),
        block_tables=tables,
        logit_rows=np.arange(total, dtype=np.int32),
    )


def advance(model: TorchModel, parts: list[tuple[Sequence, int]]) -> list[np.ndarray]:
    """One step; logits [rows, vocabulary] of each part."""
    logits = model.forward(batch(parts))
    for sequence, count in parts:
        sequence.done += count
    return np.split(logits, np.cumsum([count for _, count in parts])[:-1])


def whole(model: TorchModel, length: int) -> np.ndarray:
    """Logits of a sequence of that length, computed alone and in one step."""
    (sequence,) = sequences(model, [length])
    (logits,) = advance(model, [(sequence, length)])
    return logits
