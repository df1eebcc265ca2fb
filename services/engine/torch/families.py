"""The families of models that are computed, and what their config.json calls things.

A key that would change the computation and isn't known to is refused by its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from services.engine.torch.fields import Found, expect, flag, number, unsupported, vectors, whole
from services.engine.torch.kernels.latent_steps import LEAST_LATENT
from services.engine.torch.shapes import FeedForwards, GroupedShape, MlaShape, MoeShape

# The kernels work on vectors of sixteen, and rotate heads by halves.
VECTOR = 16
LEAST_HEAD_DIM = 32
MOST_GROUP = 64


@dataclass(frozen=True, slots=True)
class Family:
    """How to read what differs."""

    attention: Callable[[Found], GroupedShape | MlaShape]
    feed_forwards: Callable[[Found, int], FeedForwards]
    draft_layers: Callable[[Found], int]


def of(found: Found) -> Family:
    """By the architecture. Raises UnsupportedModelError."""
    named = found.get("architectures") or ["LlamaForCausalLM"]
    if not isinstance(named, list) or len(named) != 1 or named[0] not in FAMILIES:
        raise unsupported("architectures", named, "one of " + ", ".join(FAMILIES))
    return FAMILIES[named[0]]


def fp8_block(found: Found) -> tuple[int, int]:
    """Of FP8 weights, which are known by their dtype; weights of other kinds aren't read."""
    given = found.get("quantization_config")
    if given is None:
        return 128, 128
    expect(given, "quant_method", "fp8")
    expect(given, "fmt", "e4m3")
    block = given.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2):
        raise unsupported("weight_block_size", block, "two numbers")
    rows, columns = (whole({"weight_block_size": n}, "weight_block_size") for n in block)
    return rows, columns


def _grouped(
    found: Found, *, qkv_bias: bool = False, output_bias: bool = False, norms: bool = False
) -> GroupedShape:
    heads = whole(found, "num_attention_heads")
    head_dim = whole(found, "head_dim", whole(found, "hidden_size") // heads)
    kv_heads = whole(found, "num_key_value_heads", heads)
    vectors("head_dim", head_dim, VECTOR, LEAST_HEAD_DIM)
    if heads % kv_heads or heads // kv_heads > MOST_GROUP:
        allowed = f"a divisor of num_attention_heads={heads}, at most {MOST_GROUP} times"
        raise unsupported("num_key_value_heads", kv_heads, allowed)
    expect(found, "use_sliding_window", False)
    for kind in found.get("layer_types") or ():
        expect({"layer_types": kind}, "layer_types", "full_attention")
    return GroupedShape(heads, kv_heads, head_dim, qkv_bias, output_bias, norms)


def _llama_attention(found: Found) -> GroupedShape:
    bias = flag(found, "attention_bias")
    return _grouped(found, qkv_bias=bias, output_bias=bias)


def _qwen2_attention(found: Found) -> GroupedShape:
    return _grouped(found, qkv_bias=flag(found, "qkv_bias", default=True))


def _qwen3_attention(found: Found) -> GroupedShape:
    bias = flag(found, "attention_bias")
    return _grouped(found, qkv_bias=bias, output_bias=bias, norms=True)


def _mla(found: Found) -> MlaShape:
    rank = found.get("q_lora_rank")
    shape = MlaShape(
        heads=whole(found, "num_attention_heads"),
        q_rank=None if rank is None else whole(found, "q_lora_rank"),
        latent=whole(found, "kv_lora_rank"),
        nope=whole(found, "qk_nope_head_dim"),
        rope=whole(found, "qk_rope_head_dim"),
        value=whole(found, "v_head_dim"),
        interleaved=flag(found, "rope_interleave", default=True),
        bias=flag(found, "attention_bias"),
    )
    vectors("kv_lora_rank", shape.latent, VECTOR, LEAST_LATENT)
    for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        vectors(key, whole(found, key), VECTOR)
    if rank is not None:
        vectors("q_lora_rank", rank, VECTOR)
    return shape


def _dense(found: Found, layers: int) -> FeedForwards:
    return FeedForwards(sparse=(False,) * layers)


def _qwen_moe(found: Found, layers: int, *, shared: bool) -> FeedForwards:
    """Qwen2-MoE has a gated shared expert, Qwen3-MoE none."""
    step = whole(found, "decoder_sparse_step", 1)
    dense = found.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(i, int) for i in dense):
        raise unsupported("mlp_only_layers", dense, "a list of layers")
    # transformers writes num_experts under either name.
    key = "num_experts" if "num_experts" in found else "num_local_experts"
    wide = whole(found, "shared_expert_intermediate_size") if shared else 0
    vectors("shared_expert_intermediate_size", wide, VECTOR)
    moe = MoeShape(
        experts=whole(found, key),
        choices=whole(found, "num_experts_per_tok"),
        intermediate=whole(found, "moe_intermediate_size"),
        normalized=flag(found, "norm_topk_prob"),
        shared=wide,
        shared_name="shared_expert",
        shared_gate=shared,
    )
    sparse = tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))
    return _checked(moe, sparse)


def _deepseek_moe(found: Found, layers: int) -> FeedForwards:
    expect(found, "topk_method", "noaux_tc")
    first = whole(found, "first_k_dense_replace", 0, least=0)
    every = whole(found, "moe_layer_freq", 1)
    wide = whole(found, "moe_intermediate_size")
    groups = whole(found, "n_group", 1)
    moe = MoeShape(
        experts=whole(found, "n_routed_experts"),
        choices=whole(found, "num_experts_per_tok"),
        intermediate=wide,
        groups=groups,
        kept_groups=whole(found, "topk_group", groups),
        sigmoid=expect(found, "scoring_func", "sigmoid", "softmax") == "sigmoid",
        normalized=flag(found, "norm_topk_prob", default=True),
        factor=number(found, "routed_scaling_factor", 1.0),
        corrected=True,
        shared=wide * whole(found, "n_shared_experts", 0, least=0),
    )
    sparse = tuple(i >= first and i % every == 0 for i in range(layers))
    return _checked(moe, sparse)


def _checked(moe: MoeShape, sparse: tuple[bool, ...]) -> FeedForwards:
    vectors("moe_intermediate_size", moe.intermediate, VECTOR)
    size = moe.experts // moe.groups
    if moe.experts % moe.groups or (moe.groups > 1 and size < 2):
        raise unsupported("n_group", moe.groups, f"groups of two or more of {moe.experts} experts")
    if moe.kept_groups > moe.groups:
        raise unsupported("topk_group", moe.kept_groups, f"at most n_group={moe.groups}")
    if moe.choices > moe.kept_groups * size:
        allowed = f"at most the {moe.kept_groups * size} experts of the groups that are kept"
        raise unsupported("num_experts_per_tok", moe.choices, allowed)
    return FeedForwards(moe, sparse)


def _no_draft(found: Found) -> int:
    return 0


def _draft(found: Found) -> int:
    """How many layers, which transformers writes under either name."""
    key = "num_nextn_predict_layers"
    return whole(found, key if key in found else "num_mtp_layers", 0, least=0)


FAMILIES = {
    "LlamaForCausalLM": Family(_llama_attention, _dense, _no_draft),
    "Qwen2ForCausalLM": Family(_qwen2_attention, _dense, _no_draft),
    "Qwen3ForCausalLM": Family(_qwen3_attention, _dense, _no_draft),
    "Qwen2MoeForCausalLM": Family(
        _qwen2_attention, lambda found, n: _qwen_moe(found, n, shared=True), _no_draft
    ),
    "Qwen3MoeForCausalLM": Family(
        _qwen3_attention, lambda found, n: _qwen_moe(found, n, shared=False), _no_draft
    ),
    # Kimi K2 is of this class too.
    "DeepseekV3ForCausalLM": Family(_mla, _deepseek_moe, _draft),
}
