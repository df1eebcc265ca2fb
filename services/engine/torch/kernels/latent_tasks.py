"""How the query rows of a step are dealt out to threads, in latent attention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.engine.torch.kernels.batch import Plan
from services.engine.torch.kernels.latent import QUERY_ROWS, SEGMENT
from services.engine.torch.kernels.simd import LANES

# Where each thread has so many runs of query rows, or more, they are not split into segments.
RUNS_A_THREAD = 4

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Tasks:
    """What latent.attend and latent.merge call so, and the rows of the state between them."""

    attends: Int32
    merges: Int32
    partial_rows: int


def deal(step: Plan, heads: int, threads: int) -> Tasks:
    """A run of query rows is a task; by segments if so few would make threads wait for another."""
    runs = _runs(step, heads)
    if threads == 1 or len(runs) >= RUNS_A_THREAD * threads:
        return _whole(runs)
    return _split(runs)


def _runs(step: Plan, heads: int) -> Int64:
    """Runs of query rows of one sequence, [n, 4]: sequence, first and end query row, context.

    The longest contexts first, so that threads end together.
    """
    rows = np.bincount(step.sequences, minlength=len(step.tables)) * heads
    counts = -(-rows // QUERY_ROWS)
    of = np.repeat(np.arange(len(rows)), counts)
    within = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.cumsum(rows) - rows
    first = starts[of] + within * QUERY_ROWS
    end = np.minimum(first + QUERY_ROWS, starts[of] + rows[of])
    context = step.positions[(end - 1) // heads].astype(np.int64) + 1
    order = np.argsort(-context, kind="stable")
    return np.stack([of, first, end, context], axis=1)[order]


def _whole(runs: Int64) -> Tasks:
    """Tasks of a run each, all segments."""
    none = np.full(len(runs), -1)
    attends = np.column_stack([runs[:, :3], none, none])
    return Tasks(np.ascontiguousarray(attends, np.int32), np.zeros((0, 4), np.int32), 0)


def _split(runs: Int64) -> Tasks:
    """Tasks of a segment of a run each, and to merge them LANES query rows each."""
    segments = -(-runs[:, 3] // SEGMENT)
    before = np.cumsum(segments) - segments
    of = np.repeat(np.arange(len(runs)), segments)
    tasks = np.arange(len(of))
    attends = np.column_stack([runs[of, :3], tasks - before[of], tasks * QUERY_ROWS])
    parts = -(-(runs[:, 2] - runs[:, 1]) // LANES)
    run = np.repeat(np.arange(len(runs)), parts)
    offset = LANES * (np.arange(len(run)) - np.repeat(np.cumsum(parts) - parts, parts))
    first = runs[run, 1] + offset
    end = np.minimum(first + LANES, runs[run, 2])
    merges = np.column_stack([first, end, segments[run], before[run] * QUERY_ROWS + offset])
    return Tasks(
        np.ascontiguousarray(attends, np.int32),
        np.ascontiguousarray(merges, np.int32),
        len(of) * QUERY_ROWS,
    )
