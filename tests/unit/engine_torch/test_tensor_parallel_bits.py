"""A model computed by several: logits, drafts and KV have the bits of one process."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import services.engine.models as models
from services.engine.adapters import read_files
from services.engine.models.errors import NotInvariantError
from services.engine.torch import numerics
from services.engine.torch.kernels.linear import Linear
from services.engine.torch.model import DraftRows, TorchModel
from services.engine.torch.parallel.tensor_cuts import Cuts
from services.engine.torch.tensors import TensorFiles
from services.runtime.load import SettingsError
from tests.unit.engine_torch import torch_adapters, torch_deepseek, torch_models
from tests.unit.engine_torch.tensor_ranks import TensorRanks
from tests.unit.engine_torch.torch_models import advance, batch, sequences

SHIPPED = Path(models.__file__).parent / "shipped" / "tiny-deepseek"
CHUNKS = (1, 50, 3, 46)
"""Of a prompt of a hundred tokens."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(family), made once."""
    made = {"shipped": SHIPPED}

    def folder(family):
        if family not in made:
            path = made[family] = tmp_path_factory.mktemp(family.replace(" ", "-"))
            if family == "deepseek":
                torch_deepseek.write(path)
            elif family == "llama":
                torch_models.write(path)
            else:
                pytest.importorskip("transformers")
                from tests.unit.engine_torch.test_torch_families import peer

                peer(family).save_pretrained(path)
        return made[family]

    return folder


def compute(model: TorchModel, chunks=(100,), adapter: str = "") -> list[np.ndarray]:
    """Logits of a prompt, drafts' and the KV that is left, in blocks full of rubbish before."""
    (sequence,) = sequences(model, [sum(chunks)])
    found = []
    drafts = model.weights.draft is not None
    for count in chunks:
        rows = dataclasses.replace(
            batch([(sequence, count)]), hidden=drafts, adapters=(adapter,) if adapter else ()
        )
        found.append(model.forward(rows))
        if drafts:
            # Of the first chunk's first row there is no hidden state, of others' it is elsewhere.
            places = np.arange(count, dtype=np.int32) - 1
            given = dataclasses.replace(DraftRows.of(rows, places), adapters=rows.adapters)
            found.append(model.draft(given))
        sequence.done += count
    return [np.concatenate(found[:: 1 + drafts]), *found[1 :: 1 + drafts], model._pool]


def equal(ranks: TensorRanks, alone: TorchModel, chunks=(100,), adapter: str = "") -> None:
    expected = compute(alone, chunks, adapter)
    for found in ranks.do(lambda model: compute(model, chunks, adapter)):
        for ours, theirs in zip(found, expected, strict=True):
            assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("family", "count", "load"),
    [
        ("llama", 2, {}),  # one KV head, whose query heads are shared out 1 and 2
        ("llama", 3, {"kv_dtype": "bfloat16"}),
        ("llama", 2, {"dtype": "float32"}),  # by a library's kernels
        ("qwen3", 2, {}),
        ("qwen3 moe", 2, {}),
        ("qwen2 moe", 3, {}),  # with biases and a gated shared expert
        ("deepseek", 2, {"draft": True}),
        ("deepseek", 3, {"draft": True, "kv_dtype": "bfloat16"}),
        ("shipped", 2, {"draft": True}),  # in FP8
    ],
)
def test_bits_are_those_of_one_process(folders, family, count, load):
    folder = folders(family)
    alone = TorchModel.load(folder, block_tokens=16, threads=1, **load)
    ranks = TensorRanks(count, folder, **load)
    try:
        assert {model.numerics for model in ranks.models} == {alone.numerics}
        equal(ranks, alone)
        equal(ranks, alone, CHUNKS)
        whole, chunked = compute(alone), compute(alone, CHUNKS)
        assert np.array_equal(whole[0], chunked[0])
        # Each reads its share alone, but for what all have.
        own = [sum(p.linear.outputs for p in m.weights.projections) for m in ranks.models]
        assert sum(own) == sum(p.linear.outputs for p in alone.weights.projections)
        assert max(own) < 0.75 * sum(own)
    finally:
        ranks.close()


def test_adapters_are_cut_like_the_layers_that_they_add_to(folders, tmp_path):
    folder = folders("deepseek")
    targets = ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "o_proj", "up_proj", "down_proj")
    skip = (".experts.", "layers.3.")
    path = torch_adapters.write(tmp_path / "a", folder, targets, rank=3, skip=skip)
    files = read_files("a", path, torch_adapters.LIMITS)
    alone = TorchModel.load(folder, block_tokens=16, threads=1)
    ranks = TensorRanks(2, folder)
    try:
        for model in (alone, *ranks.models):
            adapter, weights = model.adapters.read(files, torch_adapters.LIMITS)
            model.adapters.put(adapter.id, weights)
        equal(ranks, alone, CHUNKS, adapter.id)
        assert not np.array_equal(compute(alone)[0], compute(alone, adapter=adapter.id)[0])
    finally:
        ranks.close()


def test_steps_of_several_sequences(folders):
    """And rows whose logits nobody wants."""
    alone = TorchModel.load(folders("qwen3 moe"), block_tokens=16, threads=1)
    ranks = TensorRanks(2, folders("qwen3 moe"))

    def run(model):
        first, second, third, fourth = sequences(model, [40, 7, 90, 5])
        unasked = dataclasses.replace(batch([(fourth, 4)]), logit_rows=np.zeros(0, np.int32))
        assert not len(model.forward(unasked))
        fourth.done = 4
        return [
            *advance(model, [(first, 39), (third, 60)]),
            *advance(model, [(first, 1), (second, 7), (third, 30), (fourth, 1)]),
        ]

    try:
        expected = run(alone)
        for found in ranks.do(run):
            assert all(map(np.array_equal, found, expected))
    finally:
        ranks.close()


def test_rows_of_an_fp8_weight_are_the_whole_ones(tmp_path):
    weight = torch.randn(70, 40).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 2) + 0.5
    save_file({"w.weight": weight, "w.weight_scale_inv": scales}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path, (32, 32))
    whole = files.matrix("w.weight", 70, 40, torch.float32)
    for here in (
        range(70),
        range(16, 48),
        range(31, 33),
        range(69, 70),
        range(0, 32),
        range(64, 70),
    ):
        found = files.matrix("w.weight", 70, 40, torch.float32, here)
        assert torch.equal(found, whole[here.start : here.stop])


def test_a_slice_with_other_bits_is_refused():
    weight = torch.from_numpy(np.random.default_rng(1).standard_normal((48, 64), np.float32))
    whole, columns = Linear(weight, None, packed=False), range(16, 48)
    right = Linear(weight[16:48], None, packed=False)
    numerics.prove_slice(right, whole, [columns], torch.float32, None)
    numerics.prove_slice(right, whole, [range(16, 32), range(32, 48)], torch.float32, None)
    wrong = Linear(weight[16:48] * (1 + 2**-20), None, packed=False)
    with pytest.raises(NotInvariantError, match=r"engine\.tensor_parallel=1"):
        numerics.prove_slice(wrong, whole, [columns], torch.float32, None)


@pytest.mark.parametrize(
    ("family", "ranks", "why"),
    [("llama", 4, "can't share 3 heads"), ("deepseek", 4, r"shared_experts.* 48 wide; .* most 3")],
)
def test_what_can_not_be_shared_is_refused(folders, family, ranks, why):
    with pytest.raises(SettingsError, match=rf"engine\.tensor_parallel: 4 processes.*{why}"):
        TorchModel.load(folders(family), threads=1, cuts=Cuts(0, ranks), meet=lambda: None)
