"""Which block a full tier evicts. Books only."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol


class Policy(Protocol):
    """Told of everything that happens to a tier's keys. Not thread-safe; its tier serializes."""

    def added(self, key: bytes) -> None:
        """A new key is held."""

    def used(self, key: bytes) -> None:
        """A key held was read, or put again."""

    def removed(self, key: bytes) -> None:
        """A key is held no longer."""

    def victim(self) -> bytes:
        """The key to evict next, one of those held. There is one."""

    def __len__(self) -> int:
        """Keys held."""


class LeastRecentlyUsed:
    """Evicts what was added or used longest ago."""

    def __init__(self) -> None:
        self._order: OrderedDict[bytes, None] = OrderedDict()

    def added(self, key: bytes) -> None:
        """Last in the queue."""
        self._order[key] = None

    def used(self, key: bytes) -> None:
        """Last again."""
        self._order.move_to_end(key)

    def removed(self, key: bytes) -> None:
        """Out of it."""
        del self._order[key]

    def victim(self) -> bytes:
        """First."""
        return next(iter(self._order))

    def __len__(self) -> int:
        """Keys held."""
        return len(self._order)
