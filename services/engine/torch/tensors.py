"""Tensors of a Hugging Face folder: model.safetensors, or several files with an index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from services.engine.models.errors import UnsupportedModelError

SCALES = "_scale_inv"


class TensorFiles:
    """Tensors by name, each read when it is asked for.

    block: rows and columns of an FP8 weight that share a scale.
    """

    def __init__(self, folder: Path, block: tuple[int, int] = (128, 128)) -> None:
        self._folder = folder
        self._block = block
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

    def _bad(self, name: str, why: str) -> UnsupportedModelError:
        file = self._folder / self._where[name]
        return UnsupportedModelError(f"{file}: {name}: {why}", file=file, tensor=name)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def get(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor of exactly this shape. Raises UnsupportedModelError."""
        if name not in self._where:
            raise UnsupportedModelError(f"{self._folder}: no tensor {name}", tensor=name)
        found: torch.Tensor = self._open(self._where[name]).get_tensor(name)
        if tuple(found.shape) != shape:
            raise self._bad(name, f"shape {tuple(found.shape)}, expected {shape} by config.json")
        return found

    def matrix(
        self,
        name: str,
        outputs: int,
        inputs: int,
        dtype: torch.dtype,
        here: range | None = None,
    ) -> torch.Tensor:
        """A weight [outputs, inputs]; one of FP8 times its blocks' scales. Raises as get() does.

        here: of these outputs alone.
        """
        here = range(outputs) if here is None else here
        found = self.get(name, outputs, inputs)[here.start : here.stop]
        if found.dtype != torch.float8_e4m3fn:
            if not found.dtype.is_floating_point or found.element_size() < 2:
                raise self._bad(name, f"{found.dtype} is not read")
            return found.to(dtype)
        rows, columns = self._block
        shape = -(-outputs // rows), -(-inputs // columns)
        scales = self.get(name + SCALES, *shape)
        return _times_blocks(found, scales, self._block, here.start).to(dtype)


def _times_blocks(
    codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], first: int
) -> torch.Tensor:
    """Float32 [rows, columns]; scales [blocks down, blocks across], the last ones may be cut.

    Of a weight from its row `first` on.
    """
    found = codes.float()
    rows, columns = block
    for i in range(first // rows, -(-(first + len(found)) // rows)):
        found[max(0, i * rows - first) : (i + 1) * rows - first] *= (
            scales[i].float().repeat_interleave(columns)[: found.shape[1]]
        )
    return found
