"""A sequence's logits have the same bits however, and with whomever, they are computed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.models.errors import NotInvariantError
from services.engine.torch import numerics
from services.engine.torch.model import TorchModel
from services.engine.torch.numerics import (
    RowRule,
    Rules,
    choose_rule,
    probe_counts,
)
from tests.unit.engine_torch import torch_models
from tests.unit.engine_torch.torch_models import advance, sequences, whole

SHAPES = {
    "group 3": {},
    "group 1, head 80": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 80},
    "group 2, head 64": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    "group 5, head 128": {"num_attention_heads": 5, "head_dim": 128, "num_hidden_layers": 1},
}
KV_DTYPES = ("fp8_e4m3", "bfloat16", "float32")
DTYPES = ("bfloat16", "float32")
LONGEST = 200


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return {
        name: torch_models.write(base / str(i), **shape)
        for i, (name, shape) in enumerate(SHAPES.items())
    }


@pytest.fixture(scope="module")
def model(folders):
    """Models by (shape, dtype, KV dtype, block tokens, threads), each loaded once."""
    loaded: dict[tuple[object, ...], TorchModel] = {}

    def get(shape="group 3", dtype="bfloat16", kv="fp8_e4m3", block_tokens=16, threads=2):
        key = (shape, dtype, kv, block_tokens, threads)
        if key not in loaded:
            loaded[key] = TorchModel.load(
                folders[shape],
                dtype=dtype,
                kv_dtype=kv,
                block_tokens=block_tokens,
                threads=threads,
                model_name="m",
            )
        return loaded[key]

    return get


@pytest.fixture(scope="module")
def expected():
    """Logits of a whole sequence in one step, computed once for each model and length."""
    known: dict[tuple[int, int], np.ndarray] = {}

    def get(model, length):
        key = (id(model), length)
        if key not in known:
            known[key] = whole(model, length)
        return known[key]

    return get


def cuts(length, places):
    """Chunk lengths from places to cut at."""
    ends = sorted({0, length, *(p % length for p in places)})
    return [b - a for a, b in itertools.pairwise(ends)]


@pytest.mark.parametrize(
    ("shape", "dtype", "kv"),
    [("group 3", d, k) for d in DTYPES for k in KV_DTYPES]
    + [(s, "bfloat16", "fp8_e4m3") for s in SHAPES if s != "group 3"]
    + [("group 1, head 80", "float32", "bfloat16")],
)
@given(places=st.lists(st.integers(1, LONGEST), max_size=6), length=st.sampled_from([1, 63, 150]))
@settings(max_examples=12, deadline=None)
def test_chunks_do_not_matter(model, expected, shape, dtype, kv, places, length):
    under_test = model(shape, dtype, kv)
    whole_logits = expected(under_test, length)
    (sequence,) = sequences(under_test, [length])
    parts = [advance(under_test, [(sequence, n)])[0] for n in cuts(length, places)]
    assert np.array_equal(np.concatenate(parts), whole_logits)


@pytest.mark.parametrize("kv", KV_DTYPES)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=2, max_size=5),
    steps=st.lists(st.integers(1, 33), min_size=1, max_size=8),
    seed=st.integers(0, 99),
)
@settings(max_examples=10, deadline=None)
def test_company_does_not_matter(model, expected, kv, lengths, steps, seed):
    under_test = model(kv=kv)
    alone = [expected(under_test, n) for n in lengths]
    running = sequences(under_test, lengths, seed)
    found = [[] for _ in lengths]
    for turn in itertools.count():
        parts = [
            (i, s, min(steps[(turn + i) % len(steps)], len(s.tokens) - s.done))
            for i, s in enumerate(running)
            if s.done < len(s.tokens) and (turn + i) % 3
        ]
        if parts:
            logits = advance(under_test, [(s, n) for _, s, n in parts])
            for (i, _, _), rows in zip(parts, logits, strict=True):
                found[i].append(rows)
        if all(s.done == len(s.tokens) for s in running):
            break
    for rows, reference in zip(found, alone, strict=True):
        assert np.array_equal(np.concatenate(rows), reference)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_is_prefill_row_by_row(model, expected, dtype):
    under_test = model(dtype=dtype)
    (sequence,) = sequences(under_test, [140])
    first = advance(under_test, [(sequence, 60)])
    rest = [advance(under_test, [(sequence, 1)])[0] for _ in range(80)]
    assert np.array_equal(np.concatenate([*first, *rest]), expected(under_test, 140))


@pytest.mark.parametrize("block_tokens", [1, 7, 64, 200])
def test_block_size_does_not_matter(model, expected, block_tokens):
    other = model(block_tokens=block_tokens)
    assert np.array_equal(whole(other, 150), expected(model(), 150))
    assert other.numerics == model().numerics


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_matter_here(model, expected, threads, dtype):
    other = model(dtype=dtype, threads=threads)
    assert np.array_equal(whole(other, 150), expected(model(dtype=dtype), 150))
    assert other.numerics == model(dtype=dtype).numerics


def test_long_contexts_and_full_batches(model):
    under_test = model()
    lengths = [600, 1, 2, 3, *range(30, 60)]
    running = sequences(under_test, lengths)
    for sequence in running:
        advance(under_test, [(sequence, max(1, len(sequence.tokens) - 1))])
    rest = [s for s in running if s.done < len(s.tokens)]
    together = advance(under_test, [(s, 1) for s in rest])
    for sequence, rows in zip(rest, together, strict=True):
        assert np.array_equal(rows[0], whole(under_test, len(sequence.tokens))[-1])


def test_numbers_of_others_that_are_none_stay_theirs(model, expected):
    """A pool full of not-a-number, and a neighbour who computes with it."""
    under_test = model(kv="float32", dtype="float32")
    good, bad = sequences(under_test, [70, 70])
    under_test._pool.view(np.float32)[:] = np.nan
    bad.done = 69
    first, _ = advance(under_test, [(good, 69), (bad, 1)])
    (last,) = advance(under_test, [(good, 1)])
    assert np.array_equal(np.concatenate([first, last]), expected(under_test, 70))


def test_equal_numerics_need_equal_weights_and_dtypes(model, tmp_path):
    digests = {model(dtype=d, kv=k).numerics for d in DTYPES for k in KV_DTYPES}
    assert len(digests) == 6
    other = TorchModel.load(torch_models.write(tmp_path, rms_norm_eps=1e-4), threads=2)
    assert other.numerics not in digests


# How the rule about rows is found, with layers that vary on purpose.


class Varying:
    """Adds 1 to rows where bad(rows, row) says so."""

    inputs, outputs = 8, 4
    most_rows = 512

    def __init__(self, bad):
        self._bad = bad

    def __call__(self, x):
        rows = len(x)
        mark = [float(bool(self._bad(rows, row))) for row in range(rows)]
        return x + x.new_tensor(mark)[:, None]


@pytest.mark.parametrize(
    ("bad", "rule"),
    [
        (lambda rows, row: False, RowRule()),
        (lambda rows, row: rows == 1, RowRule(least=2)),
        (lambda rows, row: rows < 7, RowRule(least=8)),
        (lambda rows, row: rows % 4, RowRule(least=4, multiple=4)),
        (lambda rows, row: rows < 128, RowRule(tile=32)),
    ],
)
def test_the_cheapest_rule_that_holds_is_found(bad, rule):
    assert choose_rule(Varying(bad), torch.float32) == rule


def test_rows_that_depend_on_their_place_are_refused():
    with pytest.raises(NotInvariantError):
        choose_rule(Varying(lambda rows, row: row % 2), torch.float32)


@given(count=st.integers(1, 3000))
def test_rules_give_room_enough_and_few_sizes(count):
    for rule in numerics.RULES:
        rows = rule.rows(count)
        assert rows >= count
        assert rows % rule.multiple == 0
        assert rows >= rule.least
        assert rule.rows(rows) == rows
    assert len(probe_counts(512)) < 64


@given(count=st.integers(1, 3000), rule=st.sampled_from(numerics.RULES))
@settings(max_examples=50, deadline=None)
def test_no_more_rows_at_once_than_were_probed(count, rule):
    seen = []
    layer = Varying(lambda rows, row: row == 0 and seen.append(rows))
    rules = Rules({(8, 4): rule, (8, 8): RowRule()})
    x = torch.zeros(rules.room(count), 8)
    assert len(rules.apply(layer, x, count)) == rule.rows(count)
    probed = {rule.rows(n) for n in probe_counts(layer.most_rows)}
    assert set(seen) <= ({rule.tile} if rule.tile else probed)


def test_long_steps_are_short_ones(tmp_path):
    """A step of more rows than are computed at once."""
    folder = torch_models.write(tmp_path, max_position_embeddings=2048)
    model = TorchModel.load(folder, threads=2)
    (sequence,) = sequences(model, [1300])
    parts = [advance(model, [(sequence, n)])[0] for n in (500, 30, 1, 769)]
    assert np.array_equal(np.concatenate(parts), whole(model, 1300))
