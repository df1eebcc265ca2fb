import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer import wire
from kvtransfer.errors import LayoutMismatchError
from kvtransfer.layout import (
    Component,
    KvLayout,
    gqa_layout,
    mla_layout,
    mla_one_scale_layout,
)
from tandem.kvtransfer.v1 import kvtransfer_pb2 as pb

GQA = gqa_layout("m", layers=4, kv_heads=8, head_dim=128, dtype="fp8_e4m3", block_tokens=64)


def mla(**fields) -> KvLayout:
    return mla_layout("m", **{"layers": 61, "dtype": "fp8_e4m3", "block_tokens": 64, **fields})


@pytest.mark.parametrize("interleaved", [False, True])
def test_mla_in_fp8_is_656_bytes_a_token_and_layer(interleaved):
    layout = mla(interleaved=interleaved)
    assert [c.token_bytes for c in layout.components] == [512, 16, 128]
    assert layout.layer_bytes == 656 * 64
    assert layout.token_bytes == 40_016
    assert mla(layers=62).token_bytes == 40_672


def test_mla_in_bf16_is_1152_bytes_a_token_and_layer():
    layout = mla(dtype="bfloat16")
    assert layout.token_bytes == 61 * 1152
    assert [c.name for c in layout.components] == ["latent", "rope"]


def test_mla_with_one_scale_is_576_bytes_and_its_scale_counts():
    layout = mla_one_scale_layout("m", layers=61, block_tokens=64, scale=0.5)
    assert layout.token_bytes == 61 * 576
    other = mla_one_scale_layout("m", layers=61, block_tokens=64, scale=0.25)
    assert layout.fingerprint != other.fingerprint


def test_by_token_is_the_order_of_flashmla():
    layout = mla(interleaved=True)
    offsets = [layout.component_offset(n) for n in ("latent", "latent_scale", "rope")]
    assert offsets == [0, 512, 528]
    assert {layout.token_stride(c.name) for c in layout.components} == {656}


def test_by_component_arrays_are_aligned():
    layout = mla(block_tokens=3)
    for component in layout.components:
        assert layout.component_offset(component.name) % 64 == 0
        assert layout.token_stride(component.name) == component.token_bytes
    assert layout.layer_bytes == 1536 + 64 + 384


def test_fingerprints_of_existing_layouts_stay():
    assert GQA.fingerprint == "b65da1082ba65dfbdf1664df185c6b47"


def test_everything_is_in_the_fingerprint():
    layouts = [
        mla(),
        mla(layers=62),
        mla(block_tokens=32),
        mla(scale_values=64),
        mla(dtype="bfloat16"),
        mla(dtype="float32"),
        mla(rope=32),
        mla(interleaved=True),
        mla().sharded(0, 2),
        mla().sharded(1, 2),
        mla_one_scale_layout("m", layers=61, block_tokens=64, scale=1.0),
        dataclasses.replace(mla(), model="other"),
        GQA,
        GQA.sharded(0, 2),
        GQA.sharded(0, 16),
    ]
    assert len({layout.fingerprint for layout in layouts}) == len(layouts)


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8, 16]))
def test_shards_hold_every_head_once_or_in_equal_turns(heads, shards):
    whole = gqa_layout("m", layers=1, kv_heads=heads, head_dim=8, dtype="fp8_e4m3", block_tokens=16)
    held = []
    for shard in range(shards):
        layout = whole.sharded(shard, shards)
        first = layout.first_head("k")
        assert layout.first_head("k_scale") == first
        held += range(first, first + layout.component("k").heads)
    assert held == [h for h in range(heads) for _ in range(max(1, shards // heads))]


def test_mla_is_whole_on_every_shard():
    for shard in range(4):
        layout = mla().sharded(shard, 4)
        assert layout.components == mla().components
        assert layout.first_head("latent") == 0


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: mla(layers=0), "layers"),
        (lambda: mla(block_tokens=0), "block_tokens"),
        (lambda: mla(dtype="fp4"), "components"),
        (lambda: mla(scale_values=100), "scale_values"),
        (lambda: mla(scale_values=0), "scale_values"),
        (lambda: dataclasses.replace(GQA, shard=1), "shard"),
        (lambda: dataclasses.replace(GQA, shards=2), "components"),
        (lambda: dataclasses.replace(GQA, shards=0), "shards"),
        (lambda: dataclasses.replace(GQA, model="a\nb"), "model"),
        (lambda: dataclasses.replace(GQA, components=()), "components"),
        (lambda: dataclasses.replace(GQA, components=GQA.components[:1] * 2), "components"),
        (lambda: dataclasses.replace(GQA, components=GQA.components[:2]), "components"),
        (lambda: GQA.sharded(0, 3), "shards"),
        (lambda: GQA.sharded(0, 0), "shards"),
        (lambda: GQA.sharded(2, 2), "shard"),
        (lambda: GQA.sharded(0, 2).sharded(0, 2), "shards"),
        (lambda: KvLayout("m", 1, 1, (Component("k", "bfloat16", 1, 8, scale=1.0),)), "components"),
        (lambda: KvLayout("m", 1, 1, (Component("K k", "bfloat16", 1, 8),)), "components"),
        (lambda: KvLayout("m", 1, 1, (Component("k", "bfloat16", 1, 0),)), "components"),
        (lambda: mla_one_scale_layout("m", layers=1, block_tokens=1, scale=0.0), "components"),
        (lambda: mla(latent=128, rope=3, interleaved=True), "components"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_by_field(make, field):
    with pytest.raises(ValueError) as refused:
        make()
    assert str(refused.value).startswith(field + ":")


def described(layout: KvLayout) -> pb.DescribeResponse:
    return pb.DescribeResponse(
        kv_layout=layout.fingerprint,
        layout_fields=layout.fields(),
        layout=wire.layout_to(layout),
    )


@pytest.mark.parametrize(
    "layout",
    [
        GQA,
        GQA.sharded(3, 4),
        GQA.sharded(9, 16),
        mla(interleaved=True),
        mla_one_scale_layout("m", layers=2, block_tokens=64, scale=0.1),
    ],
)
def test_a_layout_survives_the_wire(layout):
    raw = described(layout).SerializeToString()
    assert wire.layout_from(pb.DescribeResponse.FromString(raw)) == layout


def test_what_a_source_says_of_its_layout_must_be_possible_and_its_own():
    with pytest.raises(LayoutMismatchError) as refused:
        wire.layout_from(pb.DescribeResponse(kv_layout=GQA.fingerprint))
    assert refused.value.metadata["field"] == "layers"
    said = described(GQA)
    said.layout.block_tokens = 32
    with pytest.raises(LayoutMismatchError) as refused:
        wire.layout_from(said)
    assert refused.value.metadata["field"] == "block_tokens"
