"""Random DeepSeek V3 models, written as Hugging Face folders: speed needs no trained weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a DeepSeek V3; names as in its config.json, shortened."""

    hidden: int
    layers: int
    dense_layers: int
    heads: int
    q_lora: int
    kv_lora: int
    nope: int
    rope: int
    value: int
    intermediate: int
    expert_intermediate: int
    experts: int
    experts_per_token: int
    groups: int
    groups_per_token: int
    vocabulary: int
    positions: int = 8192


SHAPES = {
    "tiny": Shape(
        hidden=256,
        layers=4,
        dense_layers=1,
        heads=8,
        q_lora=128,
        kv_lora=128,
        nope=32,
        rope=32,
        value=32,
        intermediate=512,
        expert_intermediate=128,
        experts=16,
        experts_per_token=4,
        groups=4,
        groups_per_token=2,
        vocabulary=2048,
    ),
    # Attention as DeepSeek has it (512 + 64 values of KV a token and layer), the rest in its
    # proportions, at a size that two cores and a few gigabytes can measure in minutes.
    "medium": Shape(
        hidden=1024,
        layers=8,
        dense_layers=1,
        heads=16,
        q_lora=384,
        kv_lora=512,
        nope=128,
        rope=64,
        value=128,
        intermediate=2560,
        expert_intermediate=256,
        experts=32,
        experts_per_token=4,
        groups=4,
        groups_per_token=2,
        vocabulary=16384,
    ),
}


def config_of(shape: Shape) -> dict[str, object]:
    """Its config.json."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_act": "silu",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "moe_intermediate_size": shape.expert_intermediate,
        "num_hidden_layers": shape.layers,
        "first_k_dense_replace": shape.dense_layers,
        "moe_layer_freq": 1,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "q_lora_rank": shape.q_lora,
        "kv_lora_rank": shape.kv_lora,
        "qk_nope_head_dim": shape.nope,
        "qk_rope_head_dim": shape.rope,
        "v_head_dim": shape.value,
        "n_routed_experts": shape.experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": shape.experts_per_token,
        "n_group": shape.groups,
        "topk_group": shape.groups_per_token,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": shape.positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": 1,
        "bos_token_id": 0,
    }


def matrices(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor's name and shape, as released models have them."""
    wide = shape.hidden
    yield "model.embed_tokens.weight", (shape.vocabulary, wide)
    for layer in range(shape.layers):
        name = f"model.layers.{layer}."
        yield f"{name}input_layernorm.weight", (wide,)
        yield f"{name}post_attention_layernorm.weight", (wide,)
        for part, size in _attention(shape):
            yield f"{name}self_attn.{part}.weight", size
        for part, size in _feed_forward(shape, dense=layer < shape.dense_layers):
            yield f"{name}mlp.{part}", size
    yield "model.norm.weight", (wide,)
    yield "lm_head.weight", (shape.vocabulary, wide)


def _attention(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "q_a_proj", (shape.q_lora, shape.hidden)
    yield "q_a_layernorm", (shape.q_lora,)
    yield "q_b_proj", (shape.heads * (shape.nope + shape.rope), shape.q_lora)
    yield "kv_a_proj_with_mqa", (shape.kv_lora + shape.rope, shape.hidden)
    yield "kv_a_layernorm", (shape.kv_lora,)
    yield "kv_b_proj", (shape.heads * (shape.nope + shape.value), shape.kv_lora)
    yield "o_proj", (shape.hidden, shape.heads * shape.value)


def _feed_forward(shape: Shape, *, dense: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    if dense:
        yield from _gated("", shape.intermediate, shape.hidden)
        return
    yield "gate.weight", (shape.experts, shape.hidden)
    yield "gate.e_score_correction_bias", (shape.experts,)
    yield from _gated("shared_experts.", shape.expert_intermediate, shape.hidden)
    for expert in range(shape.experts):
        yield from _gated(f"experts.{expert}.", shape.expert_intermediate, shape.hidden)


def _gated(name: str, inner: int, outer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}gate_proj.weight", (inner, outer)
    yield f"{name}up_proj.weight", (inner, outer)
    yield f"{name}down_proj.weight", (outer, inner)


def write(shape: Shape, folder: Path, seed: int = 0) -> Path:
    """The folder, with weights of unit gain from this seed, and a tokenizer of bare numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(shape), indent=1) + "\n")
    _write_tokenizer(shape, folder / "tokenizer.json")
    random = torch.Generator().manual_seed(seed)
    tensors = {name: _drawn(name, size, random) for name, size in matrices(shape)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _drawn(name: str, size: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    if name.endswith("bias"):
        return 0.01 * torch.randn(size, generator=random)
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    drawn = torch.randn(size, generator=random, dtype=torch.float32)
    return (drawn / math.sqrt(size[-1])).to(torch.bfloat16)


def _write_tokenizer(shape: Shape, path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {str(i): i for i in range(shape.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
