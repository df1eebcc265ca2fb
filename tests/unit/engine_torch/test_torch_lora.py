"""LoRA adapters: equal to merged weights, and bit for bit the same whoever is in the batch."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from services.engine.adapters import AdapterLimits, read_files
from services.engine.models.errors import UnsupportedAdapterError
from services.engine.torch.model import TorchModel
from services.runtime.errors import AdapterLimitError
from tests.unit.engine_torch import torch_adapters, torch_deepseek, torch_models
from tests.unit.engine_torch.torch_adapters import ATTENTION, LIMITS, MLP
from tests.unit.engine_torch.torch_models import batch, sequences

EXACT = {"dtype": "float32", "kv_dtype": "float32", "threads": 1}


def advance(model, parts, adapters):
    """One step of (sequence, tokens) each with an adapter; logits of each."""
    logits = model.forward(replace(batch(parts), adapters=tuple(adapters)))
    for sequence, count in parts:
        sequence.done += count
    return np.split(logits, np.cumsum([count for _, count in parts])[:-1])


def whole(model, length, adapter=""):
    """Logits of a sequence of that length, computed alone and in one step."""
    (sequence,) = sequences(model, [length])
    return advance(model, [(sequence, length)], [adapter])[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny Llama, and adapters of several kinds."""
    root = tmp_path_factory.mktemp("lora")
    model = torch_models.write(root / "model", tie_word_embeddings=False)

    def adapter(name, targets, **more):
        return torch_adapters.write(root / name, model, targets, **more)

    adapter("all", (*ATTENTION, *MLP), seed=1)
    adapter("attention", ("q_proj", "v_proj"), seed=2, rank=4, dtype=torch.bfloat16)
    adapter("stabilized", ("k_proj", "o_proj", "down_proj"), seed=3, rank=20, use_rslora=True)
    adapter(
        "patterns",
        (*ATTENTION, "up_proj"),
        seed=4,
        rank=8,
        rank_pattern={"layers.1.self_attn.q_proj": 24, "up_proj": 2},
        alpha_pattern={"self_attn.v_proj": 3},
    )
    adapter("head", ("lm_head", "q_proj"), seed=5)
    return root


ADAPTERS = ("all", "attention", "stabilized", "patterns", "head")


@pytest.fixture(scope="module")
def deepseeks(tmp_path_factory):
    """A tiny DeepSeek V3, and adapters; one changes shared experts and dense layers, too."""
    root = tmp_path_factory.mktemp("lora-deepseek")
    model = torch_deepseek.write(root / "model", num_nextn_predict_layers=0)
    latent = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")
    torch_adapters.write(root / "all", model, (*latent, *MLP), seed=6)
    torch_adapters.write(root / "latent", model, latent[2:], seed=7, rank=3)
    return root


DEEPSEEKS = ("all", "latent")


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_its_merged_weights(folders, tmp_path, name):
    model = TorchModel.load(folders / "model", **EXACT)
    adapter = torch_adapters.load(model, name, folders / name)
    merged = torch_adapters.merge(tmp_path / "merged", folders / "model", folders / name)
    expected = whole(TorchModel.load(merged, **EXACT), 90)
    found, base = whole(model, 90, adapter), whole(model, 90)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    # It is not that the adapter does nothing.
    assert np.abs(base - expected).max() > 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("name", DEEPSEEKS)
def test_an_adapter_of_deepseek_is_its_merged_weights(deepseeks, tmp_path, name):
    model = TorchModel.load(deepseeks / "model", **EXACT)
    adapter = torch_adapters.load(model, name, deepseeks / name)
    merged = torch_adapters.merge(tmp_path / "merged", deepseeks / "model", deepseeks / name)
    expected = whole(TorchModel.load(merged, **EXACT), 90)
    found, base = whole(model, 90, adapter), whole(model, 90)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(base - expected).max() > 0.1 * np.abs(expected).max()


@pytest.fixture(scope="module", params=["bfloat16", "float32", "deepseek"])
def loaded(request, folders, deepseeks):
    """A model with all adapters, their ids, and the model without any."""
    options = {"dtype": "bfloat16", "kv_dtype": "fp8_e4m3", "threads": 1}
    root, names = (deepseeks, DEEPSEEKS) if request.param == "deepseek" else (folders, ADAPTERS)
    if request.param == "float32":
        options["dtype"] = "float32"
    model, fresh = (TorchModel.load(root / "model", **options) for _ in range(2))
    return model, [torch_adapters.load(model, name, root / name) for name in names], fresh


def test_without_an_adapter_the_bits_are_the_bases(loaded):
    model, adapters, fresh = loaded
    assert fresh.numerics == model.numerics
    expected = whole(fresh, 70)
    lengths = [70, 33, 50]
    parts = [(s, n) for s, n in zip(sequences(model, lengths), lengths, strict=True)]
    found = advance(model, parts, ["", adapters[0], adapters[1]])
    assert np.array_equal(found[0], expected)


def test_bits_depend_on_nobody_else_and_on_no_chunk(loaded):
    """Each with an adapter of its own, or none: in chunks side by side, and token by token."""
    model, adapters, _ = loaded
    who = [*adapters, ""]
    lengths = [90, 61, 47, 70, 33, 90][: len(who)]
    alone = [whole(model, n, a) for n, a in zip(lengths, who, strict=True)]
    some = sequences(model, lengths)
    random = np.random.default_rng(7)
    found = [[] for _ in some]
    while any(s.done < len(s.tokens) for s in some):
        left = [i for i, s in enumerate(some) if s.done < len(s.tokens)]
        random.shuffle(left)
        left = left[: random.integers(1, len(left) + 1)]
        parts = [
            (s, int(min(len(s.tokens) - s.done, random.choice([1, 1, 7, 29]))))
            for s in (some[i] for i in left)
        ]
        for i, logits in zip(left, advance(model, parts, [who[i] for i in left]), strict=True):
            found[i].append(logits)
    for mine, expected in zip(found, alone, strict=True):
        assert np.array_equal(np.concatenate(mine), expected)


def test_one_sequence_with_each_adapter_gives_different_logits(loaded):
    model, adapters, _ = loaded
    rows = {whole(model, 40, a)[-1].tobytes() for a in (*adapters, "")}
    assert len(rows) == len(adapters) + 1


def test_a_step_with_an_adapter_that_is_not_here_raises_before_it_computes(loaded):
    model, *_ = loaded
    (sequence,) = sequences(model, [8])
    with pytest.raises(ValueError, match="adapters: legal@0 not loaded"):
        advance(model, [(sequence, 8)], ["legal@0"])


@pytest.mark.peer
def test_greedy_tokens_are_those_of_transformers_with_merged_weights(folders, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = TorchModel.load(folders / "model", **EXACT)
    names = ("all", "attention")
    who = [torch_adapters.load(model, name, folders / name) for name in names]
    some = sequences(model, [60, 60])
    prompts = [s.tokens[:20].copy() for s in some]
    for _ in range(40):
        parts = [(s, max(1, 20 - s.done)) for s in some]
        for sequence, logits in zip(some, advance(model, parts, who), strict=True):
            if sequence.done < 60:
                sequence.tokens[sequence.done] = logits[-1].argmax()
    for name, sequence, prompt in zip(names, some, prompts, strict=True):
        merged = torch_adapters.merge(tmp_path / name, folders / "model", folders / name)
        peer = transformers.LlamaForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
        with torch.inference_mode():
            said = peer.generate(
                torch.from_numpy(prompt.astype(np.int64))[None],
                attention_mask=torch.ones((1, len(prompt)), dtype=torch.int64),
                max_new_tokens=40,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert said[0].tolist() == sequence.tokens.tolist()


class TestRefusals:
    @pytest.fixture
    def model(self, folders):
        return TorchModel.load(folders / "model", batch_invariant=False, threads=1)

    @pytest.fixture
    def adapter(self, folders, tmp_path):
        return torch_adapters.write(tmp_path / "a", folders / "model", ("q_proj", "o_proj"))

    def read(self, model, folder, limits=LIMITS):
        return model.adapters.read(read_files("a", folder, limits), limits)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("peft_type", "IA3"),
            ("bias", "all"),
            ("fan_in_fan_out", True),
            ("use_dora", True),
            ("modules_to_save", ["lm_head"]),
            ("layer_replication", [[0, 1]]),
            ("init_lora_weights", "pissa_niter_4"),
            ("rank_pattern", {"^q_proj$": 3}),
            ("r", 0),
            ("r", "8"),
            ("lora_alpha", None),
            pytest.param("lora_alpha", 10**400, id="lora_alpha-beyond-float64"),
            ("lora_alpha", 1e300),
            ("use_rslora", "yes"),
        ],
    )
    def test_a_setting_that_is_not_computed(self, model, adapter, key, value):
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
        with pytest.raises(UnsupportedAdapterError, match=key):
            self.read(model, adapter)

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("model.layers.0.mlp.experts.3.up_proj.lora_A.weight", "experts' layers take no"),
            ("model.layers.0.self_attn.kv_b_proj.lora_A.weight", "absorbed into the attention"),
            ("model.layers.0.mlp.gate.lora_A.weight", "router"),
            ("model.layers.9.self_attn.q_proj.lora_A.weight", "no such module"),
            ("model.layers.0.self_attn.q_proj.lora_magnitude_vector", "not a LoRA matrix"),
            ("model.layers.0.self_attn.q_proj.lora_B.bias", "not a LoRA matrix"),
        ],
    )
    def test_a_tensor_that_has_no_place(self, model, adapter, name, words):
        file = adapter / "adapter_model.safetensors"
        save_file(load_file(file) | {f"base_model.model.{name}": torch.zeros(8, 96)}, file)
        with pytest.raises(UnsupportedAdapterError, match=words):
            self.read(model, adapter)

    def test_a_matrix_that_is_there_under_two_names(self, model, adapter):
        file = adapter / "adapter_model.safetensors"
        whole = load_file(file)
        key = "model.layers.0.self_attn.q_proj.lora_B.weight"
        save_file(whole | {key: whole[f"base_model.model.{key}"].clone()}, file)
        with pytest.raises(UnsupportedAdapterError, match=r"q_proj\.lora_B.* is there twice"):
            self.read(model, adapter)

    def test_a_matrix_of_another_shape_or_without_its_other_half(self, model, adapter):
        file = adapter / "adapter_model.safetensors"
        whole = load_file(file)
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
        save_file(whole | {key: torch.zeros(95, 8)}, file)
        with pytest.raises(UnsupportedAdapterError, match=r"expected floats \(96, 8\)"):
            self.read(model, adapter)
        save_file({k: v for k, v in whole.items() if k != key}, file)
        with pytest.raises(UnsupportedAdapterError, match=r"no tensor .*q_proj\.lora_B"):
            self.read(model, adapter)
        save_file(whole | {key: torch.full((96, 8), torch.nan)}, file)
        with pytest.raises(UnsupportedAdapterError, match="not all are numbers"):
            self.read(model, adapter)

    def test_a_scale_that_makes_weights_infinite(self, model, adapter):
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 3e38}))
        file = adapter / "adapter_model.safetensors"
        save_file({name: 1e3 * matrix for name, matrix in load_file(file).items()}, file)
        with pytest.raises(UnsupportedAdapterError, match="scaled by lora_alpha"):
            self.read(model, adapter)

    @pytest.mark.parametrize("size", [0, 7, 100, 2000])
    def test_a_damaged_file(self, model, adapter, size):
        file = adapter / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(UnsupportedAdapterError, match=r"adapter_model\.safetensors"):
            self.read(model, adapter)

    def test_a_rank_beyond_the_limit(self, model, adapter):
        with pytest.raises(AdapterLimitError, match=r"engine\.max_adapter_rank is 4"):
            self.read(model, adapter, AdapterLimits(8, 4, 2**24))
