"""What a tier is: room for blocks that the pool has no room for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Label:
    """What is known of a block's bytes."""

    key: bytes
    tenant: str
    checksums: bytes
    """XXH3-64 of each piece, little-endian, one after the other."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How a block's bytes are laid out and cut. Blocks of two shapes never meet in one tier."""

    fingerprint: str
    """Of whatever has to be equal for bytes to mean the same; KvLayout.fingerprint and more."""
    pieces: tuple[int, ...]
    """Bytes of each piece."""

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return sum(self.pieces)

    def checksums(self, data: Bytes) -> bytes:
        """Label.checksums of a block's bytes, uint8 [block_bytes]."""
        found, at = [], 0
        for size in self.pieces:
            found.append(xxhash.xxh3_64_intdigest(data[at : at + size].data))
            at += size
        return np.array(found, "<u8").tobytes()


@dataclass(frozen=True, slots=True)
class TierStats:
    """A tier at one moment; counts are since the start."""

    name: str
    capacity_bytes: int
    used_bytes: int
    blocks: int
    stored: int = 0
    """Blocks written."""
    hits: int = 0
    """Blocks read, and right."""
    misses: int = 0
    """Blocks asked for that were not there (any more)."""
    evicted: int = 0
    corrupt: int = 0
    """Blocks dropped because their bytes were wrong."""
    errors: int = 0
    """Input and output that failed; after the first the tier is off."""
    off: str = ""
    """Why nothing is put into it any more, empty while it is on."""


Evicting = Callable[[Label, Bytes], None]
"""Called with a block that is about to leave a tier; the bytes are lent for the call."""
Left = Callable[[Sequence[bytes]], None]
"""Called with keys that a tier held and no longer holds, for whatever reason."""


class Tier(Protocol):
    """Blocks by key, within a capacity. Thread-safe; every call may take as long as its medium.

    Nothing here raises because a medium fails: the first error turns the tier off, which says so
    in its statistics and in the log; it then holds nothing and takes nothing.
    """

    name: str
    places: int
    """Blocks it has room for."""

    @property
    def on(self) -> bool:
        """Whether it takes anything."""

    def on_left(self, left: Left) -> None:
        """Who is told when keys leave, from any thread. It may look at the tier, not change it."""

    def put(self, label: Label, data: Bytes, evicting: Evicting | None = None) -> bool:
        """Copies a block in; False if it can't. Evicts if it must, showing `evicting` first.

        `data` is uint8 [block_bytes] and is what the label's checksums were taken of.
        """

    def find(self, key: bytes) -> Label | None:
        """The label of a key held."""

    def match(self, keys: Sequence[bytes]) -> int:
        """How many leading ones of `keys` are held."""

    def read(self, key: bytes, into: Bytes) -> Label | None:
        """Fills uint8 [block_bytes] with a block and verifies it there; None if it isn't held.

        A block whose bytes are wrong is dropped, counted, and not held. `into` is undefined then.
        """

    def forget(self, key: bytes) -> bool:
        """Drops a block; False if it is not held."""

    def keys(self) -> list[bytes]:
        """All keys held."""

    def stats(self) -> TierStats:
        """Now."""

    def check_integrity(self) -> None:
        """Proves that every place is free or has one key. Raises AssertionError."""

    def close(self) -> None:
        """Ends it; no other call may be under way. Idempotent."""
