"""Books for data-parallel ranks that share a batch and a pool: who is on which, and has what.

Engines here run one rank. More than one is for tests of what places requests on ranks: each has an
equal part of the pool in the books, and nothing keeps its requests within that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from services.engine.api import RankStats
from services.engine.stepped.sequence import Sequence


def rank_stats(
    ranks: int,
    blocks: int,
    admitted: Iterable[Sequence],
    waiting: Iterable[Sequence],
    to_compute: Callable[[Sequence], int],
) -> tuple[RankStats, ...]:
    """What each rank has, of a pool of `blocks`. `to_compute`: a sequence's prompt tokens left."""
    running, queue = [0] * ranks, [0] * ranks
    used, kv_tokens, queued = [0] * ranks, [0] * ranks, [0] * ranks
    for sequence in admitted:
        rank = sequence.request.dp_rank
        running[rank] += 1
        used[rank] += len(sequence.blocks)
        kv_tokens[rank] += sequence.computed
        queued[rank] += to_compute(sequence)
    for sequence in waiting:
        rank = sequence.request.dp_rank
        queue[rank] += 1
        queued[rank] += to_compute(sequence)
    part = blocks // ranks
    return tuple(
        RankStats(running[n], queue[n], max(0, part - used[n]), kv_tokens[n], queued[n])
        for n in range(ranks)
    )
