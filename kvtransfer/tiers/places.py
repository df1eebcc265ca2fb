"""A tier over any medium of equal places: index, eviction, verification, failures."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

import numpy as np

from kvtransfer.tiers.base import Bytes, Evicting, Label, Left, Shape, TierStats
from kvtransfer.tiers.policy import LeastRecentlyUsed, Policy

log = logging.getLogger(__name__)


class Medium(Protocol):
    """Numbered places of a block each. Every call may raise OSError.

    One thread writes or erases at a time; reads may run beside it, even of the same place, and
    then give anything: the reader verifies.
    """

    places: int
    bytes_per_place: int
    """What a place takes of the capacity, in all."""

    def found(self) -> Iterable[tuple[int, Label]]:
        """Places and labels of what is in it at the start, oldest first."""

    def fits(self, label: Label) -> bool:
        """Whether it can be written at all."""

    def write(self, place: int, label: Label, data: Bytes) -> None:
        """Replaces what is in a place."""

    def read(self, place: int, into: Bytes) -> None:
        """The bytes last written to a place."""

    def erase(self, place: int) -> None:
        """What is in the place shall not be found again."""

    def close(self) -> None:
        """Idempotent."""


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    """One block in one place; a later one of the same key is another entry."""

    place: int
    label: Label


@dataclass(slots=True)
class _Counts:
    stored: int = 0
    hits: int = 0
    misses: int = 0
    evicted: int = 0
    corrupt: int = 0
    errors: int = 0


class PlaceTier:
    """See Tier. The index is in memory; `_lock` guards it, and nothing slow runs under it.

    A read takes no lock while it copies, and may so find its place given to another block. It
    knows by the checksums, and by its entry not being in the index any more.
    """

    def __init__(
        self, name: str, shape: Shape, medium: Medium, policy: Policy | None = None
    ) -> None:
        self.name = name
        self.places = medium.places
        self._shape = shape
        self._medium = medium
        self._policy = policy if policy is not None else LeastRecentlyUsed()
        self._lock = threading.Lock()
        # Held by whoever writes to the medium; taken before `_lock`. A write that evicts may have
        # to drop its victim: hence one that its holder can take again.
        self._writing = threading.RLock()
        self._index: dict[bytes, _Entry] = {}
        self._counts = _Counts()
        self._off = ""
        self._left: Left = lambda _keys: None
        self._scratch: Bytes | None = None
        for place, label in medium.found():
            if label.key in self._index:  # a newer one
                self._policy.removed(label.key)
            self._index[label.key] = _Entry(place, label)
            self._policy.added(label.key)
        used = {entry.place for entry in self._index.values()}
        self._free = [place for place in reversed(range(medium.places)) if place not in used]

    @property
    def on(self) -> bool:
        """Whether it takes anything."""
        return not self._off

    def on_left(self, left: Left) -> None:
        """Who is told when keys leave."""
        self._left = left

    def put(self, label: Label, data: Bytes, evicting: Evicting | None = None) -> bool:
        """Copies a block in; False if it can't."""
        with self._writing:
            with self._lock:
                if self._off or not self._medium.fits(label):
                    return False
                if label.key in self._index:
                    self._policy.used(label.key)
                    return True
                victim = None if self._free else self._index[self._policy.victim()]
            if victim is not None:
                self._evict(victim, evicting)
            with self._lock:
                if self._off:  # reading the victim failed
                    return False
                place = self._free.pop()
            try:
                self._medium.write(place, label, data)
            except OSError as error:
                self._fail(error)
                return False
            with self._lock:
                if self._off:
                    return False
                self._index[label.key] = _Entry(place, label)
                self._policy.added(label.key)
                self._counts.stored += 1
        return True

    def find(self, key: bytes) -> Label | None:
        """The label of a key held."""
        with self._lock:
            entry = self._index.get(key)
            return None if entry is None else entry.label

    def match(self, keys: Sequence[bytes]) -> int:
        """How many leading ones of `keys` are held."""
        with self._lock:
            return sum(1 for _ in takewhile(self._index.__contains__, keys))

    def read(self, key: bytes, into: Bytes) -> Label | None:
        """Fills `into` and verifies it there."""
        with self._lock:
            entry = self._index.get(key)
            if entry is None:
                self._counts.misses += 1
                return None
            self._policy.used(key)
        right = self._load(entry, into)
        with self._lock:
            self._counts.hits += right
            self._counts.misses += not right
        return entry.label if right else None

    def forget(self, key: bytes) -> bool:
        """Drops a block; False if it is not held."""
        with self._lock:
            entry = self._index.get(key)
        return entry is not None and self._drop(entry)

    def keys(self) -> list[bytes]:
        """All keys held."""
        with self._lock:
            return list(self._index)

    def stats(self) -> TierStats:
        """Now."""
        with self._lock:
            counts, size = self._counts, self._medium.bytes_per_place
            return TierStats(
                name=self.name,
                capacity_bytes=self.places * size,
                used_bytes=len(self._index) * size,
                blocks=len(self._index),
                stored=counts.stored,
                hits=counts.hits,
                misses=counts.misses,
                evicted=counts.evicted,
                corrupt=counts.corrupt,
                errors=counts.errors,
                off=self._off,
            )

    def check_integrity(self) -> None:
        """Proves that every place is free or has one key."""
        with self._writing, self._lock:
            used = [entry.place for entry in self._index.values()]
            assert self._off or sorted(used + self._free) == list(range(self.places)), (
                f"{self.name} tier: {len(used)} used + {len(self._free)} free != {self.places}"
            )
            assert len(self._policy) == len(self._index), f"{self.name} tier: policy and index"
            for key, entry in self._index.items():
                assert entry.label.key == key, f"{self.name} tier: a key under another's name"

    def close(self) -> None:
        """Ends it."""
        with self._writing:
            self._medium.close()

    def _load(self, entry: _Entry, into: Bytes) -> bool:
        """Reads and verifies; a block that is wrong, and not just gone meanwhile, is dropped."""
        try:
            self._medium.read(entry.place, into)
        except OSError as error:
            self._fail(error)
            return False
        if self._shape.checksums(into) == entry.label.checksums:
            return True
        if self._drop(entry):
            with self._lock:
                self._counts.corrupt += 1
            log.warning("%s tier: a block's bytes were wrong; it is dropped", self.name)
        return False

    def _evict(self, victim: _Entry, evicting: Evicting | None) -> None:
        """Frees a place. Whoever looks for the victim meanwhile finds it here or where it went."""
        if evicting is not None:
            if self._scratch is None:
                self._scratch = np.empty(self._shape.block_bytes, np.uint8)
            if self._load(victim, self._scratch):
                evicting(victim.label, self._scratch)
        with self._lock:
            if self._index.get(victim.label.key) is not victim:
                return  # found corrupt, or forgotten, and its place is free already
            self._remove(victim)
            self._free.append(victim.place)
            self._counts.evicted += 1
        self._left([victim.label.key])

    def _drop(self, entry: _Entry) -> bool:
        """Forgets an entry, also beyond a restart; False if it is not in the index any more."""
        with self._writing:
            with self._lock:
                if self._index.get(entry.label.key) is not entry:
                    return False
                self._remove(entry)
            try:
                self._medium.erase(entry.place)
            except OSError as error:
                self._fail(error)
            with self._lock:
                self._free.append(entry.place)
        self._left([entry.label.key])
        return True

    def _remove(self, entry: _Entry) -> None:
        del self._index[entry.label.key]
        self._policy.removed(entry.label.key)

    def _fail(self, error: OSError) -> None:
        """The medium can't be trusted: the tier is off, and what it held is gone."""
        with self._lock:
            self._counts.errors += 1
            if self._off:
                return
            self._off = error.strerror or str(error) or type(error).__name__
            gone = list(self._index)
            for entry in list(self._index.values()):
                self._remove(entry)
        log.error("%s tier: %s; it is off until the process starts again", self.name, self._off)
        self._left(gone)
