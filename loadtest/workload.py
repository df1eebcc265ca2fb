"""What each request asks: a pure function of (workload, index), so that runs can be repeated.

Prompts are token ids drawn uniformly from a range of the vocabulary: no tokenizer is needed, and
lengths are exact. Randomness of request i comes from (seed, i) alone, so it does not matter in
which order requests are made, or how many of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from loadtest.lengths import Lengths
from loadtest.traces import MOONCAKE_BLOCK_TOKENS, TraceRow

_REQUEST, _PREFIX, _BLOCK = 10, 11, 12
"""What is drawn, as the first part of the random stream's key; arrivals.py uses 0 to 2."""


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """How answers are sampled; None leaves a field to the server's default."""

    temperature: float | None = 0.0
    top_k: int | None = None
    top_p: float | None = None
    ignore_eos: bool = True
    """Answers have exactly the output length asked for."""


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """One request to make."""

    index: int
    token_ids: NDArray[np.uint32]
    max_tokens: int
    seed: int
    """Of sampling."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """Lengths of one request, and where its leading tokens come from."""

    input_tokens: int
    output_tokens: int
    shared: tuple[tuple[tuple[int, ...], int], ...] = ()
    """(key of a random stream, tokens of it), in order; what is left of the prompt is its own."""


class Source(Protocol):
    """Shapes of requests."""

    def shape(self, index: int, random: np.random.Generator) -> _Shape:
        """Of request `index`; `random` is the request's own stream."""


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Independent lengths; a share of the prompts begins with one of a few common prefixes.

    The prefix is part of the prompt's drawn length, and cut where it would leave the request
    without a token of its own.
    """

    input_tokens: Lengths
    output_tokens: Lengths
    prefix_share: float = 0.0
    prefix_tokens: int = 0
    prefixes: int = 1

    def shape(self, index: int, random: np.random.Generator) -> _Shape:
        """See Source."""
        given = self.input_tokens.sample(random)
        asked = self.output_tokens.sample(random)
        which = int(random.integers(self.prefixes))
        shares = random.random() < self.prefix_share
        length = min(self.prefix_tokens, given - 1) if shares else 0
        return _Shape(given, asked, (((_PREFIX, which), length),) if length else ())


@dataclass(frozen=True, slots=True)
class Recorded:
    """Lengths and shared prefixes of a trace, its rows from the first on, over again at the end.

    `scale` multiplies all lengths, blocks too, so that shared prefixes stay as large a part of
    the prompts. Lengths above `max_input` or `max_output` are cut there; `cut_rows` counts.
    """

    rows: Sequence[TraceRow]
    scale: float = 1.0
    max_input: int | None = None
    max_output: int | None = None

    def shape(self, index: int, random: np.random.Generator) -> _Shape:
        """See Source. Each pass over the rows has prefixes of its own."""
        again, number = divmod(index, len(self.rows))
        row = self.rows[number]
        given, asked = self._cut(row)
        shared, left = [], given
        for content, block in zip(row.hash_ids, self._blocks(row), strict=True):
            take = min(block, left)
            if take:
                shared.append(((_BLOCK, again, content), take))
            left -= take
        return _Shape(given, asked, tuple(shared))

    @property
    def cut_rows(self) -> int:
        """Rows whose input or output is longer than allowed here."""
        return sum(self._cut(row) != self._uncut(row) for row in self.rows)

    def rows_over(self, window_tokens: int) -> int:
        """Rows whose input and output, cut, are more than this together."""
        return sum(sum(self._cut(row)) > window_tokens for row in self.rows)

    def _cut(self, row: TraceRow) -> tuple[int, int]:
        given, asked = self._uncut(row)
        return min(given, self.max_input or given), min(asked, self.max_output or asked)

    def _uncut(self, row: TraceRow) -> tuple[int, int]:
        blocks = self._blocks(row)
        given = sum(blocks) if blocks else max(1, round(row.input_tokens * self.scale))
        return given, max(1, round(row.output_tokens * self.scale))

    def _blocks(self, row: TraceRow) -> list[int]:
        """Scaled tokens of each block that the row names."""
        if not row.hash_ids:
            return []
        full = max(1, round(MOONCAKE_BLOCK_TOKENS * self.scale))
        last = row.input_tokens - MOONCAKE_BLOCK_TOKENS * (len(row.hash_ids) - 1)
        return [full] * (len(row.hash_ids) - 1) + [min(full, max(1, round(last * self.scale)))]


@dataclass(frozen=True, slots=True)
class Workload:
    """All requests of a run."""

    source: Source
    seed: int
    first_token: int
    """Least token id drawn."""
    end_token: int
    """One above the greatest."""
    sampling: SamplingSpec = field(default_factory=SamplingSpec)

    def request(self, index: int) -> RequestPlan:
        """The request at `index`, >= 0."""
        random = self._stream((_REQUEST, index))
        shape = self.source.shape(index, random)
        parts = [self._tokens(self._stream(key), count) for key, count in shape.shared]
        own = shape.input_tokens - sum(count for _, count in shape.shared)
        parts.append(self._tokens(random, own))
        seed = int(random.integers(1 << 63))
        return RequestPlan(index, np.concatenate(parts), shape.output_tokens, seed)

    def _tokens(self, random: np.random.Generator, count: int) -> NDArray[np.uint32]:
        # Drawn in one call, so the shorter of two draws from one stream is a prefix of the longer.
        return random.integers(self.first_token, self.end_token, count, dtype=np.uint32)

    def _stream(self, key: tuple[int, ...]) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))
