"""A KV source, in a process of its own, of one layout of a prompt's KV; see kv_source.py.

Its KV follows from the tokens, not from keys: so sources of every layout and shard have the same
values, and a sink of another layout can tell what should have arrived.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import uvloop

from kvtransfer import codecs_reference as reference
from kvtransfer.keys import block_keys, salt
from kvtransfer.layout import DTYPE_BYTES, KvLayout, gqa_layout, mla_layout
from tests.contract import kv_source

LAYERS = 6

Arrays = dict[str, np.ndarray]


def made(
    kind: str = "gqa",
    dtype: str = "bfloat16",
    block_tokens: int = 16,
    shard: int = 0,
    shards: int = 1,
    interleaved: bool = False,
    model: str = "m",
    heads: int = 4,
) -> KvLayout:
    """A layout, small but for MLA's rows, which are DeepSeek's."""
    if kind == "gqa":
        whole = gqa_layout(
            model,
            layers=LAYERS,
            kv_heads=heads,
            head_dim=64,
            dtype=dtype,
            block_tokens=block_tokens,
        )
    else:
        whole = mla_layout(
            model, layers=LAYERS, dtype=dtype, block_tokens=block_tokens, interleaved=interleaved
        )
    return whole.sharded(shard, shards)


def salt_of(fingerprint: str) -> bytes:
    return salt("m", fingerprint, "tenant")


def keys(layout: KvLayout, tokens: range, *, partial: bool = True) -> list[bytes]:
    return block_keys(tokens, layout.block_tokens, salt_of(layout.fingerprint), partial=partial)


@lru_cache(maxsize=64)
def computed(whole: KvLayout, tokens: range) -> Arrays:
    """[layers, tokens, heads, width] of each component, as the engine of `whole` computes it."""
    arrays: Arrays = {}
    rng = np.random.default_rng(tokens.start)
    for component in whole.components:
        if component.name.endswith("_scale"):
            continue
        shape = LAYERS, len(tokens), component.total_heads, component.width
        arrays |= stored(whole, component.name, rng.normal(size=shape).astype(np.float32))
    return arrays


def stored(layout: KvLayout, name: str, x: np.ndarray) -> Arrays:
    """float32 [..., width] as the layout has this component."""
    dtype = layout.component(name).dtype
    if dtype != "fp8_e4m3":
        return {name: reference.bf16_encode(x) if dtype == "bfloat16" else x}
    groups = layout.component(name + "_scale").width
    codes, scales = np.empty(x.shape, np.uint8), np.empty((*x.shape[:-1], groups), np.float32)
    reference.quantize(x, codes, scales)
    return {name: codes, name + "_scale": scales}


def block(layout: KvLayout, arrays: Arrays, index: int) -> np.ndarray:
    """The bytes of a block; zeros for tokens that there are not."""
    first = index * layout.block_tokens
    out = np.zeros((LAYERS, layout.layer_bytes), np.uint8)
    for layer in range(LAYERS):
        parts = []
        for c in layout.components:
            heads = slice(layout.first_head(c.name), layout.first_head(c.name) + c.heads)
            tokens = arrays[c.name][layer, first : first + layout.block_tokens, heads]
            rows = np.zeros(
                (layout.block_tokens, c.heads * c.width * DTYPE_BYTES[c.dtype]), np.uint8
            )
            rows[: len(tokens)] = (
                np.ascontiguousarray(tokens).view(np.uint8).reshape(len(tokens), -1)
            )
            parts.append(rows)
        if layout.interleaved:
            flat = np.concatenate(parts, axis=1).reshape(-1)
        else:
            flat = np.concatenate([np.pad(p.reshape(-1), (0, -p.size % 64)) for p in parts])
        out[layer, : flat.size] = flat
    return out.reshape(-1)


class ShardSource(kv_source.Source):
    """The commands; a prompt is range(start, start + count), and named by its lease."""

    @staticmethod
    def layout(options: dict) -> KvLayout:
        return made(**options["layout"])

    async def prompt(self, lease: str, start: int, count: int) -> dict:
        """Accepted, nothing computed yet."""
        store, tokens = self.store, range(start, start + count)
        whole = made(**{**self.options["layout"], "shard": 0, "shards": 1})
        self.prompts[lease] = tokens, keys(store.layout, tokens), computed(whole, tokens)
        store.open_lease(lease, 30.0, "tenant")
        raw = self.prompts[lease][1]
        blocks = store.allocate(len(raw))
        for at, key in zip(blocks, raw, strict=True):
            store.begin(at, key, "tenant")
        store.lease_add(lease, blocks, raw)
        self.blocks.update(zip(raw, blocks, strict=True))
        return {"blocks": blocks}

    async def compute(self, lease: str, first: int, layers: int, only: list[int]) -> dict:
        """Makes a range of layers final, of all blocks or `only` some."""
        _, raw, arrays = self.prompts[lease]
        size = self.store.layer_bytes
        for index, key in enumerate(raw):
            if not only or index in only:
                span = slice(first * size, (first + layers) * size)
                at = self.blocks[key]
                self.store.memory[at][span] = block(self.store.layout, arrays, index)[span]
                self.store.piece_done(at, first, layers)
        return {}

    async def finish(self, lease: str, commit: bool = False) -> dict:
        """Prefill has ended."""
        tokens, raw, _ = self.prompts.pop(lease)
        self.store.lease_complete(lease)
        blocks = [self.blocks.pop(key) for key in raw]
        for at in blocks[: len(tokens) // self.store.layout.block_tokens] if commit else ():
            self.store.commit(at)
        self.store.release(blocks)
        return {}

    async def finished(self, lease: str, start: int, count: int, commit: bool = False) -> dict:
        """All at once."""
        answer = await self.prompt(lease, start, count)
        await self.compute(lease, 0, LAYERS, [])
        await self.finish(lease, commit)
        return answer

    def __init__(self, options: dict) -> None:
        super().__init__(options)
        self.options = options
        self.prompts: dict[str, tuple[range, list[bytes], Arrays]] = {}


if __name__ == "__main__":
    uvloop.run(kv_source.main(ShardSource))
