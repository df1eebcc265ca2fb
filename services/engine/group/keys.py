"""The prefix caches of several ranks, told as one worker's. Pure.

A key is stored while any rank has it in its pool, lower while none has and one has it in a tier.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.engine.api import KvEvents


class GroupKeys:
    """Which ranks have which blocks, and readers of what changes."""

    def __init__(self, ranks: int) -> None:
        self._pool: list[set[bytes]] = [set() for _ in range(ranks)]
        self._lower: list[set[bytes]] = [set() for _ in range(ranks)]
        self._readers: set[KeyReader] = set()

    def take(self, rank: int, events: KvEvents) -> None:
        """What a rank says."""
        pool, lower = self._pool[rank], self._lower[rank]
        changed = [*events.stored, *events.lower, *events.removed]
        if events.snapshot:
            changed += [*pool, *lower]
            pool.clear()
            lower.clear()
        for key in events.removed:
            pool.discard(key)
            lower.discard(key)
        for key in events.lower:
            pool.discard(key)
            lower.add(key)
        for key in events.stored:
            lower.discard(key)
            pool.add(key)
        for reader in self._readers:
            reader.changed.update(dict.fromkeys(changed))

    def holder(self, keys: Sequence[bytes]) -> int | None:
        """The rank that has most of these keys from the first on; None: none has any."""
        lengths = [self._length(rank, keys) for rank in range(len(self._pool))]
        most = max(lengths)
        return lengths.index(most) if most else None

    def _length(self, rank: int, keys: Sequence[bytes]) -> int:
        pool, lower = self._pool[rank], self._lower[rank]
        for length, key in enumerate(keys):
            if key not in pool and key not in lower:
                return length
        return len(keys)

    def begin(self) -> KeyReader:
        """A reader, whose first events are a snapshot. Ends with end()."""
        reader = KeyReader()
        reader.changed = dict.fromkeys(key for keys in (*self._pool, *self._lower) for key in keys)
        self._readers.add(reader)
        return reader

    def end(self, reader: KeyReader) -> None:
        """It is told no more."""
        self._readers.discard(reader)

    def read(self, reader: KeyReader) -> KvEvents | None:
        """What has changed for it since it read last; None: nothing."""
        if not reader.changed and not reader.fresh:
            return None
        stored, removed, lower = [], [], []
        for key in reader.changed:
            if any(key in pool for pool in self._pool):
                stored.append(key)
            elif any(key in keys for keys in self._lower):
                lower.append(key)
            elif not reader.fresh:
                removed.append(key)
        snapshot, reader.fresh = reader.fresh, False
        reader.changed = {}
        return KvEvents(tuple(stored), tuple(removed), snapshot, tuple(lower))


class KeyReader:
    """Keys that something happened to since it read last, in the order that it did."""

    def __init__(self) -> None:
        self.fresh = True
        self.changed: dict[bytes, None] = {}
