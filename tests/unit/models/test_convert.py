"""A GGUF file becomes a folder that transformers, and so anyone, loads as the same model."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.engine.models import cache, convert, llama
from services.engine.models.errors import ModelFileError, ModelSpaceError
from services.engine.models.folder import ModelFolder, check_weights
from services.engine.models.text import Tokenizer


def converted(path: Path, parent: Path) -> Path:
    return convert.convert(path, cache.sha256_of(path), parent)


@pytest.mark.peer
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_weights_that_went_in(
    make_gguf: Any, tmp_path: Path, tied: bool
) -> None:
    """transformers' own Llama, written as GGUF the way llama.cpp does, comes back the same."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    state = {k: v.float().numpy() for k, v in model.state_dict().items()}

    def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
        halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1)
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)

    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    if not tied:
        tensors["output.weight"] = state["lm_head.weight"]
    names = {
        "attn_norm": "input_layernorm",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for i in range(2):
        at = f"model.layers.{i}"
        for gguf_name, name in names.items():
            tensors[f"blk.{i}.{gguf_name}.weight"] = state[f"{at}.{name}.weight"]
        for part, heads in (("q", 4), ("k", 2)):
            rows = state[f"{at}.self_attn.{part}_proj.weight"]
            tensors[f"blk.{i}.attn_{part}.weight"] = permuted(rows, heads)

    folder = converted(make_gguf(tensors=tensors), tmp_path / "cache")
    back = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert back.config.tie_word_embeddings is tied
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    model.save_pretrained(tmp_path / "original")
    ids = torch.arange(40).reshape(1, 40)
    with torch.inference_mode():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
            for path in (folder, tmp_path / "original")
        )
    assert torch.equal(ours, theirs)


def test_the_folder_says_what_the_file_says(tiny_gguf: Path, tmp_path: Path) -> None:
    folder = ModelFolder(converted(tiny_gguf, tmp_path), "tiny")
    assert (folder.context_tokens, folder.vocabulary) == (128, 264)
    assert (folder.bos_token_id, folder.eos_token_ids) == (1, (2,))
    assert folder.config["rms_norm_eps"] == 1e-5
    assert folder.config["rope_theta"] == 10000.0
    assert folder.config["tie_word_embeddings"] is True
    check_weights(folder.path)
    manifest = json.loads((folder.path / convert.MANIFEST).read_text())
    assert set(manifest["sha256"]) == {p.name for p in folder.path.iterdir()} - {convert.MANIFEST}


def test_a_second_conversion_is_the_first(tiny_gguf: Path, tmp_path: Path) -> None:
    folder = converted(tiny_gguf, tmp_path)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    stages: list[convert.Progress] = []
    again = convert.convert(tiny_gguf, cache.sha256_of(tiny_gguf), tmp_path, stages.append)
    assert (again, stages) == (folder, [])
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_other_bytes_are_another_folder(make_gguf: Any, tmp_path: Path) -> None:
    first = make_gguf(name="a.gguf")
    second = make_gguf({"llama.context_length": 64}, name="b.gguf")
    assert converted(first, tmp_path / "c") != converted(second, tmp_path / "c")


def test_progress_ends_at_its_total(tiny_gguf: Path, tmp_path: Path) -> None:
    seen: list[convert.Progress] = []
    convert.convert(tiny_gguf, cache.sha256_of(tiny_gguf), tmp_path, seen.append)
    assert {p.stage for p in seen} == {"convert"}
    assert seen[-1].done == seen[-1].total
    assert [p.done for p in seen] == sorted(p.done for p in seen)


def test_a_failed_conversion_leaves_nothing(make_gguf: Any, tmp_path: Path) -> None:
    norm = np.full(64, np.nan, np.float32)  # the last tensor written
    path = make_gguf(tensors={"output_norm.weight": norm})
    with pytest.raises(ModelFileError):
        converted(path, tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [".lock"]


def test_what_a_killed_one_left_is_swept(tiny_gguf: Path, tmp_path: Path) -> None:
    left = tmp_path / ".part-dead" / "hf-x"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    folder = converted(tiny_gguf, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", folder.name]


def test_a_full_disk_is_said_before_it_is_full(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ModelSpaceError, match="the disk has 0 MB free"):
        converted(tiny_gguf, tmp_path)


def _convert_in_child(path: Path, parent: Path, start: Any, results: Any) -> None:
    start.wait()
    stages: list[str] = []
    folder = convert.convert(path, cache.sha256_of(path), parent, lambda p: stages.append(p.stage))
    results.put((str(folder), "convert" in stages))


def test_of_processes_at_once_one_converts(tiny_gguf: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(4), context.Queue()
    children = [
        context.Process(target=_convert_in_child, args=(tiny_gguf, tmp_path, start, results))
        for _ in range(4)
    ]
    for child in children:
        child.start()
    found = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert len({folder for folder, _ in found}) == 1
    assert sum(worked for _, worked in found) == 1


@pytest.mark.parametrize(
    ("metadata", "tensors", "says"),
    [
        ({"llama.expert_count": 8}, {}, "llama.expert_count: experts are not supported"),
        ({"llama.block_count": None}, {}, "metadata key llama.block_count is missing"),
        ({"llama.block_count": 3}, {}, "tensor blk.2.attn_norm.weight is missing"),
        ({"llama.block_count": 0}, {}, "llama.block_count is 0, must be at least 1"),
        ({"llama.attention.head_count_kv": 3}, {}, "head_count_kv is 3, which does not divide 4"),
        ({"llama.rope.dimension_count": 8}, {}, "dimension_count is 8, only the head's 16 can be"),
        ({"llama.rope.scaling.type": "yarn"}, {}, "llama.rope.scaling.type is 'yarn'"),
        ({}, {"output_norm.weight": None}, "tensor output_norm.weight is missing"),
        ({}, {"output_norm.weight": np.ones(8, np.float32)}, "weight is [8], expected [64]"),
        ({}, {"blk.0.attn_q.bias": np.ones(64, np.float32)}, "blk.0.attn_q.bias has no place"),
        ({}, {"rope_freqs.weight": np.arange(8, dtype=np.float32) + 1}, "not the scaling of Llama"),
        ({"tokenizer.ggml.model": "llama"}, {}, "tokenizer.ggml.model is 'llama'; only 'gpt2'"),
        ({"tokenizer.ggml.pre": "new"}, {}, "tokenizer.ggml.pre is 'new'; known are smollm"),
        ({"tokenizer.ggml.pre": None}, {}, "metadata key tokenizer.ggml.pre is missing"),
        ({"tokenizer.ggml.merges": ["a b"]}, {}, "merges: 'a b' does not merge two tokens"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, {}, "tokens: 'a' occurs twice"),
        ({"tokenizer.ggml.token_type": [1, 1]}, {}, "has 2 entries for 264 tokens"),
        ({"tokenizer.ggml.bos_token_id": 999}, {}, "bos_token_id is 999, there are 264 tokens"),
    ],
)
def test_what_cannot_be_served_is_named(
    make_gguf: Any, tmp_path: Path, metadata: dict, tensors: dict, says: str
) -> None:
    with pytest.raises(ModelFileError) as caught:
        converted(make_gguf(metadata, tensors), tmp_path / "cache")
    assert says in caught.value.message


def test_another_architecture_is_named(make_gguf: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"general\.architecture is 'mamba'"):
        converted(make_gguf(architecture="mamba"), tmp_path / "cache")


@pytest.mark.peer
def test_scaling_of_llama_3_1_is_found_in_its_factors(make_gguf: Any, tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theirs = LlamaConfig(
        hidden_size=64, num_attention_heads=4, rope_theta=500000.0, rope_scaling=dict(scaling)
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, device="cpu")
    plain = 500000.0 ** -(torch.arange(0, 16, 2) / 16)
    path = make_gguf(
        {"llama.rope.freq_base": 500000.0}, {llama.ROPE_FACTORS: (plain / scaled).numpy()}
    )
    folder = ModelFolder(converted(path, tmp_path / "cache"), "x")
    assert folder.config["rope_scaling"] == scaling


def test_more_ends_than_one(make_gguf: Any, tmp_path: Path) -> None:
    path = make_gguf({"tokenizer.ggml.eot_token_id": 0})
    assert ModelFolder(converted(path, tmp_path / "cache"), "x").eos_token_ids == (0, 2)


@pytest.mark.parametrize(
    ("kind", "text", "pieces"),
    [
        ("smollm", "in 2024 it's", ["in", " ", "2", "0", "2", "4", " it", "'s"]),
        ("gpt-2", "in 2024 it's", ["in", " 2024", " it", "'s"]),
        ("llama-bpe", "in 2024 IT'S", ["in", " ", "202", "4", " IT", "'S"]),
        ("qwen2", "in 2024 IT'S", ["in", " ", "2", "0", "2", "4", " IT", "'S"]),
        ("llama-bpe", "a\n\n  b", ["a", "\n\n", " ", " b"]),
    ],
)
def test_pre_tokenizers_cut_as_published(kind: str, text: str, pieces: list[str]) -> None:
    from services.engine.models.vocabulary import PRE_TOKENIZERS

    found = [text[a:b] for _, (a, b) in PRE_TOKENIZERS[kind]().pre_tokenize_str(text)]
    assert found == pieces


def test_the_beginning_of_sequence_is_added_if_the_file_says_so(
    make_gguf: Any, tmp_path: Path
) -> None:
    folder = converted(make_gguf({"tokenizer.ggml.add_bos_token": True}), tmp_path / "cache")
    tokenizer = Tokenizer(ModelFolder(folder, "x"))
    plain = converted(make_gguf(name="plain.gguf"), tmp_path / "cache")
    without = Tokenizer(ModelFolder(plain, "x"))
    assert tokenizer.encode("the") == [1, *without.encode("the")]
    messages = [{"role": "user", "content": "the"}]
    assert tokenizer.encode_chat(messages) == without.encode_chat(messages)
