"""The sink's side of KV tests: a store, its endpoint, and keys and leases that nobody else has."""

from __future__ import annotations

import itertools
import random

import numpy as np

from kvtransfer.endpoint import KvEndpoint
from kvtransfer.keys import block_keys, salt
from kvtransfer.store import KvStore
from tests.contract.kv_source import content

NAMES = ("shm", "nixl", "ucx", "tcp")
"""The transports that every test runs over."""
LAYERS = 6
COUNTER = itertools.count()


class Sink:
    """A store and its endpoint, and blocks to fetch into."""

    def __init__(self, store: KvStore, endpoint: KvEndpoint) -> None:
        self.store, self.endpoint = store, endpoint

    def allocate(self, count: int, seed: int = 1) -> list[int]:
        """Blocks in no order, not neighbours."""
        blocks = self.store.allocate(2 * count)
        random.Random(seed).shuffle(blocks)
        self.store.release(blocks[count:])
        return blocks[:count]

    def holds(self, block: int, key: bytes) -> bool:
        return np.array_equal(self.store.memory[block], content(key, self.store.block_bytes))


def fresh_keys(count: int) -> list[bytes]:
    """Keys that no other test has."""
    start = next(COUNTER) * 100_000
    return block_keys(range(start, start + 8 * count), 8, salt("m", "test"))


def fresh_lease() -> str:
    return f"lease-{next(COUNTER)}"
