"""What the coordinator says of a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that some worker serves; fields as in coordinator.proto."""

    name: str
    kv_layout: str
    block_tokens: int
    context_tokens: int
    prefill_workers: int
    decode_workers: int
