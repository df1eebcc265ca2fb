"""DeepSeek V3 in the engine: bits that depend on the sequence alone, FP8 weights, drafts."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.models.errors import UnsupportedModelError
from services.engine.torch.model import Batch, DraftRows, TorchModel
from services.engine.torch.tensors import TensorFiles
from tests.unit.engine_torch import torch_deepseek
from tests.unit.engine_torch.torch_models import advance, batch, sequences, whole

LENGTH = 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return torch_deepseek.write(tmp_path_factory.mktemp("deepseek"))


@pytest.fixture(scope="module")
def models(folder):
    """Models by dtype, each loaded once, with drafts."""
    loaded = {}

    def get(dtype="bfloat16", **options):
        key = (dtype, *options.items())
        if key not in loaded:
            loaded[key] = TorchModel.load(
                folder,
                **{"dtype": dtype, "block_tokens": 16, "threads": 2, "draft": True, **options},
            )
        return loaded[key]

    return get


def drafts(model, parts, before):
    """Logits of drafts for rows that a forward() has had; `before`: its first row of each part.

    parts: (sequence, first position, rows).
    """
    starts = np.cumsum([0, *(n for _, _, n in parts)]).astype(np.int32)
    width = max(len(s.table) for s, _, _ in parts)
    tables = np.full((len(parts), width), -1, np.int32)
    for row, (sequence, _, _) in enumerate(parts):
        tables[row, : len(sequence.table)] = sequence.table
    places = [np.arange(first, first + n, dtype=np.int32) for _, first, n in parts]
    # The hidden state of the position before: one row up, but for position 0, which has none.
    hidden = [
        np.where(p == 0, -1, p - p[0] + row - (p[0] == 0))
        for p, row in zip(places, before, strict=True)
    ]
    return model.draft(
        DraftRows(
            token_ids=np.concatenate(
                [s.tokens[p] for (s, _, _), p in zip(parts, places, strict=True)]
            ),
            positions=np.concatenate(places),
            query_starts=starts,
            block_tables=tables,
            logit_rows=np.arange(starts[-1], dtype=np.int32),
            hidden_rows=np.concatenate(hidden).astype(np.int32),
        )
    )


def run(model, sequence, ends):
    """Logits and drafts' of a sequence computed chunk by chunk.

    Each chunk after the first begins with the row before it, computed again for its hidden state.
    """
    logits, drafted = [], []
    for start, end in itertools.pairwise([0, *ends]):
        again = int(start > 0)
        sequence.done = start - again
        step = batch([(sequence, end - start + again)])
        step = dataclasses.replace(step, fresh=np.array([start], np.int32), hidden=True)
        logits.append(model.forward(step)[again:])
        drafted.append(drafts(model, [(sequence, start, end - start)], [0]))
    return np.concatenate(logits), np.concatenate(drafted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@given(cuts=st.sets(st.integers(1, LENGTH - 1), max_size=5))
@settings(max_examples=8, deadline=None)
def test_chunks_do_not_matter_to_logits_nor_to_drafts(models, dtype, cuts):
    model = models(dtype)
    (sequence,) = sequences(model, [LENGTH])
    expected = run(model, sequence, [LENGTH])
    (sequence,) = sequences(model, [LENGTH])
    found = run(model, sequence, [*sorted(cuts), LENGTH])
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])


@given(
    lengths=st.lists(st.integers(2, 70), min_size=2, max_size=5),
    steps=st.lists(st.integers(1, 33), min_size=1, max_size=6),
)
@settings(max_examples=8, deadline=None)
def test_company_does_not_matter(models, lengths, steps):
    model = models()
    alone = [whole(model, n) for n in lengths]
    running = sequences(model, lengths)
    found = [[] for _ in lengths]
    for turn in itertools.count():
        parts = [
            (i, s, min(steps[(turn + i) % len(steps)], len(s.tokens) - s.done))
            for i, s in enumerate(running)
            if s.done < len(s.tokens) and (turn + i) % 3
        ]
        if parts:
            logits = advance(model, [(s, n) for _, s, n in parts])
            for (i, _, _), rows in zip(parts, logits, strict=True):
                found[i].append(rows)
        if all(s.done == len(s.tokens) for s in running):
            break
    for rows, reference in zip(found, alone, strict=True):
        assert np.array_equal(np.concatenate(rows), reference)


def test_threads_do_not_matter(models):
    assert models().numerics == models(threads=1).numerics


def test_keeping_hidden_states_changes_no_logit(models):
    model = models()
    expected = whole(model, 40)
    (sequence,) = sequences(model, [40])
    step = dataclasses.replace(batch([(sequence, 40)]), hidden=True)
    assert np.array_equal(model.forward(step), expected)
    few = dataclasses.replace(step, logit_rows=np.array([39, 7], np.int32))
    assert np.array_equal(model.forward(few), expected[[39, 7]])


def test_a_row_that_is_not_fresh_is_written_nowhere(models):
    model = models()
    (sequence,) = sequences(model, [40])
    advance(model, [(sequence, 30)])
    before = model._pool.copy()
    sequence.done = 29
    step = dataclasses.replace(batch([(sequence, 1)]), fresh=np.array([30], np.int32))
    model.forward(step)
    assert np.array_equal(model._pool, before)


def test_drafts_deeper_take_the_hidden_states_of_the_drafts_before(models):
    model = models()
    one, two = sequences(model, [20, 20])
    for sequence in (one, two):
        run(model, sequence, [20])
    both = drafts_of_one(model, [one, two])
    assert np.array_equal(both[:1], drafts_of_one(model, [one]))
    assert np.array_equal(both[1:], drafts_of_one(model, [two]))


def drafts_of_one(model, running):
    """Forward the last token of each, draft the next and one more: the second drafts' logits."""
    for sequence in running:
        sequence.done = 19
    model.forward(dataclasses.replace(batch([(s, 1) for s in running]), hidden=True))
    count = len(running)
    common = {
        "query_starts": np.arange(count + 1, dtype=np.int32),
        "block_tables": np.stack([s.table for s in running]),
        "logit_rows": np.arange(count, dtype=np.int32),
        "hidden_rows": np.arange(count, dtype=np.int32),
    }
    tokens = np.full(count, 5, np.int32)
    for depth in range(2):
        places = np.full(count, 20 + depth, np.int32)
        logits = model.draft(DraftRows(tokens, places, deeper=depth > 0, **common))
        tokens = logits.argmax(-1).astype(np.int32)
    return logits


def test_draft_checks_its_rows(models, folder):
    model = models()
    (sequence,) = sequences(model, [8])
    model.forward(batch([(sequence, 8)]))
    with pytest.raises(ValueError, match="hidden_rows"):
        drafts(model, [(sequence, 0, 8)], [0])
    with pytest.raises(ValueError, match="multi-token"):
        drafts(TorchModel.load(folder, batch_invariant=False), [(sequence, 0, 8)], [0])


def test_steps_without_rows_or_logits(models):
    model = models()
    (sequence,) = sequences(model, [8])
    none = np.zeros(0, np.int32)
    empty = Batch(none, none, np.zeros(1, np.int32), np.zeros((0, 1), np.int32), none)
    assert model.forward(empty).shape == (0, 320)
    assert model.draft(DraftRows.of(empty, none)).shape == (0, 320)
    silent = dataclasses.replace(batch([(sequence, 8)]), logit_rows=none)
    assert model.forward(silent).shape == (0, 320)
    expected = whole(model, 8)
    (sequence,) = sequences(model, [8])
    model.forward(dataclasses.replace(batch([(sequence, 7)]), logit_rows=none))
    sequence.done = 7
    assert np.array_equal(advance(model, [(sequence, 1)])[0], expected[7:])


def test_counts_the_rows_that_chose_each_expert(models):
    model = models()
    (sequence,) = sequences(model, [50])
    before = model.expert_tokens.copy()
    run(model, sequence, [50])
    counted = model.expert_tokens - before
    assert counted.shape == (3, 8)
    assert counted.sum(axis=1).tolist() == [150, 150, 150]


def test_the_layout_has_a_layer_more_where_drafts_are_wanted(models):
    assert models().layout.layers == 4
    assert models(draft=False).layout.layers == 3
    assert [c.name for c in models().layout.components] == ["latent", "latent_scale", "rope"]


def test_the_weights_may_lack_the_draft_layer(tmp_path):
    found = {k: v for k, v in torch_deepseek.tensors({}).items() if "layers.3." not in k}
    model = TorchModel.load(
        torch_deepseek.write(tmp_path, found), draft=True, batch_invariant=False
    )
    assert model.weights.draft is None
    assert model.layout.layers == 3


@pytest.mark.peer
def test_drafts_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    layers = pytest.importorskip("transformers.modeling_layers")
    folder = torch_deepseek.write(tmp_path)
    model = TorchModel.load(folder, dtype="float32", kv_dtype="float32", threads=1, draft=True)
    (sequence,) = sequences(model, [60])
    _, found = run(model, sequence, [25, 60])
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(folder).eval()
    mtp = layers.MtpLayer(theirs.config, type(theirs.model.layers[-1]), type(theirs.model.norm), 2)
    mtp.load_state_dict(mtp_weights(torch_deepseek.tensors({})))
    mtp.eval()
    with torch.inference_mode():
        ids = torch.from_numpy(sequence.tokens.astype(np.int64))[None]
        hidden = theirs.model(ids).last_hidden_state
        before = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], dim=1)
        places = torch.arange(60)[None]
        embedded = theirs.model.embed_tokens(ids)
        mask = torch.full((60, 60), float("-inf")).triu(1)[None, None]
        out = mtp(embedded, before, theirs.model.rotary_emb(embedded, places), mask, places, None)
        expected = theirs.lm_head(out)[0].numpy()
    assert np.abs(found - expected).max() < 3e-5 * np.abs(expected).max()


def mtp_weights(found):
    """The draft layer's, under transformers' names, experts in one piece."""
    prefix = "model.layers.3."
    mine = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
    experts = [
        [mine.pop(f"mlp.experts.{i}.{part}_proj.weight") for part in ("gate", "up", "down")]
        for i in range(8)
    ]
    own = {name: mine.pop(f"{name}.weight") for name in ("enorm", "hnorm", "eh_proj")}
    own["post_norm"] = mine.pop("shared_head.norm.weight")
    return {
        **{f"{name}.weight": weight for name, weight in own.items()},
        **{f"mtp_block.{name}": weight for name, weight in mine.items()},
        "mtp_block.mlp.experts.gate_up_proj": torch.stack([torch.cat(e[:2]) for e in experts]),
        "mtp_block.mlp.experts.down_proj": torch.stack([e[2] for e in experts]),
    }


def quantized(found, rows, columns):
    """Matrices in FP8 with a scale for each block, but those that releases leave alone."""
    out = {}
    for name, weight in found.items():
        if "proj" not in name or "eh_proj" in name:
            out[name] = weight
            continue
        height, width = weight.shape
        scales = torch.empty(-(-height // rows), -(-width // columns))
        codes = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
        for i, j in itertools.product(*map(range, scales.shape)):
            block = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[i, j] = weight[block].abs().max() / 448
            codes[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
        out[name], out[f"{name}_scale_inv"] = codes, scales
    return out


def dequantized(found, rows, columns):
    """What quantized() stands for."""
    out = {}
    for name, weight in found.items():
        scales = found.get(f"{name}_scale_inv")
        if scales is not None:
            wide = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            weight = weight.float() * wide[: weight.shape[0], : weight.shape[1]]
        if not name.endswith("_scale_inv"):
            out[name] = weight
    return out


@pytest.mark.parametrize("block", [(128, 128), (32, 48)])
def test_fp8_weights_are_their_codes_times_their_blocks_scales(tmp_path, block):
    codes = quantized(torch_deepseek.tensors({}), *block)
    given = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    small = torch_deepseek.write(tmp_path / "fp8", codes, quantization_config=given)
    large = torch_deepseek.write(tmp_path / "float32", dequantized(codes, *block))
    found = [
        TorchModel.load(f, dtype="float32", threads=1, model_name="m", draft=True).numerics
        for f in (small, large)
    ]
    assert found[0] == found[1]


def test_fp8_weights_need_their_scales(tmp_path):
    codes = quantized(torch_deepseek.tensors({}), 128, 128)
    name = "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"
    del codes[name]
    with pytest.raises(UnsupportedModelError, match=name):
        TorchModel.load(torch_deepseek.write(tmp_path, codes))


def test_weights_of_other_kinds_are_refused_by_name(tmp_path):
    found = torch_deepseek.tensors({})
    name = "model.layers.0.mlp.up_proj.weight"
    found[name] = found[name].to(torch.int8)
    files = TensorFiles(torch_deepseek.write(tmp_path, found))
    with pytest.raises(UnsupportedModelError, match=r"up_proj.*int8"):
        files.matrix(name, 96, 64, torch.float32)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"topk_method": "greedy"}, "topk_method"),
        ({"scoring_func": "tanh"}, "scoring_func"),
        ({"n_group": 3}, "n_group"),
        ({"n_group": 8}, "n_group"),
        ({"topk_group": 5}, "topk_group"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"moe_layer_freq": [1, 1, 1]}, "moe_layer_freq"),
        ({"moe_intermediate_size": 40}, "moe_intermediate_size"),
        ({"kv_lora_rank": 40}, "kv_lora_rank"),
        ({"kv_lora_rank": 16}, "kv_lora_rank"),
        ({"q_lora_rank": 40}, "q_lora_rank"),
        ({"qk_rope_head_dim": 8}, "qk_rope_head_dim"),
        ({"qk_nope_head_dim": 24}, "qk_nope_head_dim"),
        ({"v_head_dim": None}, "v_head_dim"),
        ({"rope_interleave": "yes"}, "rope_interleave"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": 128}},
            "weight_block_size",
        ),
        ({"architectures": ["DeepseekV2ForCausalLM"]}, "architectures"),
    ],
)
def test_refuses_what_it_cannot_compute_by_name(tmp_path, folder, changes, key):
    found = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**found, **changes}))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=key):
        TorchModel.load(tmp_path)
