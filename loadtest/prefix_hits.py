"""Prefix hits of a recorded trace in a pool of KV blocks: `python -m loadtest.prefix_hits TRACE`.

One worker serves all requests of a Mooncake trace, one after the other. Its pool evicts the blocks
that were used longest ago, and tells the coordinator's prefix index of what came and went; how much
of a prompt is held is what the index says. So hits are what a placement would have counted on.

A request looks its prompt up, then touches all its blocks, then the pool evicts what is too much.
The order of touching matters where only some of a prompt's blocks are evicted. `--touch forward`,
the first block first, is how hit ratios are published for this trace: the start of a prefix goes
before its end, and what is left of it can't be used. Tandem's workers touch the last block first.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtest.errors import TraceError
from loadtest.traces import MOONCAKE_BLOCK_TOKENS, TraceRow, read
from services.coordinator.core.index import PrefixIndex

MOONCAKE_CONVERSATION = Path(__file__).parent / "data" / "mooncake_conversation_trace.jsonl.xz"
"""See README.md beside it."""


@dataclass(frozen=True, slots=True)
class Hits:
    """What was found of all prompts together."""

    requests: int
    blocks: int
    hit_blocks: int
    tokens: int
    hit_tokens: int

    @property
    def block_ratio(self) -> float:
        """Blocks found of those asked for."""
        return self.hit_blocks / self.blocks

    @property
    def token_ratio(self) -> float:
        """The same for tokens; a prompt's last block may be short."""
        return self.hit_tokens / self.tokens


class LruPool:
    """Keys of up to `capacity` blocks; None: no limit. Evicts those touched longest ago."""

    def __init__(self, capacity: int | None) -> None:
        self._capacity = capacity
        self._order: OrderedDict[bytes, None] = OrderedDict()

    def touch(self, keys: Iterable[bytes]) -> tuple[list[bytes], list[bytes]]:
        """Puts blocks in, in this order; those that are new, and those that it evicted."""
        stored = []
        for key in keys:
            if key not in self._order:
                stored.append(key)
            self._order[key] = None
            self._order.move_to_end(key)
        removed = []
        while self._capacity is not None and len(self._order) > self._capacity:
            removed.append(self._order.popitem(last=False)[0])
        return stored, removed


def replay(rows: Sequence[TraceRow], capacity: int | None, *, forward: bool) -> Hits:
    """Serves a trace's requests in turn; `forward`: a prompt's first block is touched first."""
    index, pool = PrefixIndex(), LruPool(capacity)
    worker = index.add("worker")
    blocks = hit_blocks = hit_tokens = 0
    for row in rows:
        # The trace's hashes cover all tokens before them, as keys do.
        keys = tuple(number.to_bytes(16, "big") for number in row.hash_ids)
        held, _ = next(index.reach(keys, worker))
        blocks += len(keys)
        hit_blocks += held
        hit_tokens += min(held * MOONCAKE_BLOCK_TOKENS, row.input_tokens)
        stored, removed = pool.touch(keys if forward else reversed(keys))
        index.store("worker", stored)
        index.remove("worker", removed)
    tokens = sum(row.input_tokens for row in rows)
    return Hits(len(rows), blocks, hit_blocks, tokens, hit_tokens)


def main() -> None:
    """Prints the hit ratios for each size of the pool."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("trace", type=Path, nargs="?", default=MOONCAKE_CONVERSATION)
    parser.add_argument("--touch", choices=("forward", "backward"), default="forward")
    sizes = [0, 50_000, 30_000, 10_000, 5_860, 1_000]
    words = "sizes of the pool, 0: no limit"
    parser.add_argument("--blocks", type=int, nargs="+", default=sizes, help=words)
    options = parser.parse_args()
    try:
        rows = read(options.trace)
    except TraceError as error:
        parser.error(str(error))
    if not all(row.hash_ids for row in rows):
        parser.error(f"{options.trace}: nothing is known of what prompts share")
    print(f"{len(rows)} requests, {len({i for r in rows for i in r.hash_ids})} distinct blocks")
    print(f"{'blocks':>10}  block hits  token hits")
    for size in options.blocks:
        hits = replay(rows, size or None, forward=options.touch == "forward")
        print(f"{size or 'no limit':>10}  {hits.block_ratio:10.4f}  {hits.token_ratio:10.4f}")


if __name__ == "__main__":
    main()
