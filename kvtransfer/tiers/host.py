"""The tier in the host's memory."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from kvtransfer.tiers.base import Bytes, Label, Shape
from kvtransfer.tiers.places import PlaceTier
from kvtransfer.tiers.policy import Policy


class Memory:
    """Places in one array: see Medium. Physical memory is taken as places are first written."""

    def __init__(self, places: int, bytes_per_place: int) -> None:
        self.places, self.bytes_per_place = places, bytes_per_place
        self._data: Bytes = np.empty((places, bytes_per_place), np.uint8)

    def found(self) -> Iterable[tuple[int, Label]]:
        """Nothing: memory begins empty."""
        return ()

    def fits(self, label: Label) -> bool:
        """Always."""
        return True

    def write(self, place: int, label: Label, data: Bytes) -> None:
        """A copy."""
        np.copyto(self._data[place], data)

    def read(self, place: int, into: Bytes) -> None:
        """A copy."""
        np.copyto(into, self._data[place])

    def erase(self, place: int) -> None:
        """The index has forgotten it, and nothing else finds it."""

    def close(self) -> None:
        """The memory goes with the object."""
        self._data = np.empty((0, self.bytes_per_place), np.uint8)


def host_tier(shape: Shape, capacity_bytes: int, policy: Policy | None = None) -> PlaceTier:
    """A tier of as many blocks as `capacity_bytes` hold. Raises ValueError if that is none."""
    places = capacity_bytes // shape.block_bytes
    if places < 1:
        raise ValueError(f"{capacity_bytes} bytes hold no block of {shape.block_bytes}")
    return PlaceTier("host", shape, Memory(places, shape.block_bytes), policy)
