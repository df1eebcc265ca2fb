"""Numbers: rounding, order of rows, dequantizing, the safetensors file."""

from pathlib import Path
from typing import Any

import gguf as reference
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file

from services.engine.models import gguf, llama, weights
from services.engine.models.errors import ModelFileError

Q = reference.GGMLQuantizationType
ANY_NUMBER = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(hnp.arrays(np.float32, st.integers(1, 50), elements=ANY_NUMBER))
def test_bf16_is_rounded_as_torch_rounds(numbers: np.ndarray) -> None:
    expected = torch.from_numpy(numbers.copy()).bfloat16().view(torch.uint16).numpy()
    np.testing.assert_array_equal(weights.to_bf16(numbers), expected)


def test_bf16_ties_go_to_even() -> None:
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF], np.uint32).view(np.float32)
    assert weights.to_bf16(ties).tolist() == [0x3F80, 0x3F82, 0x3F81, 0x3F80]


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_unpermuting_undoes_what_llama_cpp_does(heads: int, half: int, columns: int) -> None:
    rows = heads * half * 2
    original = np.arange(rows * columns, dtype=np.uint16).reshape(rows, columns)
    # llama.cpp, row by row: row i of a head's first half goes to 2i, of its second to 2i + 1.
    permuted = np.empty_like(original)
    for head in range(heads):
        base = head * half * 2
        for i in range(half):
            permuted[base + 2 * i] = original[base + i]
            permuted[base + 2 * i + 1] = original[base + half + i]
    np.testing.assert_array_equal(weights.unpermuted(permuted, heads), original)


@pytest.mark.parametrize("kind", [Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q5_1, Q.Q8_0])
def test_quantized_tensors_are_the_reference_librarys(
    make_gguf: Any, tmp_path: Path, kind: Q
) -> None:
    name = "blk.1.ffn_gate.weight"
    original = np.random.default_rng(1).normal(size=(96, 64)).astype(np.float32)
    file = gguf.read(make_gguf(tensors={name: original}, types={name: kind}))
    tensors = llama.weights_of(file, llama.shape_of(file))
    weights.write(file, tensors, tmp_path / "model.safetensors", lambda more: None)
    stored = reference.quants.quantize(original, kind)
    expected = torch.from_numpy(
        np.ascontiguousarray(reference.quants.dequantize(stored, kind), np.float32)
    )
    found = load_file(tmp_path / "model.safetensors")["model.layers.1.mlp.gate_proj.weight"]
    assert torch.equal(found, expected.bfloat16())


def test_progress_counts_every_number_once(tiny_gguf: Path, tmp_path: Path) -> None:
    file = gguf.read(tiny_gguf)
    tensors = llama.weights_of(file, llama.shape_of(file))
    seen: list[int] = []
    weights.write(file, tensors, tmp_path / "model.safetensors", seen.append)
    assert sum(seen) == sum(t.elements for t in file.tensors.values())
    assert sum(t.numel() for t in load_file(tmp_path / "model.safetensors").values()) == sum(seen)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_damage(make_gguf: Any, tmp_path: Path, bad: float) -> None:
    norm = np.ones(64, np.float32)
    norm[5] = bad
    file = gguf.read(make_gguf(tensors={"output_norm.weight": norm}))
    tensors = llama.weights_of(file, llama.shape_of(file))
    with pytest.raises(ModelFileError, match=r"tensor output_norm\.weight holds numbers"):
        weights.write(file, tensors, tmp_path / "model.safetensors", lambda more: None)
