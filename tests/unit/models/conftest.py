"""Small models, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HIDDEN, WIDE, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "Ã ©"]


def vocabulary() -> list[str]:
    """Control tokens, the 256 bytes, the results of MERGES."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return CONTROL + alphabet + [m.replace(" ", "") for m in MERGES]


def llama_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights of a tiny Llama, under GGUF's names, in GGUF's order of rows."""
    random = np.random.default_rng(seed)
    head = HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(vocabulary()), HIDDEN)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (HIDDEN,),
            f"blk.{i}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{i}.attn_k.weight": (KV_HEADS * head, HIDDEN),
            f"blk.{i}.attn_v.weight": (KV_HEADS * head, HIDDEN),
            f"blk.{i}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{i}.ffn_norm.weight": (HIDDEN,),
            f"blk.{i}.ffn_gate.weight": (WIDE, HIDDEN),
            f"blk.{i}.ffn_up.weight": (WIDE, HIDDEN),
            f"blk.{i}.ffn_down.weight": (HIDDEN, WIDE),
        }
    shapes["output_norm.weight"] = (HIDDEN,)
    return {name: random.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def llama_metadata() -> dict[str, Any]:
    return {
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": WIDE,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": vocabulary(),
        "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * (len(vocabulary()) - len(CONTROL)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def write_gguf(
    path: Path,
    metadata: dict[str, Any],
    tensors: dict[str, np.ndarray],
    types: dict[str, gguf.GGMLQuantizationType] | None = None,
    architecture: str = "llama",
) -> Path:
    """Writes by the reference library. `types`: how tensors are stored, where not as they are."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        kind = (types or {}).get(name)
        if kind is None:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny Llama in float32."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(path, llama_metadata(), llama_tensors())


def byte_level_tokenizer() -> Tokenizer:
    """256 bytes, a few merges, control tokens, and added tokens that are text."""
    tokens = vocabulary()
    tokenizer = Tokenizer(
        models.BPE(
            vocab={t: i for i, t in enumerate(tokens)},
            merges=[tuple(m.split(" ")) for m in MERGES],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False) for t in ("<think>", "</think>", "\uff5c思考\uff5c", "é ")]
    )
    return tokenizer


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    """A Hugging Face folder without weights; tests change files in it."""
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    write_json(
        tmp_path / "config.json",
        {
            "max_position_embeddings": 128,
            "vocab_size": 300,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    )
    write_json(
        tmp_path / "tokenizer_config.json",
        {"chat_template": TEMPLATE, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    )
    return tmp_path


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture(scope="session")
def tokenizer_file() -> Tokenizer:
    return byte_level_tokenizer()


@pytest.fixture
def make_gguf(tmp_path: Path) -> Any:
    """A tiny Llama with some metadata and tensors replaced; None removes."""

    def make(
        metadata: dict[str, Any] | None = None,
        tensors: dict[str, Any] | None = None,
        name: str = "made.gguf",
        **more: Any,
    ) -> Path:
        keys = {k: v for k, v in (llama_metadata() | (metadata or {})).items() if v is not None}
        data = {k: v for k, v in (llama_tensors() | (tensors or {})).items() if v is not None}
        return write_gguf(tmp_path / name, keys, data, **more)

    return make
