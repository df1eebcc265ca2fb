"""Work on bytes in one process, beside memcpy: checksums, and FP8 both ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtransfer import codecs
from kvtransfer.bench.figures import Row, row, size_words
from kvtransfer.bench.rounds import Subject, take_turns
from kvtransfer.blocks import checksum
from kvtransfer.codecs import Stored

HEADS, WIDTH, TOKENS = 4, 128, 32
PIECE = 2**20
"""Of checksums."""


async def measure(nbytes: int, rounds: int, say: Callable[[str], None]) -> list[Row]:
    """Rows: `nbytes` are read by each subject; memcpy copies as many."""
    say(f"checksums and FP8 ({codecs.implementation()})")
    raw = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
    copied = np.empty_like(raw)
    numbers = np.random.default_rng(1).standard_normal(nbytes // 4, np.float32)
    bf16 = codecs.bf16_encode(np.resize(numbers, nbytes // 2))
    subjects: dict[str, tuple[Subject, float | None]] = {
        "checksum (XXH3-64)": (_checksums(raw), None),
        "FP8 from float32": (_recode(_blocks(numbers), _fp8(nbytes // 4)), 0.5),
        "FP8 from bfloat16": (_recode(_blocks(bf16), _fp8(nbytes // 2)), 0.5),
        "bfloat16 from FP8": (_recode(_full(nbytes), _blocks(np.empty(nbytes, np.uint16))), None),
    }
    rows = []
    for name, (subject, target) in subjects.items():
        times = await take_turns({"memcpy": _memcpy(copied, raw), "ours": subject}, rounds)
        rows.append(
            row(
                name,
                size_words(nbytes),
                nbytes,
                nbytes // PIECE,
                times["ours"],
                against="memcpy of what is read",
                baseline=times["memcpy"],
                target=target,
            )
        )
    return rows


def _memcpy(to: NDArray[Any], from_: NDArray[Any]) -> Subject:
    async def run(number: int) -> None:
        np.copyto(to, from_)

    return run


def _checksums(data: NDArray[np.uint8]) -> Subject:
    async def run(number: int) -> None:
        for at in range(0, len(data), PIECE):
            checksum(data[at : at + PIECE])

    return run


def _recode(source: Stored, sink: Stored) -> Subject:
    async def run(number: int) -> None:
        codecs.recode(source, sink)

    return run


def _blocks(values: NDArray[Any]) -> Stored:
    """[layers, tokens, heads, width], without scales."""
    return Stored(values.reshape(-1, TOKENS, HEADS, WIDTH))


def _fp8(count: int) -> Stored:
    """Room for so many codes, with a scale a token and head."""
    shape = (count // (TOKENS * HEADS * WIDTH), TOKENS, HEADS)
    return Stored(np.zeros((*shape, WIDTH), np.uint8), np.ones((*shape, 1), np.float32))


def _full(count: int) -> Stored:
    stored = _fp8(count)
    stored.values[:] = np.random.default_rng(2).integers(0, 0x7F, stored.values.shape, np.uint8)
    return stored
