"""LoRA adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors.

What the weights' file holds decides what an adapter changes: a tensor that isn't a LoRA matrix of a
module that takes one is refused by its name, and so is each setting that would change the
computation otherwise. (https://huggingface.co/docs/peft/developer_guides/checkpoint)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from services.engine.adapters import CONFIG, WEIGHTS, AdapterFiles, AdapterLimits
from services.engine.models.errors import UnsupportedAdapterError
from services.runtime.errors import AdapterLimitError

PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"
_LARGEST = torch.finfo(torch.float32).max
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# What each of these must be, if it is there: else the adapter is more than its two matrices.
_EXPECTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "megatron_config": (None,),
}
# Ways to begin that change the base model's weights, too.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PATTERN_KEY = re.compile(r"[A-Za-z0-9_.]+")
# Modules of models that are computed here, but not by layers that can be added to.
_ELSEWHERE = {
    ".experts.": "experts' layers take no adapters",
    ".kv_b_proj": "it is absorbed into the attention",
    ".mlp.gate.": "the router takes no adapters",
    ".shared_expert_gate.": "the router takes no adapters",
    "embed_tokens": "embeddings take no adapters",
}


@dataclass(frozen=True, slots=True)
class LoraModule:
    """A module's matrices, float32: down [rank, inputs] is A, up [outputs, rank] is B."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Of the two."""
        return self.down.shape[0]


def read_modules(
    files: AdapterFiles, shapes: Mapping[str, tuple[int, int]], limits: AdapterLimits
) -> dict[str, LoraModule]:
    """By module name. `shapes`: inputs and outputs of each module that can be added to.

    Raises UnsupportedAdapterError, and AdapterLimitError for too high a rank.
    """
    config = _config(files.config)
    tensors = _tensors(files.weights)
    names = sorted({_module(key, shapes) for key in tensors})
    found = {}
    for name in names:
        rank = _ranks(config, name)
        if rank > limits.rank:
            raise AdapterLimitError(
                f"{name} has rank {rank}; engine.max_adapter_rank is {limits.rank}", rank=rank
            )
        inputs, outputs = shapes[name]
        down = _matrix(tensors, name + A, rank, inputs)
        up = _matrix(tensors, name + B, outputs, rank)
        found[name] = LoraModule(down, up, _scale(config, name, rank))
    if not found:
        raise UnsupportedAdapterError(f"{WEIGHTS} has no LoRA matrices")
    return found


def _config(raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UnsupportedAdapterError(f"{CONFIG}: {error}") from None
    if not isinstance(found, dict):
        raise UnsupportedAdapterError(f"{CONFIG}: expected an object")
    if "peft_type" not in found:
        raise _refused("peft_type", None, "'LORA'")
    for key, allowed in _EXPECTED.items():
        if key in found and found[key] not in allowed:
            raise _refused(key, found[key], repr(allowed[0]))
    way = found.get("init_lora_weights")
    if isinstance(way, str) and way.lower().startswith(_CHANGE_THE_BASE):
        raise _refused("init_lora_weights", way, "one that leaves the base model as it is")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = found.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(_PATTERN_KEY.fullmatch, pattern)):
            raise _refused(key, pattern, "names of modules, or ends of them, and no expressions")
    return found


def _tensors(raw: bytes) -> dict[str, torch.Tensor]:
    """By name, PEFT's prefix taken off."""
    try:
        found = load(raw)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UnsupportedAdapterError(f"{WEIGHTS}: {error}") from None
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in found.items()}
    if len(tensors) < len(found):
        twice = next(name for name in found if PREFIX + name in found)
        raise UnsupportedAdapterError(f"{WEIGHTS}: {twice} is there twice", tensor=twice)
    return tensors


def _module(key: str, shapes: Mapping[str, tuple[int, int]]) -> str:
    """The module that a tensor is of."""
    name = next((key.removesuffix(end) for end in (A, B) if key.endswith(end)), None)
    if name is None:
        raise UnsupportedAdapterError(f"{WEIGHTS}: {key} is not a LoRA matrix", tensor=key)
    if name not in shapes:
        why = next((why for part, why in _ELSEWHERE.items() if part in f"{name}."), "")
        why = why or "the model has no such module"
        raise UnsupportedAdapterError(f"{WEIGHTS}: {name}: {why}", module=name)
    return name


def _matrix(tensors: Mapping[str, torch.Tensor], key: str, rows: int, columns: int) -> torch.Tensor:
    found = tensors.get(key)
    if found is None:
        raise UnsupportedAdapterError(f"{WEIGHTS}: no tensor {key}", tensor=key)
    if found.dtype not in FLOATS or tuple(found.shape) != (rows, columns):
        raise UnsupportedAdapterError(
            f"{WEIGHTS}: {key}: {found.dtype} {tuple(found.shape)}, expected floats "
            f"({rows}, {columns}) by {CONFIG} and the model",
            tensor=key,
        )
    found = found.to(torch.float32)
    if not bool(torch.isfinite(found).all()):
        raise UnsupportedAdapterError(f"{WEIGHTS}: {key}: not all are numbers", tensor=key)
    return found


def _ranks(config: Mapping[str, Any], module: str) -> int:
    rank = _patterned(config, "rank_pattern", module, config.get("r"))
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise _refused("r", rank, "a whole number above 0")
    return rank


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What B(A x) is multiplied by: alpha / r, or alpha / sqrt(r) (arXiv 2312.03732)."""
    alpha = _patterned(config, "alpha_pattern", module, config.get("lora_alpha"))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) <= _LARGEST:
        raise _refused("lora_alpha", alpha, "a number that float32 holds")
    stabilized = config.get("use_rslora", False)
    if not isinstance(stabilized, bool):
        raise _refused("use_rslora", stabilized, "true or false")
    return alpha / (math.sqrt(rank) if stabilized else rank)


def _patterned(config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """The value for a module: that of the first name that it ends with."""
    for name, value in (config.get(key) or {}).items():
        if f".{module}".endswith(f".{name}"):
            return value
    return default


def _refused(key: str, value: object, allowed: str) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(
        f"{CONFIG}: {key}={value!r} is not supported; expected {allowed}", key=key, value=value
    )
