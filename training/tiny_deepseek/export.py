"""The model as a Hugging Face folder, as DeepSeek releases V3: names, FP8 blocks, the MTP layer.

A projection is stored as float8 e4m3 with one float32 scale (`weight_scale_inv`) for each block of
128 by 128; embedding, head, norms, `eh_proj` and routing stay bfloat16, the routing bias float32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from training.tiny_deepseek import tokens
from training.tiny_deepseek.model import TinyDeepseek
from training.tiny_deepseek.shape import Shape

WEIGHTS = "model.safetensors"
BLOCK = 128
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
_LARGEST = 448.0  # of float8 e4m3
_PLAIN = re.compile(r"norm|embed_tokens|lm_head|shared_head|eh_proj|mlp\.gate\.")
_STACKS = {"gates": "gate_proj", "ups": "up_proj", "downs": "down_proj"}


def export(model: TinyDeepseek, tokenizer: Tokenizer, folder: Path, *, fp8: bool) -> None:
    """Writes the folder. fp8: projections in FP8 blocks, else in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.shape.config() | ({"quantization_config": QUANTIZATION} if fp8 else {})
    _write(folder / "config.json", config)
    generation = {"bos_token_id": tokens.BEGIN_ID, "eos_token_id": tokens.END_ID}
    _write(folder / "generation_config.json", generation | {"pad_token_id": tokens.PAD_ID})
    tokens.save(tokenizer, folder, model.shape.context)
    save_file(dict(_stored(model, fp8)), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # safetensors writes for its user alone


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _stored(model: TinyDeepseek, fp8: bool) -> Iterator[tuple[str, Tensor]]:
    for name, value in released(model):
        if name.endswith("e_score_correction_bias"):
            yield name, value.float()
        elif fp8 and not _PLAIN.search(name):
            quantized, scales = quantize(value)
            yield name, quantized
            yield name + "_scale_inv", scales
        else:
            yield name, value.bfloat16()


def released(model: TinyDeepseek) -> Iterator[tuple[str, Tensor]]:
    """Every weight by its name in the release. The MTP layer has its own copies of what it shares.

    Its number is that after the last layer's.
    """
    draft = f"model.layers.{model.shape.layers}"
    for name, value in model.state_dict().items():
        inner = name.removeprefix("draft.layer.")
        if inner != name:
            outer = f"{draft}.{inner}"
        elif name.startswith("draft.norm"):
            outer = f"{draft}.shared_head.norm.weight"
        elif name.startswith("draft."):
            outer = f"{draft}.{name.removeprefix('draft.')}"
        else:
            outer = name if name.startswith("lm_head") else f"model.{name}"
        stem, _, last = outer.rpartition(".")
        if last in _STACKS:
            for i, expert in enumerate(value):
                yield f"{stem}.experts.{i}.{_STACKS[last]}.weight", expert.contiguous()
        else:
            yield outer, value
    yield f"{draft}.embed_tokens.weight", model.embed_tokens.weight.detach().clone()
    yield f"{draft}.shared_head.head.weight", model.lm_head.weight.detach().clone()


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight: [rows, columns] -> the same in float8, and scales, a block each; edges may be short.

    A weight is its float8 value times its block's scale, as DeepSeek-V3's `weight_scale_inv`.
    """
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // BLOCK), -(-columns // BLOCK))
    quantized = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            scales[i, j] = weight[block].float().abs().max().clamp(min=1e-12) / _LARGEST
            quantized[block] = (weight[block].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return quantized, scales


def dequantize(quantized: Tensor, scales: Tensor) -> Tensor:
    """float32 [rows, columns]."""
    rows, columns = quantized.shape
    spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return quantized.float() * spread[:rows, :columns]


def load(folder: Path) -> TinyDeepseek:
    """The model of an exported folder. Raises KeyError if a weight is missing."""
    config = json.loads((folder / "config.json").read_text())
    model = TinyDeepseek(shape_of(config))
    with safe_open(folder / WEIGHTS, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with torch.no_grad():
        for name, place in released_places(model):
            value, scales = stored[name], stored.get(name + "_scale_inv")
            place.copy_(value if scales is None else dequantize(value, scales))
    return model.eval()


def released_places(model: TinyDeepseek) -> Iterator[tuple[str, Tensor]]:
    """As `released`, but what can be written to; without the MTP layer's copies."""
    copies = (".shared_head.head.", f".{model.shape.layers}.embed_tokens.")
    return (pair for pair in released(model) if not any(c in pair[0] for c in copies))


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape that a config.json of `Shape.config` says."""
    names = {
        "vocabulary": "vocab_size",
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "dense_layers": "first_k_dense_replace",
        "heads": "num_attention_heads",
        "query_rank": "q_lora_rank",
        "latent_rank": "kv_lora_rank",
        "nope": "qk_nope_head_dim",
        "rope": "qk_rope_head_dim",
        "value": "v_head_dim",
        "dense_width": "intermediate_size",
        "expert_width": "moe_intermediate_size",
        "experts": "n_routed_experts",
        "shared_experts": "n_shared_experts",
        "chosen": "num_experts_per_tok",
        "groups": "n_group",
        "kept_groups": "topk_group",
        "routed_scale": "routed_scaling_factor",
        "epsilon": "rms_norm_eps",
        "theta": "rope_theta",
    }
    scaling = config["rope_scaling"]
    return Shape(
        **{ours: config[theirs] for ours, theirs in names.items()},
        trained_context=scaling["original_max_position_embeddings"],
        context_factor=scaling["factor"],
    )
