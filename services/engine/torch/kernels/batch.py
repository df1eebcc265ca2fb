"""The rows of one step, checked and brought into the form that the kernels read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.engine.torch.kernels.attention import QUERY_ROWS

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one step, sequence after sequence.

    token_ids, positions int32 [T]; query_starts int32 [S + 1]: sequence s owns rows
    query_starts[s]:query_starts[s + 1], one at least, their positions rising by one;
    block_tables int32 [S, B]: blocks of the context (positions 0 to that of the last row), rows
    filled up with -1; logit_rows int32 [R]: rows whose logits are wanted; fresh int32 [S]: first
    position of each sequence whose KV is written, None: all are; hidden: all rows' hidden states
    are kept for draft(); adapters: of each sequence, empty for none, (): none at all.
    """

    token_ids: Int32
    positions: Int32
    query_starts: Int32
    block_tables: Int32
    logit_rows: Int32
    fresh: Int32 | None = None
    hidden: bool = False
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DraftRows:
    """Rows for multi-token prediction: as Batch, and where each one's hidden state is.

    hidden_rows int32 [T]: row of the last forward(), or with `deeper` of the last draft(); -1:
    none.
    """

    token_ids: Int32
    positions: Int32
    query_starts: Int32
    block_tables: Int32
    logit_rows: Int32
    hidden_rows: Int32
    deeper: bool = False
    fresh: Int32 | None = None
    adapters: tuple[str, ...] = ()

    @classmethod
    def of(cls, batch: Batch, hidden_rows: Int32) -> DraftRows:
        """For a batch's rows."""
        return cls(
            batch.token_ids,
            batch.positions,
            batch.query_starts,
            batch.block_tables,
            batch.logit_rows,
            hidden_rows,
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """What a batch's numbers must stay below."""

    vocabulary: int
    positions: int
    blocks: int
    block_tokens: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked batch: contiguous arrays, and where each row's KV goes.

    sequences [T]: whose row it is; blocks, tokens int64 [T]: block of the pool and token in it, by
    row, block -1 where nothing is to be written; tasks int32 [n, 3]:
    sequence, first row, end row, the longest contexts first so that threads end together.
    """

    token_ids: Int64
    positions: Int32
    tables: Int32
    sequences: Int64
    blocks: Int64
    tokens: Int64
    tasks: Int32
    logit_rows: Int64


def plan(batch: Batch | DraftRows, limits: Limits, group: int) -> Plan:
    """Checks what the kernels rely on, since they check nothing. Raises ValueError."""
    positions = np.ascontiguousarray(batch.positions, np.int32)
    tables = np.ascontiguousarray(batch.block_tables, np.int32)
    starts = np.asarray(batch.query_starts, np.int64)
    counts = np.diff(starts)
    total = len(positions)
    _require(len(batch.token_ids) == total and total > 0, "token_ids and positions: as many, not 0")
    _require(
        starts[0] == 0 and starts[-1] == total and bool((counts > 0).all()),
        "query_starts: rising, from 0 to the number of rows",
    )
    _require(tables.ndim == 2 and len(tables) == len(counts), "block_tables: a row a sequence")
    sequences = np.repeat(np.arange(len(counts)), counts)
    steps = np.diff(positions)[np.diff(sequences) == 0]
    _require(bool((steps == 1).all()), "positions: rising by one within a sequence")
    _within("positions", positions, limits.positions)
    _within("token_ids", batch.token_ids, limits.vocabulary)
    _within("logit_rows", batch.logit_rows, total)
    needed = positions[starts[1:] - 1] // limits.block_tokens + 1
    _require(int(needed.max()) <= tables.shape[1], "block_tables: blocks for the whole context")
    _within("block_tables", tables[np.arange(tables.shape[1]) < needed[:, None]], limits.blocks)
    blocks = tables[sequences, positions // limits.block_tokens].astype(np.int64)
    if batch.fresh is not None:
        _require(len(batch.fresh) == len(counts), "fresh: one a sequence")
        blocks[positions < np.asarray(batch.fresh, np.int32)[sequences]] = -1
    return Plan(
        token_ids=np.asarray(batch.token_ids, np.int64),
        positions=positions,
        tables=tables,
        sequences=sequences,
        blocks=blocks,
        tokens=(positions % limits.block_tokens).astype(np.int64),
        tasks=_tasks(starts, positions, max(1, QUERY_ROWS // group)),
        logit_rows=np.asarray(batch.logit_rows, np.int64),
    )


def _tasks(starts: Int64, positions: Int32, most: int) -> Int32:
    """Runs of at most `most` rows of one sequence."""
    counts = np.diff(starts)
    runs = -(-counts // most)
    sequences = np.repeat(np.arange(len(counts)), runs)
    within = np.arange(len(sequences)) - np.repeat(np.cumsum(runs) - runs, runs)
    first = starts[sequences] + within * most
    end = np.minimum(first + most, starts[sequences + 1])
    order = np.argsort(-positions[end - 1], kind="stable")
    return np.ascontiguousarray(np.stack([sequences, first, end], axis=1)[order], np.int32)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _within(name: str, values: npt.NDArray[np.int32], end: int) -> None:
    if values.size and not (int(values.min()) >= 0 and int(values.max()) < end):
        raise ValueError(f"{name}: from 0 to below {end}")
