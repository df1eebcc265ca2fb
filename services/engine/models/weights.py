"""Writes a GGUF file's tensors as bf16 safetensors, one at a time, so memory stays flat.

safetensors: eight bytes, the header's length; the header, JSON, padded with spaces to a multiple
of eight; the tensors' bytes. Source: the safetensors format description of Hugging Face.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from services.engine.models.errors import ModelFileError
from services.engine.models.gguf import GgufFile, GgufTensor
from services.engine.models.llama import Weight

_ROWS_AT_ONCE = 4096


def write(
    file: GgufFile, weights: Sequence[Weight], place: Path, advance: Callable[[int], None]
) -> None:
    """Writes `place`, telling `advance` how many numbers more are done.

    Raises ModelFileError, OSError. Every tensor is looked up before the first is written, so a
    truncated file fails at once.
    """
    stored = [stored_bytes(file, w.source) for w in weights]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for w in weights:
        end = offset + 2 * w.source.elements
        header[w.name] = {
            "dtype": "BF16",
            "shape": list(w.source.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(place, "wb") as out:
        out.write(struct.pack("<Q", len(text)))
        out.write(text)
        for w, data in zip(weights, stored, strict=True):
            for piece in _bf16_pieces(file, w, data):
                out.write(piece.data)
                advance(piece.size)


def stored_bytes(file: GgufFile, tensor: GgufTensor) -> npt.NDArray[np.uint8]:
    """A tensor's bytes as stored, uint8 [rows, bytes a row]. Raises ModelFileError."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(tensor.type)
    except ValueError:
        raise ModelFileError(
            file.path, f"tensor {tensor.name} has type {tensor.type}, which is not known"
        ) from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    columns = tensor.shape[-1] if tensor.shape else 1
    if columns % block:
        raise ModelFileError(
            file.path,
            f"tensor {tensor.name} has {columns} columns, not whole {kind.name} blocks of {block}",
        )
    row_bytes = columns // block * block_bytes
    rows = math.prod(tensor.shape[:-1])
    end = tensor.offset + rows * row_bytes
    if end > file.data.size:
        raise ModelFileError(
            file.path,
            f"truncated or damaged: tensor {tensor.name} should end at byte {end}, "
            f"but the file ends at {file.data.size}",
        )
    return file.data[tensor.offset : end].reshape(rows, row_bytes)


def dequantized(
    file: GgufFile, tensor: GgufTensor, rows: npt.NDArray[np.uint8]
) -> npt.NDArray[np.float32]:
    """Numbers of some rows of a tensor, float32 [rows, columns]. Raises ModelFileError."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(tensor.type)
    native = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    try:
        with np.errstate(all="ignore"):  # damage is found in the result
            numbers = dequantize(rows.view(native[kind]) if kind in native else rows, kind)
    except (NotImplementedError, ValueError, KeyError) as error:
        raise ModelFileError(
            file.path, f"tensor {tensor.name} is {kind.name}, which can't be read"
        ) from error
    return np.ascontiguousarray(numbers, dtype=np.float32)


def to_bf16(numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits of the nearest bf16 of each number, ties to even, as uint16. For finite ones."""
    bits = numbers.view(np.uint32)
    odd = (bits >> 16) & 1
    return ((bits + (odd + np.uint32(0x7FFF))) >> 16).astype(np.uint16)


def unpermuted(rows: npt.NDArray[np.uint16], heads: int) -> npt.NDArray[np.uint16]:
    """Rows of Q or K in Hugging Face's order; see llama.Weight."""
    head = rows.shape[0] // heads
    pairs = rows.reshape(heads, head // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _bf16_pieces(
    file: GgufFile, weight: Weight, data: npt.NDArray[np.uint8]
) -> list[npt.NDArray[np.uint16]]:
    """The tensor's bf16 rows in order; Q and K, which move rows about, in one piece."""
    pieces = []
    for at in range(0, data.shape[0], _ROWS_AT_ONCE):
        piece = to_bf16(dequantized(file, weight.source, data[at : at + _ROWS_AT_ONCE]))
        if ((piece & 0x7F80) == 0x7F80).any():
            raise ModelFileError(
                file.path, f"damaged: tensor {weight.source.name} holds numbers that are not finite"
            )
        pieces.append(piece)
    if weight.heads:
        return [unpermuted(np.concatenate(pieces), weight.heads)]
    return pieces


def rope_factors(file: GgufFile, tensor: GgufTensor) -> list[float]:
    """A small tensor as a list. Raises ModelFileError."""
    numbers = dequantized(file, tensor, stored_bytes(file, tensor))
    return [float(n) for n in numbers.ravel()]
