"""Conversion against an oracle that knows layouts by their description alone, one row at a time."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer import codecs_reference as reference
from kvtransfer.codecs import NUMPY_DTYPES
from kvtransfer.conversion import Window, convert, plan, windows
from kvtransfer.errors import LayoutMismatchError
from kvtransfer.layout import KvLayout, gqa_layout, mla_layout, mla_one_scale_layout

LAYERS = 3
DTYPES = ("fp8_e4m3", "bfloat16", "float32")


def gqa(heads=4, dtype="bfloat16", block_tokens=8, shard=0, shards=1, interleaved=False):
    whole = gqa_layout(
        "m", layers=LAYERS, kv_heads=heads, head_dim=8, dtype=dtype, block_tokens=block_tokens
    )
    return dataclasses.replace(whole, interleaved=interleaved).sharded(shard, shards)


def mla(dtype="bfloat16", block_tokens=8, shard=0, shards=1, interleaved=False):
    whole = mla_layout(
        "m",
        layers=LAYERS,
        dtype=dtype,
        block_tokens=block_tokens,
        latent=32,
        rope=4,
        scale_values=8,
        interleaved=interleaved,
    )
    return whole.sharded(shard, shards)


# The oracle


def row(layout: KvLayout, blocks: np.ndarray, name: str, layer: int, token: int, head: int):
    """The bytes of one token and head of this shard."""
    block, token = divmod(token, layout.block_tokens)
    sizes = {c.name: c.nbytes(1) for c in layout.components}
    names = list(sizes)
    before = names[: names.index(name)]
    if layout.interleaved:
        start = token * sum(sizes.values()) + sum(sizes[n] for n in before)
    else:
        start = sum(-(-sizes[n] * layout.block_tokens // 64) * 64 for n in before)
        start += token * sizes[name]
    size = sizes[name] // layout.component(name).heads
    start += layer * layout.layer_bytes + head * size
    return blocks[block, start : start + size]


def write(layout: KvLayout, arrays: dict[str, np.ndarray], tokens: int) -> np.ndarray:
    """Blocks of a shard, from arrays [layers, tokens, all heads, width] of every component."""
    blocks = np.zeros((layout.blocks_for(tokens), layout.block_bytes), np.uint8)
    for at, name, value in rows(layout, arrays, tokens):
        row(layout, blocks, name, *at)[:] = value.view(np.uint8)
    return blocks


def rows(layout: KvLayout, arrays: dict[str, np.ndarray], tokens: int):
    for component in layout.components:
        total, held = component.total_heads, component.heads
        first = layout.shard * held if total >= layout.shards else 0
        if 1 < total < layout.shards:
            first = layout.shard // (layout.shards // total)
        for at in np.ndindex(layout.layers, tokens, held):
            layer, token, head = at
            yield at, component.name, arrays[component.name][layer, token, first + head]


def holds(layout: KvLayout, blocks: np.ndarray, arrays: dict[str, np.ndarray], tokens: int) -> bool:
    return all(
        row(layout, blocks, name, *at).tobytes() == value.tobytes()
        for at, name, value in rows(layout, arrays, tokens)
    )


def converted(
    sources: list[tuple[KvLayout, np.ndarray]], sink: KvLayout, tokens: range, cut: int = LAYERS
) -> np.ndarray:
    """The sink's blocks, piece by piece, as a fetch does it; pieces have `cut` layers."""
    conversion = plan([layout for layout, _ in sources], sink)
    result = np.full((sink.blocks_for(tokens.stop), sink.block_bytes), 0xEE, np.uint8)
    for contribution in conversion.contributions:
        source, blocks = sources[contribution.source]
        for index, block in enumerate(blocks):
            for window in windows(index, source.block_tokens, sink.block_tokens, tokens):
                for first in range(0, LAYERS, cut):
                    piece = block[first * source.layer_bytes :]
                    piece = piece[: min(cut, LAYERS - first) * source.layer_bytes].copy()
                    into = result[window.sink_block][first * sink.layer_bytes :]
                    convert(contribution, piece, into, window)
    return result


def random_arrays(whole: KvLayout, tokens: int, seed: int) -> dict[str, np.ndarray]:
    """Any bits, as only bytes have to survive."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for c in whole.components:
        raw = rng.integers(0, 256, (LAYERS, tokens, c.total_heads, c.nbytes(1) // c.heads))
        arrays[c.name] = raw.astype(np.uint8).view(NUMPY_DTYPES[c.dtype])
    return arrays


def sensible_arrays(whole: KvLayout, tokens: int, seed: int) -> dict[str, np.ndarray]:
    """Values as models have them, as `whole`, which is not fp8, stores them."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for c in whole.components:
        x = rng.normal(size=(LAYERS, tokens, c.total_heads, c.width)) * rng.lognormal(size=c.width)
        x = x.astype(np.float32)
        arrays[c.name] = reference.bf16_encode(x) if c.dtype == "bfloat16" else x
    return arrays


def recoded(arrays: dict[str, np.ndarray], source: KvLayout, sink: KvLayout):
    """What arrays become in another whole layout: quantized directly."""
    result = {}
    for component in source.components:
        name, values = component.name, arrays[component.name]
        if name.endswith("_scale"):
            continue
        to = sink.component(name).dtype
        shape = values.shape
        if component.dtype == to:
            result |= {n: a for n, a in arrays.items() if n.startswith(name)}
            continue
        x = values
        if component.dtype == "fp8_e4m3":
            x = np.empty(shape, np.float32)
            reference.dequantize(values, arrays[name + "_scale"], x)
        elif component.dtype == "bfloat16":
            x = reference.bf16_decode(values)
        if to == "fp8_e4m3":
            groups = sink.component(name + "_scale").width
            codes, scales = np.empty(shape, np.uint8), np.empty((*shape[:-1], groups), np.float32)
            reference.quantize(x, codes, scales)
            result |= {name: codes, name + "_scale": scales}
        else:
            result[name] = reference.bf16_encode(x) if to == "bfloat16" else x
    return result


# Chains

LOADING = settings(deadline=None)
"""The first example loads kernels, or compiles them."""

SHARDS = st.sampled_from([1, 2, 4, 8])
BLOCKS = st.integers(1, 13)
HOPS = st.lists(st.tuples(BLOCKS, SHARDS, st.booleans()), min_size=2, max_size=4)
KINDS = st.sampled_from([gqa, mla])


def all_shards(make, dtype, hop) -> list[KvLayout]:
    block_tokens, shards, interleaved = hop
    return [
        make(
            dtype=dtype,
            block_tokens=block_tokens,
            shard=shard,
            shards=shards,
            interleaved=interleaved,
        )
        for shard in range(shards)
    ]


@LOADING
@given(
    KINDS, st.sampled_from(DTYPES), HOPS, st.integers(1, 30), st.integers(0, 99), st.integers(1, 3)
)
def test_any_chain_of_blocks_orders_and_shards_keeps_every_bit(
    make, dtype, hops, tokens, seed, cut
):
    arrays = random_arrays(make(dtype=dtype), tokens, seed)
    held = [(layout, write(layout, arrays, tokens)) for layout in all_shards(make, dtype, hops[0])]
    for hop in hops[1:]:
        sinks = all_shards(make, dtype, hop)
        assert all(plan([layout for layout, _ in held], sink).exact for sink in sinks)
        held = [(sink, converted(held, sink, range(tokens), cut)) for sink in sinks]
    for layout, blocks in held:
        assert holds(layout, blocks, arrays, tokens)


@LOADING
@given(
    KINDS,
    st.lists(st.sampled_from(DTYPES), min_size=2, max_size=3),
    HOPS.filter(lambda hops: len(hops) >= 3),
    st.integers(1, 20),
    st.integers(0, 99),
)
def test_any_chain_of_dtypes_rounds_as_converting_directly_does(make, dtypes, hops, tokens, seed):
    start = "float32" if dtypes[0] == "fp8_e4m3" else dtypes[0]
    arrays = sensible_arrays(make(dtype=start), tokens, seed)
    held = [(layout, write(layout, arrays, tokens)) for layout in all_shards(make, start, hops[0])]
    for before, dtype, hop in zip([start, *dtypes[1:]], dtypes[1:], hops[1:], strict=False):
        arrays = recoded(arrays, make(dtype=before), make(dtype=dtype))
        sinks = all_shards(make, dtype, hop)
        held = [(sink, converted(held, sink, range(tokens))) for sink in sinks]
    for layout, blocks in held:
        assert holds(layout, blocks, arrays, tokens)


def test_groups_of_scales_may_differ():
    one, other = (
        mla_layout(
            "m", layers=LAYERS, dtype="fp8_e4m3", block_tokens=4, latent=32, rope=4, scale_values=n
        )
        for n in (8, 16)
    )
    arrays = sensible_arrays(mla(dtype="float32"), 9, 1)
    first = recoded(arrays, mla(dtype="float32"), one) | {
        "rope": reference.bf16_encode(arrays["rope"])
    }
    assert not plan([one], other).exact
    blocks = converted([(one, write(one, first, 9))], other, range(9))
    between = np.empty(first["latent"].shape, np.float32)
    reference.dequantize(first["latent"], first["latent_scale"], between)
    codes, scales = np.empty_like(first["latent"]), np.empty((LAYERS, 9, 1, 2), np.float32)
    reference.quantize(between, codes, scales)
    expected = {"latent": codes, "latent_scale": scales, "rope": first["rope"]}
    assert holds(other, blocks, expected, 9)


@LOADING
@given(st.integers(0, 99), st.sampled_from(["float32", "bfloat16"]))
def test_what_is_lost_is_within_the_bounds_stated(seed, dtype):
    layout, fp8 = gqa(dtype=dtype), gqa(dtype="fp8_e4m3")
    arrays = sensible_arrays(layout, 8, seed)
    exact = arrays["k"] if dtype == "float32" else reference.bf16_decode(arrays["k"])
    blocks = converted([(layout, write(layout, arrays, 8))], fp8, range(8))
    back = converted([(fp8, blocks)], gqa(dtype="float32"), range(8))
    half = converted([(fp8, blocks)], gqa(dtype="bfloat16"), range(8))
    x = exact.astype(np.float64)
    scale = np.abs(x).max(axis=-1, keepdims=True) / 448
    bound = np.maximum(np.abs(x) * 2.0**-4, scale * 2.0**-10) * (1 + 2.0**-20)
    wide, narrow = np.empty(x.shape), np.empty(x.shape)
    for at in np.ndindex(x.shape[:-1]):
        wide[at] = row(gqa(dtype="float32"), back, "k", *at).view(np.float32)
        narrow[at] = reference.bf16_decode(row(gqa(), half, "k", *at).view(np.uint16))
    assert (np.abs(wide - x) <= bound + np.abs(wide) * 2.0**-24).all()
    assert (np.abs(narrow - wide) <= np.abs(wide) * 2.0**-8 * (1 + 2.0**-15)).all()


# Tokens


@given(BLOCKS, BLOCKS, st.integers(0, 40), st.integers(0, 40))
def test_windows_deal_every_token_once(source, sink, start, count):
    tokens = range(start, start + count)
    dealt = []
    for block in range(-(-tokens.stop // source)):
        for window in windows(block, source, sink, tokens):
            assert window.tokens > 0
            assert window.source_token + window.tokens <= source
            assert window.sink_token + window.tokens <= sink
            for i in range(window.tokens):
                token = block * source + window.source_token + i
                assert token == window.sink_block * sink + window.sink_token + i
                dealt.append(token)
    assert dealt == list(tokens)


def test_windows_of_halves():
    assert windows(1, 64, 32, range(200)) == (Window(2, 0, 0, 32), Window(3, 32, 0, 32))
    assert windows(1, 32, 64, range(40)) == (Window(0, 0, 32, 8),)
    assert windows(0, 32, 64, range(64, 90)) == ()


def test_tokens_outside_of_the_range_are_left_alone():
    arrays = random_arrays(gqa(), 20, 5)
    source = gqa(block_tokens=8)
    sink = gqa(block_tokens=5)
    blocks = converted([(source, write(source, arrays, 20))], sink, range(10, 17))
    assert (blocks[:2] == 0xEE).all()
    for token in range(10, 20):
        found = row(sink, np.concatenate([blocks, blocks[-1:]]), "v", 1, token, 2)
        assert (found.tobytes() == arrays["v"][1, token, 2].tobytes()) == (token < 17)


# What is planned


def used(sources: list[KvLayout], sink: KvLayout) -> list[int]:
    return [c.source for c in plan(sources, sink).contributions]


def test_only_shards_that_are_needed_are_read():
    two = [gqa(shard=i, shards=2) for i in range(2)]
    assert [used(two, gqa(shard=i, shards=4)) for i in range(4)] == [[0], [0], [1], [1]]
    assert used(two, gqa()) == [0, 1]
    assert used([gqa()], gqa(shard=3, shards=4)) == [0]
    assert used(two[1:], gqa(shard=2, shards=4)) == [0]


def test_sinks_spread_over_replicas():
    four = [mla(shard=i, shards=4) for i in range(4)]
    assert [used(four, mla(shard=i, shards=2, dtype="fp8_e4m3")) for i in range(2)] == [[0], [1]]
    assert used(four[2:3], mla()) == [0]
    # Two heads on eight shards: each is on four of them.
    eight = [gqa(heads=2, shard=i, shards=8) for i in range(8)]
    assert [used(eight, gqa(heads=2, shard=i, shards=2)) for i in range(2)] == [[0], [5]]
    assert used(eight, gqa(heads=2)) == [0, 4]


def test_sources_of_several_degrees_are_mixed():
    sources = [gqa(shard=0, shards=4), gqa(shard=1, shards=2), gqa(shard=1, shards=4)]
    arrays = random_arrays(gqa(), 5, 3)
    blocks = converted([(s, write(s, arrays, 5)) for s in sources], gqa(), range(5))
    assert holds(gqa(), blocks, arrays, 5)


def test_the_same_layout_needs_no_conversion():
    assert plan([gqa(shard=1, shards=2)], gqa(shard=1, shards=2)).identical
    assert not plan([gqa(shards=2), gqa(shard=1, shards=2)], gqa()).identical
    assert not plan([gqa(block_tokens=4)], gqa()).identical


def test_exact_where_nothing_is_rounded():
    assert plan([gqa(dtype="bfloat16")], gqa(dtype="float32")).exact
    for source, sink in (
        ("float32", "bfloat16"),
        ("bfloat16", "fp8_e4m3"),
        ("fp8_e4m3", "float32"),
    ):
        assert not plan([gqa(dtype=source)], gqa(dtype=sink)).exact


def one_scale(scale: float = 0.5, block_tokens: int = 64) -> KvLayout:
    return mla_one_scale_layout("m", layers=LAYERS, block_tokens=block_tokens, scale=scale)


@pytest.mark.parametrize(
    ("sources", "sink", "field"),
    [
        ([dataclasses.replace(gqa(), model="n")], gqa(), "model"),
        ([dataclasses.replace(mla(), layers=LAYERS + 1)], mla(), "layers"),
        ([gqa(heads=8)], gqa(), "components"),
        ([gqa()], mla(), "components"),
        ([mla()], mla_layout("m", layers=LAYERS, dtype="bfloat16", block_tokens=8), "components"),
        ([one_scale()], one_scale(0.25), "components"),
        (
            [mla_layout("m", layers=LAYERS, dtype="fp8_e4m3", block_tokens=64)],
            one_scale(),
            "components",
        ),
        ([gqa(shards=2)], gqa(), "shard"),
        ([], gqa(), "shard"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_field(sources, sink, field):
    with pytest.raises(LayoutMismatchError) as refused:
        plan(sources, sink)
    assert refused.value.metadata["field"] == field
    assert refused.value.metadata["fields"] == field if field != "shard" else True


def test_one_scale_for_all_moves_between_block_sizes():
    source, sink = one_scale(block_tokens=8), one_scale(block_tokens=3)
    rng = np.random.default_rng(0)
    arrays = {
        c.name: rng.integers(0, 256, (LAYERS, 10, 1, c.width), np.uint8) for c in source.components
    }
    assert plan([source], sink).exact
    blocks = converted([(source, write(source, arrays, 10))], sink, range(10))
    assert holds(sink, blocks, arrays, 10)
