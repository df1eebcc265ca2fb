"""Which KV the followers of rank 0 have as it has it. Pure.

All ranks write what they compute into pools of their own, the same bytes at the same places. What
came into rank 0's pool in another way (from a peer, from a tier) followers lack until it is sent.
So nothing is taken for known that was not seen to be: of a block, in the generation that it is in,
the tokens that steps wrote from its first one on, or that were sent. A block's generation changes
whenever its memory goes to other content, before a byte of that is written (kvtransfer/pool.py); so
what was known of it before counts for nothing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from services.engine.torch.kernels.batch import Batch

Int64s = npt.NDArray[np.int64]


class Mirror:
    """Kept by rank 0. `generations` uint64 [blocks] are the pool's, as they are at any time."""

    def __init__(self, generations: npt.NDArray[np.uint64], block_tokens: int) -> None:
        self._generations = generations
        self._size = block_tokens
        self._seen = np.zeros(len(generations), np.uint64)
        self._tokens = np.zeros(len(generations), np.int64)
        """Of each block in the generation `seen`: its first tokens, whose bytes are the same."""

    def step(self, batch: Batch) -> Int64s:
        """Blocks whose bytes followers must be sent before a step, which all then compute."""
        lacking = [
            self._sequence(batch.block_tables[s], *span) for s, span in enumerate(_spans(batch))
        ]
        return np.unique(np.concatenate(lacking)) if lacking else np.zeros(0, np.int64)

    def _sequence(self, table: npt.NDArray[np.int32], start: int, end: int) -> Int64s:
        """Of one that reads tokens up to `start` and writes those from there to `end`."""
        size = self._size
        blocks = table[: -(-end // size)].astype(np.int64)
        firsts = size * np.arange(len(blocks))
        now = self._generations[blocks]
        known = np.where(self._seen[blocks] == now, self._tokens[blocks], 0)
        sent = np.clip(start - firsts, 0, size) > known
        known[sent] = size
        self._seen[blocks] = now
        self._tokens[blocks] = np.maximum(known, np.clip(end - firsts, 0, size))
        return blocks[sent]


def _spans(batch: Batch) -> list[tuple[int, int]]:
    """Of each sequence: the first position that it writes, and the one after the last."""
    starts = np.asarray(batch.query_starts, np.int64)
    first = np.asarray(batch.positions)[starts[:-1]]
    if batch.fresh is not None:
        first = np.maximum(first, batch.fresh)
    ends = np.asarray(batch.positions)[starts[1:] - 1] + 1
    return list(zip(first.tolist(), np.maximum(first, ends).tolist(), strict=True))
