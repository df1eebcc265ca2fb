"""Latent attention against float64, and bit by bit against itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer import codecs
from kvtransfer.layout import gqa_layout
from services.engine.models.errors import UnsupportedModelError
from services.engine.torch.kernels import latent, latent_tiles
from services.engine.torch.kernels.latent_steps import LatentSteps
from tests.unit.engine_torch.latent_models import FILL, Layer, layout_of, shape, tables

KV = ["fp8_e4m3", "bfloat16", "float32"]
DTYPES = [torch.float32, torch.bfloat16]

sixteens = st.integers(1, 6).map(lambda n: 16 * n)
shapes = st.builds(
    shape,
    heads=st.integers(1, 9),
    latent=st.sampled_from([32, 48, 64, 80, 128, 256]),
    rope=sixteens,
    nope=sixteens,
    value=sixteens,
    interleaved=st.booleans(),
)


def close(found, expected, dtype):
    """In the mean, relative to the outputs: bfloat16 rounds queries, weights and outputs."""
    error = np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean())
    return error < (1e-2 if dtype == torch.bfloat16 else 1e-5)


@given(
    given_shape=shapes,
    kv_dtype=st.sampled_from(KV),
    dtype=st.sampled_from(DTYPES),
    block_tokens=st.integers(1, 70),
    rows=st.integers(2, 150),
    threads=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_computes_attention(given_shape, kv_dtype, dtype, block_tokens, rows, threads):
    layer = Layer(
        given_shape,
        kv_dtype,
        dtype,
        block_tokens=block_tokens,
        lengths=(rows,),
        threads=threads,
    )
    (found,) = layer.step([rows])
    assert close(found, layer.reference(layer.sequences[0]), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", KV)
def test_computes_attention_of_deepseeks_shape(kv_dtype, dtype):
    layer = Layer(shape(16, 512, 64, 128, 128), kv_dtype, dtype, lengths=(90,))
    (found,) = layer.step([90])
    assert close(found, layer.reference(layer.sequences[0]), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", KV)
def test_a_rows_bits_do_not_depend_on_its_batch(kv_dtype, dtype):
    """One by one, in chunks cut anywhere, beside others, on many threads: equal bits."""
    lengths = (latent.SEGMENT + 90, 70, 3)
    layer = Layer(shape(heads=5), kv_dtype, dtype, block_tokens=12, lengths=lengths)
    alone = [layer.step([n * (i == j) for j, n in enumerate(lengths)])[0] for i in range(3)]
    bytes_alone = layer.pool.copy()

    @given(seed=st.integers(0, 2**32 - 1), threads=st.integers(1, 4))
    @settings(max_examples=6, deadline=None)
    def same(seed, threads):
        random = np.random.default_rng(seed)
        mixed = Layer(
            shape(heads=5), kv_dtype, dtype, block_tokens=12, lengths=lengths, threads=threads
        )
        found = [[], [], []]
        while any(s.done < n for s, n in zip(mixed.sequences, lengths, strict=True)):
            left = [n - s.done for s, n in zip(mixed.sequences, lengths, strict=True)]
            most = random.choice([1, 7, 200], 3)
            counts = [
                int(random.integers(0, min(n, m) + 1)) for n, m in zip(left, most, strict=True)
            ]
            counts[0] = counts[0] or min(left[0], 1)
            if sum(counts) == 0:
                continue
            outputs = iter(mixed.step(counts))
            for mine, count in zip(found, counts, strict=True):
                if count:
                    mine.append(next(outputs))
        for outputs, expected in zip(found, alone, strict=True):
            assert np.array_equal(np.concatenate(outputs), expected)
        assert np.array_equal(mixed.pool, bytes_alone)

    same()


@pytest.mark.parametrize("kv_dtype", KV)
def test_decode_over_segments_equals_prefill(kv_dtype):
    """A long context of few rows is shared by threads, segment by segment; rows of a chunk not."""
    length = 2 * latent.SEGMENT + 6
    chunked = Layer(shape(), kv_dtype, lengths=(length,))
    (expected,) = chunked.step([length])
    split = Layer(shape(), kv_dtype, lengths=(length,), threads=4)
    split.step([length - 8])
    for row in range(length - 8, length):
        (found,) = split.step([1])
        assert np.array_equal(found[0], expected[row])
    assert close(expected, chunked.reference(chunked.sequences[0]), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_no_row_may_see_makes_no_difference(dtype):
    """The pool is full of what is not a number, beyond the last row too."""
    layer = Layer(shape(), "bfloat16", dtype, lengths=(30,))
    (found,) = layer.step([11])
    assert np.isfinite(found).all()
    layer.restart()
    layer.pool[:] = 0
    assert np.array_equal(layer.step([11])[0], found)


@pytest.mark.parametrize("given_shape", [shape(), shape(3, 256, 48), shape(2, 80, 32)])
def test_stores_what_the_codecs_make_of_it(given_shape):
    """Bit by bit, of what a float32 pool holds; not finite vectors and zeros included."""
    found = {}
    for kv_dtype in KV:
        layer = Layer(given_shape, kv_dtype, torch.float32, lengths=(12,), block_tokens=5)
        (sequence,) = layer.sequences
        sequence.kv[3] = 0
        sequence.kv[4, 7] = torch.nan
        sequence.kv[5, -2] = torch.inf
        sequence.kv[6] *= 1e-30
        layer.step([12])
        found[kv_dtype] = layer.stored(sequence)
        if kv_dtype == "float32":
            good = [0, 1, 2, 3, 7, 8]
            for stored, exact in zip(layer.keys(sequence), layer.exact_keys(sequence), strict=True):
                np.testing.assert_allclose(stored[good], exact[good], rtol=1e-5, atol=1e-6)
    exact, half, small = found["float32"], found["bfloat16"], found["fp8_e4m3"]
    assert np.array_equal(half["latent"], codecs.bf16_encode(exact["latent"]))
    assert np.array_equal(half["rope"], codecs.bf16_encode(exact["rope"]))
    assert np.array_equal(small["rope"], half["rope"])
    scales = small["latent_scale"]
    codes, expected = codecs.fp8_quantize(exact["latent"].reshape(*scales.shape, -1))
    assert np.array_equal(small["latent"], codes.reshape(small["latent"].shape))
    assert np.array_equal(scales.view(np.int32), expected[..., 0].view(np.int32))


@pytest.mark.parametrize("kv_dtype", KV)
@pytest.mark.parametrize("block_tokens", [1, 3, 16])
def test_writes_its_rows_places_and_nothing_else(kv_dtype, block_tokens):
    layer = Layer(shape(rope=48), kv_dtype, block_tokens=block_tokens, lengths=(20, 20))
    layer.step([7, 5])
    written = np.zeros(layer.pool.shape, bool)
    for sequence in layer.sequences:
        for position in range(sequence.done):
            block = sequence.table[position // block_tokens]
            for part in layer.layout.components:
                start = layer.layout.layer_bytes + layer.layout.component_offset(part.name)
                start += position % block_tokens * part.token_bytes
                written[block, start : start + part.token_bytes] = True
    assert (layer.pool[~written] == FILL).all()
    # A row of not-a-number codes is none that was written.
    assert (layer.pool[written] != FILL).mean() > 0.9


def test_a_row_computed_again_writes_nothing_and_sees_the_same():
    layer = Layer(shape())
    (first,) = layer.step([20])
    before = layer.pool.copy()
    (sequence,) = layer.sequences
    sequence.done = 19
    # What it would write now is something else.
    sequence.kv[19] = -sequence.kv[19]
    (again,) = layer.step([1], unwritten=1)
    assert np.array_equal(again[0], first[19])
    assert np.array_equal(layer.pool, before)


@pytest.mark.parametrize(
    ("sizes", "key"),
    [
        ({"latent": 40}, "kv_lora_rank"),
        ({"latent": 16}, "kv_lora_rank"),
        ({"rope": 8}, "qk_rope_head_dim"),
        ({"nope": 20}, "qk_nope_head_dim"),
        ({"value": 33}, "v_head_dim"),
    ],
)
def test_refuses_other_sizes_by_name(sizes, key):
    bad = shape(**sizes)
    with pytest.raises(UnsupportedModelError, match=f"{key}="):
        LatentSteps(bad, layout_of(bad, "bfloat16", 8), torch.float32, 1, *tables(bad.rope))


def test_refuses_another_layout():
    good = shape()
    other = gqa_layout("m", layers=1, kv_heads=1, head_dim=64, dtype="float32", block_tokens=8)
    for layout in (other, layout_of(shape(latent=32), "float32", 8)):
        with pytest.raises(ValueError, match="layout"):
            LatentSteps(good, layout, torch.float32, 1, *tables(good.rope))


def test_pairs_mean_the_same_with_and_without_the_instruction():
    """Products of pairs by two multiply-adds: what machines without the instruction do."""
    from numba import njit

    by_parts = latent_tiles.product(4, 1, latent_tiles.Into.FRESH, latent_tiles._pairs_by_parts)
    chosen = latent_tiles.linear_4x16_pairs

    @njit
    def both(c, d, a, b, words):
        by_parts(c, 64, a, 4 * words, 4, b, 64, 64, words, 0)
        chosen(d, 64, a, 4 * words, 4, b, 64, 64, words, 0)

    random = torch.Generator().manual_seed(0)
    a = torch.randn(4, 40, generator=random).bfloat16()
    b = torch.randn(40, 16, generator=random).bfloat16()
    pairs = b.view(20, 2, 16).transpose(1, 2).contiguous()
    c, d = torch.zeros(4, 16), torch.zeros(4, 16)
    both(c.data_ptr(), d.data_ptr(), a.data_ptr(), pairs.data_ptr(), 20)
    exact = a.double() @ b.double()
    for found in (c, d):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
