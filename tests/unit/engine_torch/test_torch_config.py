from __future__ import annotations

import json

import pytest

from services.engine.models.errors import UnsupportedModelError
from services.engine.torch.config import ModelConfig
from services.engine.torch.model import TorchModel
from services.engine.torch.rope import Rope, scaled_frequencies
from tests.unit.engine_torch import torch_models


def config(**changes):
    return ModelConfig.from_dict({**torch_models.TINY, **changes})


def test_reads_older_and_newer_names_of_rope():
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    older = config(rope_theta=500000.0, rope_scaling=scaling)
    newer = config(rope_theta=None, rope_parameters={**scaling, "rope_theta": 500000.0})
    assert older.rope == newer.rope == Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 64)
    assert config(rope_scaling={"type": "linear", "factor": 2.0}).rope == Rope(
        10000.0, "linear", 2.0
    )


def test_fills_in_what_older_files_leave_out():
    found = dict(torch_models.TINY)
    del found["head_dim"], found["num_key_value_heads"], found["tie_word_embeddings"]
    made = ModelConfig.from_dict(found)
    assert (made.attention.head_dim, made.attention.kv_heads, made.group) == (32, 3, 1)
    assert not made.tied_embeddings


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "original_max_position"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"head_dim": 40}, "head_dim"),
        ({"head_dim": 16}, "head_dim"),
        ({"hidden_size": 100}, "hidden_size"),
        ({"intermediate_size": 100}, "intermediate_size"),
        ({"num_key_value_heads": 2}, "num_key_value_heads"),
    ],
)
def test_refuses_what_it_cannot_compute_by_name(changes, key):
    with pytest.raises(UnsupportedModelError, match=key):
        config(**changes)


def test_refuses_folders_without_a_readable_config(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "expected a JSON object"),
        ({"hidden_size": None}, "hidden_size is missing; expected a whole number"),
        ({"hidden_size": 100}, "hidden_size=100 is not supported"),
    ],
)
def test_says_which_file_it_is_and_that_a_key_is_missing(tmp_path, content, words):
    file = tmp_path / "config.json"
    text = content if isinstance(content, str) else json.dumps({**torch_models.TINY, **content})
    file.write_text(text)
    with pytest.raises(UnsupportedModelError, match=f"{file}: {words}") as caught:
        ModelConfig.from_folder(tmp_path)
    assert caught.value.metadata["file"] == str(file)


def test_llama3_scaling_has_three_ranges():
    rope = Rope(10000.0, "llama3", factor=8.0, low=1.0, high=4.0, original_positions=64)
    # 64 positions are 10 turns, 2.5 turns (half way from low to high), and 0.5.
    frequencies = [turns * 2 * 3.141592653589793 / 64 for turns in (10, 2.5, 0.5)]
    fast, middle, slow = scaled_frequencies(frequencies, rope)
    assert fast == frequencies[0]
    assert middle == pytest.approx(frequencies[1] * (0.5 + 0.5 / 8))
    assert slow == frequencies[2] / 8


def load(folder, **options):
    return TorchModel.load(folder, **{"dtype": "float32", "threads": 1, **options})


def test_a_sharded_folder_is_the_same_model(tmp_path):
    one = load(torch_models.write(tmp_path / "one"), model_name="m")
    two = load(torch_models.write(tmp_path / "two", shards=3), model_name="m")
    assert one.numerics == two.numerics
    assert one.layout.fingerprint == two.layout.fingerprint


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tie_word_embeddings": False}, r"lm_head\.weight"),
        ({"vocab_size": 336}, r"model\.safetensors: .*expected \(336, 96\)"),
    ],
)
def test_says_which_tensor_is_missing_or_of_another_shape(tmp_path, changes, words):
    torch_models.write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**torch_models.TINY, **changes}))
    with pytest.raises(UnsupportedModelError, match=words):
        load(tmp_path)


def test_says_which_file_is_damaged_or_missing(tmp_path):
    weights = torch_models.write(tmp_path) / "model.safetensors"
    weights.write_bytes(b"\x10\0\0\0\0\0\0\0rubbish")
    with pytest.raises(UnsupportedModelError, match=r"model\.safetensors"):
        load(tmp_path)
    weights.unlink()
    with pytest.raises(UnsupportedModelError, match="neither"):
        load(tmp_path)


def test_refuses_other_devices(tmp_path):
    with pytest.raises(ValueError, match="cuda"):
        load(torch_models.write(tmp_path), device="cuda")
