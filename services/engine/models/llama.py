"""A Llama in a GGUF file: its Hugging Face config, and which tensor is which."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from services.engine.models.errors import ModelFileError
from services.engine.models.gguf import GgufFile, GgufTensor

ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """Sizes of a Llama, and what its rotary embedding turns on."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context_tokens: int
    norm_epsilon: float
    rope_theta: float
    tied: bool


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor's way: from `source`, whose rows are interleaved for `heads` heads, to `name`.

    llama.cpp rotates neighbours (2i, 2i + 1) of a head where Hugging Face rotates halves
    (i, i + head_dim / 2), so GGUF holds the rows of Q and K permuted; heads is 0 where not.
    """

    name: str
    source: GgufTensor
    heads: int = 0


def shape_of(file: GgufFile) -> LlamaShape:
    """Reads the sizes. Raises ModelFileError for what is no Llama, naming the key."""
    architecture = file.get("general.architecture", str)
    if architecture != "llama":
        raise ModelFileError(
            file.path, f"general.architecture is {architecture!r}; only 'llama' can be served"
        )
    if file.get("llama.expert_count", int, 0):
        raise ModelFileError(file.path, "llama.expert_count: experts are not supported")
    heads = _positive(file, "llama.attention.head_count")
    hidden = _positive(file, "llama.embedding_length")
    head_dim = file.get("llama.attention.key_length", int, hidden // heads)
    rotary = file.get("llama.rope.dimension_count", int, head_dim)
    if rotary != head_dim:
        raise ModelFileError(
            file.path, f"llama.rope.dimension_count is {rotary}, only the head's {head_dim} can be"
        )
    kv_heads = file.get("llama.attention.head_count_kv", int, heads)
    if kv_heads < 1 or heads % kv_heads:
        raise ModelFileError(
            file.path, f"llama.attention.head_count_kv is {kv_heads}, which does not divide {heads}"
        )
    embedding = _tensor(file, "token_embd.weight")
    return LlamaShape(
        layers=_positive(file, "llama.block_count"),
        hidden=hidden,
        intermediate=_positive(file, "llama.feed_forward_length"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=embedding.shape[0] if embedding.shape else 0,
        context_tokens=_positive(file, "llama.context_length"),
        norm_epsilon=_short(file.get("llama.attention.layer_norm_rms_epsilon", float)),
        rope_theta=_short(file.get("llama.rope.freq_base", float, 10000.0)),
        tied="output.weight" not in file.tensors,
    )


def weights_of(file: GgufFile, shape: LlamaShape) -> list[Weight]:
    """Every tensor of the model, layer by layer.

    Raises ModelFileError for one that is missing, of the wrong shape, or has no place in a Llama.
    """
    found: list[Weight] = []

    def take(source: str, name: str, *expected: int, heads: int = 0) -> None:
        tensor = _tensor(file, source)
        if tensor.shape != expected:
            raise ModelFileError(
                file.path, f"tensor {source} is {list(tensor.shape)}, expected {list(expected)}"
            )
        found.append(Weight(name, tensor, heads))

    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    hidden, wide = shape.hidden, shape.intermediate
    take("token_embd.weight", "model.embed_tokens.weight", shape.vocabulary, hidden)
    for i in range(shape.layers):
        gguf, hf = f"blk.{i}", f"model.layers.{i}"
        take(f"{gguf}.attn_norm.weight", f"{hf}.input_layernorm.weight", hidden)
        take(f"{gguf}.attn_q.weight", f"{hf}.self_attn.q_proj.weight", q, hidden, heads=shape.heads)
        take(
            f"{gguf}.attn_k.weight",
            f"{hf}.self_attn.k_proj.weight",
            kv,
            hidden,
            heads=shape.kv_heads,
        )
        take(f"{gguf}.attn_v.weight", f"{hf}.self_attn.v_proj.weight", kv, hidden)
        take(f"{gguf}.attn_output.weight", f"{hf}.self_attn.o_proj.weight", hidden, q)
        take(f"{gguf}.ffn_norm.weight", f"{hf}.post_attention_layernorm.weight", hidden)
        take(f"{gguf}.ffn_gate.weight", f"{hf}.mlp.gate_proj.weight", wide, hidden)
        take(f"{gguf}.ffn_up.weight", f"{hf}.mlp.up_proj.weight", wide, hidden)
        take(f"{gguf}.ffn_down.weight", f"{hf}.mlp.down_proj.weight", hidden, wide)
    take("output_norm.weight", "model.norm.weight", hidden)
    if not shape.tied:
        take("output.weight", "lm_head.weight", shape.vocabulary, hidden)
    unplaced = file.tensors.keys() - {w.source.name for w in found} - {ROPE_FACTORS}
    if unplaced:
        raise ModelFileError(
            file.path, f"tensor {min(unplaced)} has no place in a Llama ({len(unplaced)} such)"
        )
    return found


def config_json(
    file: GgufFile, shape: LlamaShape, rope_factors: list[float] | None
) -> dict[str, object]:
    """config.json for LlamaForCausalLM. `rope_factors`: the tensor ROPE_FACTORS, if there."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": shape.context_tokens,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rope_theta,
        "rope_scaling": _rope_scaling(file, shape, rope_factors),
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocabulary,
        "bos_token_id": file.optional("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": file.optional("tokenizer.ggml.eos_token_id", int),
    }


def _rope_scaling(
    file: GgufFile, shape: LlamaShape, factors: list[float] | None
) -> Mapping[str, object] | None:
    if factors is not None:
        return _llama3(file, shape, factors)
    kind = file.get("llama.rope.scaling.type", str, "none")
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": file.get("llama.rope.scaling.factor", float)}
    raise ModelFileError(
        file.path, f"llama.rope.scaling.type is {kind!r}; only none, linear, llama3 can be served"
    )


def _llama3(file: GgufFile, shape: LlamaShape, factors: list[float]) -> Mapping[str, object]:
    """Llama 3.1's parameters, of which GGUF holds only the factors they lead to."""
    low, high, original = 1.0, 4.0, 8192
    scale = max(factors)

    def factor(i: int) -> float:
        wavelength = 2 * math.pi * math.pow(shape.rope_theta, 2 * i / shape.head_dim)
        smooth = min(max((original / wavelength - low) / (high - low), 0.0), 1.0)
        return 1 / ((1 - smooth) / scale + smooth)

    expected = [factor(i) for i in range(shape.head_dim // 2)]
    if len(factors) != len(expected) or any(
        not math.isclose(a, b, rel_tol=1e-3) for a, b in zip(factors, expected, strict=True)
    ):
        raise ModelFileError(file.path, f"tensor {ROPE_FACTORS} is not the scaling of Llama 3.1")
    return {
        "rope_type": "llama3",
        "factor": _short(scale),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _tensor(file: GgufFile, name: str) -> GgufTensor:
    tensor = file.tensors.get(name)
    if tensor is None:
        raise ModelFileError(file.path, f"tensor {name} is missing")
    return tensor


def _positive(file: GgufFile, key: str) -> int:
    value = file.get(key, int)
    if value < 1:
        raise ModelFileError(file.path, f"{key} is {value}, must be at least 1")
    return value


def _short(value: float) -> float:
    """The decimal that was written before float32 made 9.999999747378752e-06 of 1e-05."""
    return float(f"{value:.7g}")
