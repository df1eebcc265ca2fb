"""What a step gives to a model, and what a model is to the engine around it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvtransfer.layout import KvLayout
from services.engine.adapters import Adapter, AdapterFiles, AdapterLimits
from services.engine.api import ExpertMap, ExpertMove, ExpertShape
from services.engine.stepped.rounds import Rounds
from services.engine.stepped.scheduler import Work
from services.engine.stepped.sequence import Sequence

Int32s = NDArray[np.int32]
AfterLayers = Callable[[int, int], None]
"""Called with (first layer, layers) when the KV of these layers is final for the whole batch."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """T tokens of S sequences, sequence by sequence, of which R are followed by a sampled one.

    Sequence s owns rows query_starts[s]:query_starts[s + 1]; its context is positions 0 up to its
    last row's, and its KV stands in the blocks of block_tables[s].
    """

    token_ids: Int32s
    """[T]"""
    positions: Int32s
    """[T]"""
    query_starts: Int32s
    """[S + 1]"""
    block_tables: Int32s
    """[S, B], rows padded with -1"""
    logit_rows: Int32s
    """[R], indices into T, ascending"""
    fresh: Int32s | None = None
    """[S]: first position of each sequence whose KV is written. Rows before it (one at most) are
    computed again for their hidden state, over KV that stands. None: all are written."""
    adapters: tuple[str, ...] = ()
    """[S]: LoRA adapter of each sequence, name@digest, empty for none; (): none at all."""
    hidden: bool = False
    """Keep the hidden states of all rows until draft() has used them."""
    draft_calls: int = 0
    """How many calls of draft() follow: at least one where there is a Drafter, some perhaps without
    a row; 0 where there is none."""


@dataclass(frozen=True, slots=True)
class DraftBatch:
    """T rows of S sequences for a multi-token prediction layer; fields as in StepBatch.

    A row at position j takes the token there and the hidden state of position j - 1: so the KV that
    it writes at j depends on tokens 0..j alone, as every block's does. Its logits are of the token
    at j + 1. Position 0 has a row too, so that no slot is left unwritten.
    """

    token_ids: Int32s
    positions: Int32s
    query_starts: Int32s
    block_tables: Int32s
    logit_rows: Int32s
    hidden_rows: Int32s
    """[T]: row of the forward() before, or of the draft() before, whose hidden state is taken; -1
    for position 0, which has none: zeros stand for it."""
    deeper: bool = False
    """hidden_rows are rows of the last draft()."""
    adapters: tuple[str, ...] = ()


class Model(Protocol):
    """Computes logits over a KV pool that it is bound to. Called on one thread at a time."""

    @property
    def layout(self) -> KvLayout:
        """Of a block of its pool."""

    @property
    def numerics(self) -> str:
        """See EngineInfo.numerics."""

    def bind(self, memory: NDArray[np.uint8]) -> None:
        """The pool: [blocks, layout.block_bytes]."""

    def warm_up(self) -> None:
        """Compiles and touches what the first step would."""

    def forward(
        self, batch: Any, after_layers: AfterLayers | None, layers_per_piece: int
    ) -> NDArray[np.float32]:
        """Writes the KV of the batch's tokens; returns logits [R, vocabulary]."""


class Drafter(Protocol):
    """A model with a multi-token prediction layer.

    Called between two calls of forward(), StepBatch.draft_calls times, first for hidden states of
    forward(), then, `deeper`, for those of the call before. A batch may have no rows.
    """

    @property
    def layers(self) -> int:
        """Of the layout, the last ones, whose KV draft() writes."""

    def draft(self, batch: DraftBatch) -> NDArray[np.float32]:
        """Writes the rows' KV of these layers; returns logits [R, vocabulary]."""


class Experts(Protocol):
    """A model's experts, whose replicas can be moved. Any thread may call."""

    @property
    def shape(self) -> ExpertShape:
        """How they can be placed."""

    @property
    def map(self) -> ExpertMap:
        """Where they are."""

    def tokens(self) -> tuple[int, ...]:
        """See EngineStats.expert_tokens."""

    def move(self, plan: ExpertMap, moves: Seq[ExpertMove]) -> None:
        """Copies between two steps, for a plan that leads from `map` to it."""


class Adapters(Protocol):
    """A model's LoRA adapters, each under its id (name@digest)."""

    def read(self, files: AdapterFiles, limits: AdapterLimits) -> tuple[Adapter, Any]:
        """Makes weights of an adapter's files. Any thread; slow.

        Raises UnsupportedAdapterError, and AdapterLimitError if they are beyond the limits.
        """

    def put(self, adapter_id: str, weights: Any) -> None:
        """Batches may name it from now on. The step thread calls, as for the next one."""

    def drop(self, adapter_id: str) -> None:
        """No batch will name it."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model, and what the engine must know about it beside its computation."""

    model: Model
    name: str
    context_tokens: int
    vocabulary: int
    eos_token_ids: tuple[int, ...]
    dp_ranks: int = 1
    experts: Experts | None = None
    adapters: Adapters | None = None
    """None: it takes none."""
    drafter: Drafter | None = None
    rounds: Rounds | None = None
    """None: no other rank takes part in its steps."""
    tokens: Callable[[], Seq[bytes]] | None = None
    """The bytes of every token by id, none for control tokens; reads the tokenizer. None: it has
    none, and no guide can be followed."""


def batch_of(works: Seq[Work], draft_calls: int = 0) -> StepBatch:
    """The arrays of a plan's work, in its order."""
    starts = np.zeros(len(works) + 1, dtype=np.int32)
    np.cumsum([w.rows for w in works], out=starts[1:])
    tokens = np.empty(starts[-1], dtype=np.int32)
    positions = np.empty(starts[-1], dtype=np.int32)
    logit_rows: list[int] = []
    for i, work in enumerate(works):
        rows = slice(starts[i], starts[i + 1])
        tokens[rows] = [*work.sequence.tokens[work.first : work.end], *work.drafts]
        positions[rows] = np.arange(work.first, work.first + work.rows)
        if work.sample:
            logit_rows += range(starts[i + 1] - 1 - len(work.drafts), starts[i + 1])
    return StepBatch(
        tokens,
        positions,
        starts,
        tables_of([w.sequence for w in works]),
        np.array(logit_rows, dtype=np.int32),
        fresh=np.array([w.start for w in works], dtype=np.int32)
        if any(w.refresh for w in works)
        else None,
        adapters=adapters_of([w.sequence for w in works]),
        hidden=draft_calls > 0,
        draft_calls=draft_calls,
    )


def adapters_of(sequences: Seq[Sequence]) -> tuple[str, ...]:
    """LoRA adapter of each; () if none has one."""
    adapters = tuple(s.request.adapter for s in sequences)
    return adapters if any(adapters) else ()


def tables_of(sequences: Seq[Sequence]) -> Int32s:
    """Blocks of each: [S, B], rows padded with -1."""
    width = max((len(s.blocks) for s in sequences), default=0)
    tables = np.full((len(sequences), width), -1, dtype=np.int32)
    for i, sequence in enumerate(sequences):
        tables[i, : len(sequence.blocks)] = sequence.blocks
    return tables
