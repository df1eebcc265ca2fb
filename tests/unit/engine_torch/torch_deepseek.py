"""Tiny random DeepSeek V3 models in Hugging Face folders, as released: per expert, with MTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

TINY = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 640,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def shapes(c: dict[str, object]) -> Shapes:
    """Every tensor's name and shape."""
    hidden, layers = c["hidden_size"], c["num_hidden_layers"]
    yield "model.embed_tokens.weight", (c["vocab_size"], hidden)
    for i in range(layers):
        yield from _layer(c, f"model.layers.{i}.", sparse=i >= c["first_k_dense_replace"])
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (c["vocab_size"], hidden)
    if c["num_nextn_predict_layers"]:
        prefix = f"model.layers.{layers}."
        for name in ("enorm", "hnorm", "shared_head.norm"):
            yield f"{prefix}{name}.weight", (hidden,)
        yield f"{prefix}eh_proj.weight", (hidden, 2 * hidden)
        yield from _layer(c, prefix, sparse=True)


def _layer(c: dict[str, object], prefix: str, *, sparse: bool) -> Shapes:
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    q, rank = c["qk_nope_head_dim"] + c["qk_rope_head_dim"], c["q_lora_rank"]
    yield f"{prefix}input_layernorm.weight", (hidden,)
    yield f"{prefix}post_attention_layernorm.weight", (hidden,)
    attention = f"{prefix}self_attn."
    if rank is None:
        yield f"{attention}q_proj.weight", (heads * q, hidden)
    else:
        yield f"{attention}q_a_proj.weight", (rank, hidden)
        yield f"{attention}q_a_layernorm.weight", (rank,)
        yield f"{attention}q_b_proj.weight", (heads * q, rank)
    latent = c["kv_lora_rank"]
    yield f"{attention}kv_a_proj_with_mqa.weight", (latent + c["qk_rope_head_dim"], hidden)
    yield f"{attention}kv_a_layernorm.weight", (latent,)
    wide = heads * (c["qk_nope_head_dim"] + c["v_head_dim"])
    yield f"{attention}kv_b_proj.weight", (wide, latent)
    yield f"{attention}o_proj.weight", (hidden, heads * c["v_head_dim"])
    if not sparse:
        yield from _gated(f"{prefix}mlp.", hidden, c["intermediate_size"])
        return
    yield f"{prefix}mlp.gate.weight", (c["n_routed_experts"], hidden)
    yield f"{prefix}mlp.gate.e_score_correction_bias", (c["n_routed_experts"],)
    expert = c["moe_intermediate_size"]
    for i in range(c["n_routed_experts"]):
        yield from _gated(f"{prefix}mlp.experts.{i}.", hidden, expert)
    if c["n_shared_experts"]:
        yield from _gated(f"{prefix}mlp.shared_experts.", hidden, expert * c["n_shared_experts"])


def _gated(prefix: str, hidden: int, wide: int) -> Shapes:
    yield f"{prefix}gate_proj.weight", (wide, hidden)
    yield f"{prefix}up_proj.weight", (wide, hidden)
    yield f"{prefix}down_proj.weight", (hidden, wide)


def tensors(config: dict[str, object], seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights under Hugging Face's names, large enough for attention to have opinions."""
    random = np.random.default_rng(seed)
    found = {}
    for name, shape in shapes({**TINY, **config}):
        values = random.standard_normal(shape) / np.sqrt(shape[-1])
        if "norm" in name:
            values = 1 + values
        elif "embed" in name:
            values *= 8
        else:
            values *= 0.3 if "bias" in name else 1.5
        found[name] = torch.from_numpy(values.astype(np.float32))
    return found


def write(folder: Path, found: dict[str, torch.Tensor] | None = None, **config: object) -> Path:
    """A Hugging Face folder, of random weights or given ones."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**TINY, **config}))
    weights = tensors(config) if found is None else found
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
