"""What the bytes of a KV block mean, and a fingerprint to compare before the first one moves.

A block holds `block_tokens` tokens of every layer. Its bytes are layer after layer; so any range of
layers is one contiguous piece of a block. A layer's are in one of two orders:

    by component  each component is a C-contiguous array [block_tokens, heads, width], starting at
                  a multiple of 64 bytes
    by token      (`interleaved`) token after token, without padding; a token has its values of
                  each component next to each other

Tandem's engine reads arrays, by component. Kernels that load a token's latent, scales and rotary
values with one address (FlashMLA, vLLM's fp8_ds_mla) have them by token. The bytes are the same
values in both, the count of them too; converting moves them (conversion.py).
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass, replace

ALIGNMENT = 64

DTYPE_BYTES = {"fp8_e4m3": 1, "bfloat16": 2, "float32": 4}

SCALE = "_scale"
"""The scales of component "k" are component "k_scale"."""

_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Component:
    """Values of a layer: `heads` x `width` of dtype for each token."""

    name: str
    dtype: str
    heads: int
    """Heads of this shard."""
    width: int
    total_heads: int = 0
    """Heads over all shards; 0 stands for `heads`. Fewer than shards: some hold the same ones."""
    scale: float | None = None
    """fp8_e4m3 only: what all codes are to be multiplied by, where no component has the scales."""

    def __post_init__(self) -> None:
        if not self.total_heads:
            object.__setattr__(self, "total_heads", self.heads)

    @property
    def token_bytes(self) -> int:
        """Bytes a token takes, padding not counted."""
        return self.heads * self.width * DTYPE_BYTES[self.dtype]

    def nbytes(self, block_tokens: int) -> int:
        """Bytes of data in one block and layer, padding not counted."""
        return block_tokens * self.token_bytes

    def __str__(self) -> str:
        text = f"{self.name}: {self.dtype} {self.heads}x{self.width}"
        if self.total_heads != self.heads:
            text += f" of {self.total_heads}"
        return text if self.scale is None else f"{text} times {self.scale!r}"


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The layout of every block in a pool. Equal fingerprints mean interchangeable bytes.

    Raises ValueError that names the field for one that can't be.
    """

    model: str
    layers: int
    block_tokens: int
    components: tuple[Component, ...]
    shard: int = 0
    shards: int = 1
    interleaved: bool = False
    """By token instead of by component."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer of a block, padding included."""
        if self.interleaved:
            return _padded(self.block_tokens * self._record_bytes)
        return sum(_padded(c.nbytes(self.block_tokens)) for c in self.components)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.layers * self.layer_bytes

    @property
    def token_bytes(self) -> float:
        """Bytes a token costs, over all layers, padding included."""
        return self.block_bytes / self.block_tokens

    def component(self, name: str) -> Component:
        """By its name. Raises KeyError."""
        for component in self.components:
            if component.name == name:
                return component
        raise KeyError(name)

    def component_offset(self, name: str) -> int:
        """Bytes from the start of a layer to a component's first value. Raises KeyError."""
        offset = 0
        for component in self.components:
            if component.name == name:
                return offset
            size = component.token_bytes
            offset += size if self.interleaved else _padded(size * self.block_tokens)
        raise KeyError(name)

    def token_stride(self, name: str) -> int:
        """Bytes from a token's values of a component to the next token's. Raises KeyError."""
        return self._record_bytes if self.interleaved else self.component(name).token_bytes

    def first_head(self, name: str) -> int:
        """Which of the model's heads is the first one here. Raises KeyError.

        Heads are dealt out in order. Where there are more shards than heads, neighbours share:
        with 2 heads, shards 0 and 1 of 4 hold head 0.
        """
        component = self.component(name)
        if component.total_heads >= self.shards:
            return self.shard * component.heads
        return self.shard * component.total_heads // self.shards

    def sharded(self, shard: int, shards: int) -> KvLayout:
        """What one of `shards` tensor-parallel workers holds of this, the layout of all heads.

        A component of one head, as MLA's are, is held by every one of them. Raises ValueError.
        """
        if self.shards != 1:
            raise ValueError(f"shards: this is already shard {self.shard} of {self.shards}")
        if shards < 1:
            raise ValueError(f"shards: {shards}, expected at least 1")
        parts = tuple(replace(c, heads=max(1, c.heads // shards)) for c in self.components)
        return replace(self, components=parts, shard=shard, shards=shards)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return math.ceil(tokens / self.block_tokens)

    def fields(self) -> dict[str, str]:
        """The layout in words, for error messages that name what differs."""
        return {
            "model": self.model,
            "layers": str(self.layers),
            "block_tokens": str(self.block_tokens),
            "components": ", ".join(map(str, self.components)),
            "shard": f"{self.shard} of {self.shards}",
            "order": "by token" if self.interleaved else "by component",
        }

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits of BLAKE2b over every field."""
        fields = self.fields()
        # Layouts had no order at first, and all of them were by component.
        if not self.interleaved:
            del fields["order"]
        text = "\n".join(f"{k}={v}" for k, v in fields.items())
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def _record_bytes(self) -> int:
        return sum(c.token_bytes for c in self.components)


def gqa_layout(
    model: str, *, layers: int, kv_heads: int, head_dim: int, dtype: str, block_tokens: int
) -> KvLayout:
    """K and V of grouped-query attention. fp8_e4m3 has a float32 scale for each token and head.

    Components: k and v [block_tokens, kv_heads, head_dim], with fp8 also k_scale and v_scale
    [block_tokens, kv_heads, 1]. Raises ValueError that names the field.
    """
    parts = [Component("k", dtype, kv_heads, head_dim), Component("v", dtype, kv_heads, head_dim)]
    if dtype == "fp8_e4m3":
        parts += [Component(n, "float32", kv_heads, 1) for n in ("k_scale", "v_scale")]
    return KvLayout(model, layers, block_tokens, tuple(parts))


def mla_layout(
    model: str,
    *,
    layers: int,
    dtype: str,
    block_tokens: int,
    latent: int = 512,
    rope: int = 64,
    scale_values: int = 128,
    interleaved: bool = False,
) -> KvLayout:
    """Latent and rotary values of multi-head latent attention, which all heads share.

    fp8_e4m3 has a float32 scale for every `scale_values` latent values, and keeps the rotary ones
    in bfloat16: with the defaults, DeepSeek's, 512 + 4 * 4 + 64 * 2 = 656 bytes a token and
    layer, in the order of FlashMLA and vLLM's fp8_ds_mla with `interleaved`. bfloat16: 1152.

    Components: latent [block_tokens, 1, latent], with fp8 latent_scale [block_tokens, 1,
    latent / scale_values], rope [block_tokens, 1, rope]. Count the layer of multi-token
    prediction in `layers` where its KV travels. Raises ValueError that names the field.
    """
    parts = [Component("latent", dtype, 1, latent)]
    if dtype == "fp8_e4m3":
        if scale_values < 1 or latent % scale_values:
            raise ValueError(f"scale_values: {scale_values} does not divide latent, {latent}")
        parts.append(Component("latent_scale", "float32", 1, latent // scale_values))
    kept = "bfloat16" if dtype == "fp8_e4m3" else dtype
    parts.append(Component("rope", kept, 1, rope))
    return KvLayout(model, layers, block_tokens, tuple(parts), interleaved=interleaved)


def mla_one_scale_layout(
    model: str, *, layers: int, block_tokens: int, scale: float, latent: int = 512, rope: int = 64
) -> KvLayout:
    """MLA all in fp8_e4m3 with one scale, which is a constant of the model: TensorRT-LLM's FP8.

    576 bytes a token and layer, by token. The scale is part of the fingerprint. Codes under a
    fixed scale have no bound on their error (they saturate), so nothing is converted to or from
    this layout but its block tokens. Raises ValueError that names the field.
    """
    parts = [
        Component(n, "fp8_e4m3", 1, w, 1, scale) for n, w in (("latent", latent), ("rope", rope))
    ]
    return KvLayout(model, layers, block_tokens, tuple(parts), interleaved=True)


def _check(layout: KvLayout) -> None:
    """Raises ValueError that names the field."""
    for field in ("layers", "block_tokens", "shards"):
        if getattr(layout, field) < 1:
            raise ValueError(f"{field}: {getattr(layout, field)}, expected at least 1")
    if not 0 <= layout.shard < layout.shards:
        raise ValueError(f"shard: {layout.shard}, expected 0 to {layout.shards - 1}")
    # The fingerprint is taken over lines of text.
    if not layout.model.isprintable():
        raise ValueError(f"model: {layout.model!r} is not printable")
    names = [c.name for c in layout.components]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"components: {names}, expected different names, one at least")
    for component in layout.components:
        _check_component(layout, component)
        _check_scales(layout, component)


def _check_component(layout: KvLayout, component: Component) -> None:
    where = f"components: {component.name!r}"
    if not _NAME.fullmatch(component.name):
        raise ValueError(f"{where}: expected a name of small letters, digits and _")
    if component.dtype not in DTYPE_BYTES:
        expected = ", ".join(DTYPE_BYTES)
        raise ValueError(f"{where}: dtype {component.dtype!r}, expected one of {expected}")
    if component.heads < 1 or component.width < 1:
        raise ValueError(f"{where}: {component.heads}x{component.width}, expected at least 1x1")
    total, shards = component.total_heads, layout.shards
    if total % shards and shards % total:
        raise ValueError(f"shards: {total} heads of {component.name} can't be dealt to {shards}")
    if component.heads != max(1, total // shards):
        raise ValueError(
            f"{where}: {component.heads} of {total} heads, expected {max(1, total // shards)} "
            f"in one of {shards} shards"
        )
    size = DTYPE_BYTES[component.dtype]
    if layout.interleaved and (
        layout.component_offset(component.name) % size or layout.token_stride(component.name) % size
    ):
        raise ValueError(f"{where}: its values are not aligned to their {size} bytes, by token")


def _check_scales(layout: KvLayout, component: Component) -> None:
    where = f"components: {component.name!r}"
    scales = [c for c in layout.components if c.name == component.name + SCALE]
    if component.dtype != "fp8_e4m3":
        if scales or component.scale is not None:
            raise ValueError(f"{where}: {component.dtype} has no scales")
        return
    if bool(scales) == (component.scale is not None):
        raise ValueError(
            f"{where}: fp8_e4m3 takes scales from {component.name}{SCALE}, or one scale"
        )
    if component.scale is not None and not 0 < component.scale < math.inf:
        raise ValueError(f"{where}: scale {component.scale}, expected a positive number")
    for scale in scales:
        heads = (scale.heads, scale.total_heads) == (component.heads, component.total_heads)
        if scale.dtype != "float32" or not heads or component.width % scale.width:
            raise ValueError(
                f"components: {scale.name!r}: expected float32, the heads of {component.name}, and "
                f"a width that divides {component.width}"
            )


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
