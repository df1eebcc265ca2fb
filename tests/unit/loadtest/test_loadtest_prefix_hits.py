"""Prefix hits of Mooncake's conversation trace by the coordinator's index: as published."""

from __future__ import annotations

from itertools import takewhile

import pytest

from loadtest.prefix_hits import MOONCAKE_CONVERSATION, LruPool, replay
from loadtest.traces import read

# Of 12,031 requests in a pool that evicts the least recently used blocks: size, block and token
# hits. An independent public recomputation agrees with these to three decimals.
REFERENCE = [
    (None, 0.3664, 0.3736),
    (50_000, 0.3546, 0.3615),
    (30_000, 0.3257, 0.3321),
    (10_000, 0.2112, 0.2153),
    (5_860, 0.1355, 0.1382),
    (1_000, 0.0445, 0.0454),
]


@pytest.fixture(scope="module")
def trace():
    return read(MOONCAKE_CONVERSATION)


def test_the_trace_is_the_published_one(trace):
    assert len(trace) == 12_031
    assert len({number for row in trace for number in row.hash_ids}) == 182_790
    assert sum(row.input_tokens for row in trace) == 144_793_823


@pytest.mark.parametrize(("blocks", "block_hits", "token_hits"), REFERENCE)
def test_hits_of_the_index_are_the_reference(trace, blocks, block_hits, token_hits):
    hits = replay(trace, blocks, forward=True)
    assert hits.requests == len(trace)
    assert (round(hits.block_ratio, 4), round(hits.token_ratio, 4)) == (block_hits, token_hits)


def test_a_pool_that_evicts_a_prefixs_end_first_serves_more_of_it(trace):
    rows = trace[:2000]
    backward = replay(rows, 2000, forward=False)
    forward = replay(rows, 2000, forward=True)
    assert backward.hit_blocks >= forward.hit_blocks
    # And the index is exact then: the chain rule holds.
    pool, held, found = LruPool(2000), set(), 0
    for row in rows:
        found += sum(1 for _ in takewhile(held.__contains__, row.hash_ids))
        stored, removed = pool.touch(n.to_bytes(16, "big") for n in reversed(row.hash_ids))
        held |= {int.from_bytes(key) for key in stored}
        held -= {int.from_bytes(key) for key in removed}
    assert backward.hit_blocks == found


def test_the_pool_evicts_what_was_touched_longest_ago():
    pool = LruPool(3)
    a, b, c, d = b"a", b"b", b"c", b"d"
    assert pool.touch([a, b, c]) == ([a, b, c], [])
    assert pool.touch([a]) == ([], [])
    assert pool.touch([d]) == ([d], [b])
    assert pool.touch([b, d]) == ([b], [c])
    assert LruPool(None).touch([a, b, c, d]) == ([a, b, c, d], [])
