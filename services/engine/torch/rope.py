"""Rotary position embedding: frequencies, how they are scaled, and tables of cosines and sines."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from services.engine.torch.fields import Found, flag, number, unsupported, whole

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding: `theta`, and how its frequencies are scaled.

    kind "default": not at all; "linear": all by 1 / factor; "llama3": those with wavelengths
    beyond original_positions / low by 1 / factor, those within original_positions / high not, and
    a ramp between; "yarn" (arXiv 2309.00071): the same with a ramp over dimensions, between those
    that turn beta_fast and beta_slow times in original_positions.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    whole_dimensions: bool = True
    """yarn: the ramp's ends are rounded to whole dimensions."""
    magnitude: float = 1.0
    """yarn: cosines and sines are multiplied by it."""
    all_dimensions: float = 1.0
    """yarn: its factor for whole queries and keys (mscale_all_dim). DeepSeek's attention multiplies
    scores by the square."""


def read_rope(found: Found) -> Rope:
    """From `rope_parameters` (newer) or `rope_theta` and `rope_scaling`."""
    given = dict(found.get("rope_scaling") or {})
    given.update(found.get("rope_parameters") or {})
    theta = number({"rope_theta": found.get("rope_theta") or 10000.0, **given}, "rope_theta")
    kind = given.get("rope_type", given.get("type", "default"))
    partial = given.get("partial_rotary_factor", found.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise unsupported("partial_rotary_factor", partial, "1.0")
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, factor=number(given, "factor"))
    if kind == "yarn":
        return _read_yarn(given, theta)
    if kind != "llama3":
        raise unsupported("rope_type", kind, "default, linear, llama3 or yarn")
    return Rope(
        theta,
        kind,
        factor=number(given, "factor"),
        low=number(given, "low_freq_factor"),
        high=number(given, "high_freq_factor"),
        original_positions=whole(given, "original_max_position_embeddings"),
    )


def _read_yarn(given: Found, theta: float) -> Rope:
    factor = number(given, "factor")
    mscale, all_dimensions = given.get("mscale"), given.get("mscale_all_dim")
    magnitude = _mscale(factor, 1.0)
    if mscale and all_dimensions:
        magnitude = _mscale(factor, number(given, "mscale"))
        magnitude /= _mscale(factor, number(given, "mscale_all_dim"))
    return Rope(
        theta,
        "yarn",
        factor=factor,
        original_positions=whole(given, "original_max_position_embeddings"),
        beta_fast=number(given, "beta_fast", 32.0),
        beta_slow=number(given, "beta_slow", 1.0),
        whole_dimensions=flag(given, "truncate", default=True),
        magnitude=number(given, "attention_factor", magnitude),
        all_dimensions=_mscale(factor, float(all_dimensions)) if all_dimensions else 1.0,
    )


def _mscale(factor: float, weight: float) -> float:
    """What attention's numbers must grow by with a context `factor` times as long."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def scaled_frequencies(frequencies: list[float], rope: Rope) -> list[float]:
    """Rotary frequencies (radians a position) after scaling: see Rope."""
    if rope.kind == "linear":
        return [f / rope.factor for f in frequencies]
    if rope.kind == "llama3":
        return [_llama3(f, rope) for f in frequencies]
    if rope.kind == "yarn":
        return _yarn(frequencies, rope)
    return frequencies


def _llama3(frequency: float, rope: Rope) -> float:
    turns = rope.original_positions * frequency / (2 * math.pi)
    if turns < rope.low:
        return frequency / rope.factor
    if turns > rope.high:
        return frequency
    share = (turns - rope.low) / (rope.high - rope.low)
    return (1 - share) * frequency / rope.factor + share * frequency


def _yarn(frequencies: list[float], rope: Rope) -> list[float]:
    width = 2 * len(frequencies)

    def dimension(turns: float) -> float:
        """Which pair of dimensions turns so many times in the original positions."""
        longest = rope.original_positions / (turns * 2 * math.pi)
        return width * math.log(longest) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.whole_dimensions:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    shares = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(len(frequencies))]
    return [
        f / rope.factor * share + f * (1 - share)
        for f, share in zip(frequencies, shares, strict=True)
    ]


def rotary_tables(rope: Rope, width: int, positions: int) -> tuple[Floats, Floats]:
    """Cosines and sines float32 [positions, width / 2].

    Frequencies and angles are rounded to float32 as Hugging Face does, since that is what models
    were trained with; the functions themselves are taken in float64, where libraries agree.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.int64).float() / width
    plain = (1.0 / rope.theta**exponents).tolist()
    frequencies = np.array(scaled_frequencies(plain, rope), np.float32)
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies
    exact = angles.astype(np.float64)
    cosines, sines = np.cos(exact) * rope.magnitude, np.sin(exact) * rope.magnitude
    return cosines.astype(np.float32), sines.astype(np.float32)
