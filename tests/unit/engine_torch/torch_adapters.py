"""Random LoRA adapters in PEFT's folders, and models with one merged into their weights."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from services.engine.adapters import AdapterLimits, read_files

LIMITS = AdapterLimits(count=8, rank=64, bytes=2**24)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def write(
    folder: Path,
    model: Path,
    targets: tuple[str, ...],
    *,
    seed: int = 0,
    rank: int = 8,
    dtype: torch.dtype = torch.float32,
    skip: tuple[str, ...] = (".experts.",),
    **config: object,
) -> Path:
    """An adapter for the modules of a model's folder whose names end with one of `targets`."""
    random = np.random.default_rng(seed)
    given = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, **config}
    found = {}
    for key, weight in load_file(model / "model.safetensors").items():
        name = key.removesuffix(".weight")
        if not name.endswith(targets) or any(part in name for part in skip):
            continue
        own = pattern(given, "rank_pattern", name, rank)
        for end, shape in (("A", (own, weight.shape[1])), ("B", (weight.shape[0], own))):
            values = random.standard_normal(shape) / math.sqrt(shape[1] * 2)
            tensor = torch.from_numpy(values.astype(np.float32)).to(dtype)
            found[f"base_model.model.{name}.lora_{end}.weight"] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    save_file(found, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(given))
    return folder


def pattern(config: dict, key: str, name: str, default: float) -> float:
    """As PEFT does it, for plain names."""
    some = config.get(key) or {}
    return next((v for k, v in some.items() if f".{name}".endswith(f".{k}")), default)


def merge(out: Path, model: Path, adapter: Path) -> Path:
    """The model with W + scale * B @ A in the place of each W."""
    shutil.copytree(model, out)
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights = load_file(model / "model.safetensors")
    matrices = load_file(adapter / "adapter_model.safetensors")
    for key in [k for k in matrices if k.endswith(".lora_A.weight")]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        down, up = matrices[key].double(), matrices[key.replace("lora_A", "lora_B")].double()
        rank = down.shape[0]
        alpha = pattern(config, "alpha_pattern", name, config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        old = weights[f"{name}.weight"]
        weights[f"{name}.weight"] = (old.double() + scale * up @ down).to(old.dtype)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def load(model, name: str, folder: Path) -> str:
    """Loads an adapter into a TorchModel; its id."""
    adapter, weights = model.adapters.read(read_files(name, folder, LIMITS), LIMITS)
    model.adapters.put(adapter.id, weights)
    return adapter.id
