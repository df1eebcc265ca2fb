"""Tiers one below the other: what the upper evicts goes to the lower."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence

from kvtransfer.tiers.base import Bytes, Label, Tier


class Chain:
    """Tiers from the top. Thread-safe.

    Whenever keys come or go, `told` is called with the highest tier that has each now, or None;
    one call at a time, and the last one about a key is right.
    """

    def __init__(
        self, tiers: Sequence[Tier], told: Callable[[Mapping[bytes, int | None]], None]
    ) -> None:
        self.tiers = tuple(tiers)
        self._told = told
        self._telling = threading.Lock()
        for tier in self.tiers:
            tier.on_left(self._tell)
        self._tell(self._keys())

    @property
    def on(self) -> bool:
        """Whether any tier takes anything."""
        return any(tier.on for tier in self.tiers)

    def put(self, label: Label, data: Bytes) -> bool:
        """Copies a block into the top tier, or if that is off the next; False if none takes it."""
        held = any(self._put(level, label, data) for level in range(len(self.tiers)))
        self._tell([label.key])
        return held

    def find(self, key: bytes) -> Label | None:
        """The label of a key held."""
        labels = (tier.find(key) for tier in self.tiers)
        return next((label for label in labels if label is not None), None)

    def level(self, key: bytes) -> int | None:
        """The highest tier that has a key."""
        return next((i for i, t in enumerate(self.tiers) if t.find(key) is not None), None)

    def read(self, key: bytes, into: Bytes) -> Label | None:
        """From the highest tier that has it whole and right; see Tier.read()."""
        for tier in self.tiers:
            if tier.find(key) is not None:
                label = tier.read(key, into)
                if label is not None:
                    return label
        return None

    def check_integrity(self) -> dict[bytes, int | None]:
        """Proves each tier's books; returns the level of each key. Raises AssertionError."""
        for tier in self.tiers:
            tier.check_integrity()
        return {key: self.level(key) for key in self._keys()}

    def close(self) -> None:
        """Ends every tier."""
        for tier in self.tiers:
            tier.close()

    def _keys(self) -> list[bytes]:
        held = (tier.keys() for tier in self.tiers)
        return list(dict.fromkeys(itertools.chain.from_iterable(held)))

    def _put(self, level: int, label: Label, data: Bytes) -> bool:
        below = level + 1
        if below == len(self.tiers):
            return self.tiers[level].put(label, data)

        def demote(victim: Label, victims: Bytes) -> None:
            self._put(below, victim, victims)

        return self.tiers[level].put(label, data, demote)

    def _tell(self, keys: Sequence[bytes]) -> None:
        with self._telling:
            self._told({key: self.level(key) for key in keys})
