"""A model's weights, from a Hugging Face folder: model.safetensors, or several with an index."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from services.engine.models.errors import UnsupportedModelError
from services.engine.torch.config import ModelConfig
from services.engine.torch.kernels.linear import Linear

# Rows that the head computes at once, at most: probing it with many would take long.
HEAD_ROWS = 64


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: norms float32 [hidden]; q, k and v are one linear layer, gate and up another."""

    attention_norm: torch.Tensor
    qkv: Linear
    output: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All four."""
        return self.qkv, self.output, self.gate_up, self.down


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """Embedding [vocabulary, hidden], layers, last norm float32 [hidden], head."""

    embedding: torch.Tensor
    layers: tuple[Layer, ...]
    norm: torch.Tensor
    head: Linear

    @property
    def shapes(self) -> Iterator[Linear]:
        """A linear layer of every shape there is."""
        yield from {(x.inputs, x.outputs): x for x in (*self.layers[0].linears, self.head)}.values()


class TensorFiles:
    """Tensors by name, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._where = self._index()

    def _index(self) -> dict[str, str]:
        """File name by tensor name."""
        index = self._folder / "model.safetensors.index.json"
        if index.exists():
            found: dict[str, str] = json.loads(index.read_text())["weight_map"]
            return found
        single = "model.safetensors"
        if not (self._folder / single).exists():
            raise UnsupportedModelError(
                f"{self._folder}: has neither {single} nor {index.name}", folder=self._folder
            )
        return dict.fromkeys(self._open(single).keys(), single)

    def _open(self, name: str) -> Any:
        if name not in self._files:
            try:
                self._files[name] = safe_open(str(self._folder / name), framework="pt")
            except Exception as error:  # safetensors has its own, OSError apart
                raise UnsupportedModelError(f"{self._folder / name}: {error}") from error
        return self._files[name]

    def get(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor of exactly this shape. Raises UnsupportedModelError."""
        if name not in self._where:
            raise UnsupportedModelError(f"{self._folder}: no tensor {name}", tensor=name)
        found: torch.Tensor = self._open(self._where[name]).get_tensor(name)
        if tuple(found.shape) != shape:
            raise UnsupportedModelError(
                f"{name}: shape {tuple(found.shape)}, expected {shape} by config.json", tensor=name
            )
        return found


def load_weights(
    folder: Path, config: ModelConfig, dtype: torch.dtype, *, packed: bool
) -> ModelWeights:
    """Reads, converts, joins and lays out everything. Raises UnsupportedModelError."""
    files = TensorFiles(folder)
    embedding = files.get("model.embed_tokens.weight", config.vocabulary, config.hidden)
    head = embedding
    if not config.tied_embeddings:
        head = files.get("lm_head.weight", config.vocabulary, config.hidden)
    return ModelWeights(
        # Copies, so that nothing refers to the mapped files when all is read.
        embedding=embedding.to(dtype, copy=True),
        layers=tuple(_layer(files, config, i, dtype, packed) for i in range(config.layers)),
        norm=files.get("model.norm.weight", config.hidden).to(torch.float32, copy=True),
        head=Linear(head.to(dtype, copy=True), None, packed=packed, most_rows=HEAD_ROWS),
    )


def _layer(
    files: TensorFiles, config: ModelConfig, index: int, dtype: torch.dtype, packed: bool
) -> Layer:
    prefix = f"model.layers.{index}."

    def norm(name: str) -> torch.Tensor:
        return files.get(f"{prefix}{name}.weight", config.hidden).to(torch.float32, copy=True)

    def linear(block: str, parts: dict[str, int], inputs: int, bias: bool) -> Linear:
        names = {f"{prefix}{block}.{part}_proj": outputs for part, outputs in parts.items()}
        weight = [files.get(f"{name}.weight", outputs, inputs) for name, outputs in names.items()]
        offset = None
        if bias:
            found = [files.get(f"{name}.bias", outputs) for name, outputs in names.items()]
            offset = torch.cat(found).to(dtype)
        return Linear(torch.cat(weight).to(dtype), offset, packed=packed)

    q = config.heads * config.head_dim
    kv = config.kv_heads * config.head_dim
    hidden, wide = config.hidden, config.intermediate
    with_bias, mlp_bias = config.attention_bias, config.mlp_bias
    return Layer(
        attention_norm=norm("input_layernorm"),
        qkv=linear("self_attn", {"q": q, "k": kv, "v": kv}, hidden, with_bias),
        output=linear("self_attn", {"o": hidden}, q, with_bias),
        mlp_norm=norm("post_attention_layernorm"),
        gate_up=linear("mlp", {"gate": wide, "up": wide}, hidden, mlp_bias),
        down=linear("mlp", {"down": hidden}, wide, mlp_bias),
    )
