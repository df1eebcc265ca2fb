"""What a Llama-family model is made of, from the config.json of its Hugging Face folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.engine.models.errors import UnsupportedModelError

# The kernels work on vectors of sixteen, and rotate heads by halves.
VECTOR = 16
LEAST_HEAD_DIM = 32
MOST_GROUP = 64


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding: `theta`, and how its frequencies are scaled.

    kind "default": not at all; "linear": all by 1 / factor; "llama3": those with wavelengths
    beyond original_positions / low by 1 / factor, those within original_positions / high not, and
    a ramp between.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shapes and constants of a Llama-family model."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    positions: int
    norm_epsilon: float
    rope: Rope
    tied_embeddings: bool
    attention_bias: bool
    mlp_bias: bool

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    @classmethod
    def from_folder(cls, path: Path) -> ModelConfig:
        """Reads `path`/config.json. Raises UnsupportedModelError, which names the key."""
        file = path / "config.json"
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise UnsupportedModelError(f"{file}: {error}", file=file) from error
        return cls.from_dict(found)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> ModelConfig:
        """From the content of a config.json."""
        _expect(found, "architectures", ["LlamaForCausalLM"], ["LlamaForCausalLM"])
        _expect(found, "hidden_act", "silu", "silu")
        heads = _whole(found, "num_attention_heads")
        hidden = _whole(found, "hidden_size")
        config = cls(
            vocabulary=_whole(found, "vocab_size"),
            hidden=hidden,
            intermediate=_whole(found, "intermediate_size"),
            layers=_whole(found, "num_hidden_layers"),
            heads=heads,
            kv_heads=_whole(found, "num_key_value_heads", heads),
            head_dim=_whole(found, "head_dim", hidden // heads),
            positions=_whole(found, "max_position_embeddings", 2048),
            norm_epsilon=_number({"rms_norm_eps": 1e-6, **found}, "rms_norm_eps"),
            rope=_rope(found),
            tied_embeddings=bool(found.get("tie_word_embeddings", False)),
            attention_bias=bool(found.get("attention_bias", False)),
            mlp_bias=bool(found.get("mlp_bias", False)),
        )
        config._check()
        return config

    def _check(self) -> None:
        for name, value in (("hidden_size", self.hidden), ("intermediate_size", self.intermediate)):
            if value % VECTOR:
                raise _unsupported(name, value, f"a multiple of {VECTOR}")
        if self.head_dim % VECTOR or self.head_dim < LEAST_HEAD_DIM:
            allowed = f"a multiple of {VECTOR}, at least {LEAST_HEAD_DIM}"
            raise _unsupported("head_dim", self.head_dim, allowed)
        if self.heads % self.kv_heads or self.group > MOST_GROUP:
            allowed = f"a divisor of num_attention_heads={self.heads}, at most {MOST_GROUP} times"
            raise _unsupported("num_key_value_heads", self.kv_heads, allowed)


def _unsupported(key: str, value: object, allowed: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"config.json: {key}={value!r} is not supported; expected {allowed}", key=key, value=value
    )


def _expect(found: Mapping[str, Any], key: str, default: object, allowed: object) -> None:
    value = found.get(key, default)
    if value != allowed:
        raise _unsupported(key, value, repr(allowed))


def _whole(found: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = found.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _unsupported(key, value, "a whole number above 0")
    return value


def _rope(found: Mapping[str, Any]) -> Rope:
    """From `rope_parameters` (newer) or `rope_theta` and `rope_scaling`."""
    given = dict(found.get("rope_scaling") or {})
    given.update(found.get("rope_parameters") or {})
    theta = _number({"rope_theta": found.get("rope_theta") or 10000.0, **given}, "rope_theta")
    kind = given.get("rope_type", given.get("type", "default"))
    partial = given.get("partial_rotary_factor", found.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise _unsupported("partial_rotary_factor", partial, "1.0")
    if kind == "default":
        return Rope(theta)
    if kind not in ("linear", "llama3"):
        raise _unsupported("rope_type", kind, "default, linear or llama3")
    if kind == "linear":
        return Rope(theta, kind, factor=_number(given, "factor"))
    return Rope(
        theta,
        kind,
        factor=_number(given, "factor"),
        low=_number(given, "low_freq_factor"),
        high=_number(given, "high_freq_factor"),
        original_positions=_whole(given, "original_max_position_embeddings"),
    )


def _number(found: Mapping[str, Any], key: str) -> float:
    value = found.get(key)
    if not isinstance(value, int | float) or not value > 0:
        raise _unsupported(key, value, "a number above 0")
    return float(value)


def scaled_frequencies(frequencies: list[float], rope: Rope) -> list[float]:
    """Rotary frequencies (radians a position) after scaling: see Rope."""
    if rope.kind == "linear":
        return [f / rope.factor for f in frequencies]
    if rope.kind == "llama3":
        return [_llama3(f, rope) for f in frequencies]
    return frequencies


def _llama3(frequency: float, rope: Rope) -> float:
    turns = rope.original_positions * frequency / (2 * math.pi)
    if turns < rope.low:
        return frequency / rope.factor
    if turns > rope.high:
        return frequency
    share = (turns - rope.low) / (rope.high - rope.low)
    return (1 - share) * frequency / rope.factor + share * frequency
