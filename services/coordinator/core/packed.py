"""Block keys one after the other in one piece of memory, as workers send them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

from kvtransfer.keys import KEY_BYTES


class PackedKeys(Sequence[bytes]):
    """A sequence of keys that makes no object of a key before it is asked for.

    Raises ValueError for bytes that are no whole number of keys.
    """

    __slots__ = ("raw",)

    def __init__(self, raw: bytes = b"") -> None:
        if len(raw) % KEY_BYTES:
            raise ValueError(f"{len(raw)} bytes are no whole number of keys of {KEY_BYTES}")
        self.raw = raw

    def __len__(self) -> int:
        return len(self.raw) // KEY_BYTES

    def __iter__(self) -> Iterator[bytes]:
        raw = self.raw
        return (raw[at : at + KEY_BYTES] for at in range(0, len(raw), KEY_BYTES))

    @overload
    def __getitem__(self, at: int) -> bytes: ...
    @overload
    def __getitem__(self, at: slice) -> PackedKeys: ...
    def __getitem__(self, at: int | slice) -> bytes | PackedKeys:
        if isinstance(at, slice):
            return PackedKeys(b"".join(self[i] for i in range(len(self))[at]))
        start = range(len(self))[at] * KEY_BYTES
        return self.raw[start : start + KEY_BYTES]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PackedKeys) and self.raw == other.raw

    def __hash__(self) -> int:
        return hash(self.raw)

    def __repr__(self) -> str:
        return f"PackedKeys({len(self)} keys)"
