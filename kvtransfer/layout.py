"""What the bytes of a KV block mean, and a fingerprint to compare before the first one moves.

A block holds `block_tokens` tokens of every layer. Its bytes are layer after layer; a layer's are
component after component; a component's are a C-contiguous array [block_tokens, heads, width],
starting at a multiple of 64 bytes. So any range of layers is one contiguous piece of a block.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

ALIGNMENT = 64

DTYPE_BYTES = {"fp8_e4m3": 1, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Component:
    """One array of a layer: [block_tokens, heads, width] of dtype."""

    name: str
    dtype: str
    heads: int
    width: int

    def nbytes(self, block_tokens: int) -> int:
        """Bytes of data in one block and layer, padding not counted."""
        return block_tokens * self.heads * self.width * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The layout of every block in a pool. Equal fingerprints mean interchangeable bytes."""

    model: str
    layers: int
    block_tokens: int
    components: tuple[Component, ...]
    shard: int = 0
    shards: int = 1

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer of a block, padding included."""
        return sum(_padded(c.nbytes(self.block_tokens)) for c in self.components)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.layers * self.layer_bytes

    @property
    def token_bytes(self) -> float:
        """Bytes a token costs, over all layers, padding included."""
        return self.block_bytes / self.block_tokens

    def component_offset(self, name: str) -> int:
        """Bytes from the start of a layer to a component. Raises KeyError."""
        offset = 0
        for component in self.components:
            if component.name == name:
                return offset
            offset += _padded(component.nbytes(self.block_tokens))
        raise KeyError(name)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return math.ceil(tokens / self.block_tokens)

    def fields(self) -> dict[str, str]:
        """The layout in words, for error messages that name what differs."""
        return {
            "model": self.model,
            "layers": str(self.layers),
            "block_tokens": str(self.block_tokens),
            "components": ", ".join(
                f"{c.name}: {c.dtype} {c.heads}x{c.width}" for c in self.components
            ),
            "shard": f"{self.shard} of {self.shards}",
        }

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits of BLAKE2b over every field."""
        text = "\n".join(f"{k}={v}" for k, v in self.fields().items())
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def gqa_layout(
    model: str, *, layers: int, kv_heads: int, head_dim: int, dtype: str, block_tokens: int
) -> KvLayout:
    """K and V of grouped-query attention. fp8_e4m3 has a float32 scale for each token and head.

    Components: k and v [block_tokens, kv_heads, head_dim], with fp8 also k_scale and v_scale
    [block_tokens, kv_heads, 1].
    """
    parts = [Component("k", dtype, kv_heads, head_dim), Component("v", dtype, kv_heads, head_dim)]
    if dtype == "fp8_e4m3":
        parts += [Component(n, "float32", kv_heads, 1) for n in ("k_scale", "v_scale")]
    return KvLayout(model, layers, block_tokens, tuple(parts))


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
