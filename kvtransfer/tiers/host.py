"""The tier in the host's memory."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from kvtransfer.tiers.base import Bytes, Label, Shape
from kvtransfer.tiers.policy import Policy
from kvtransfer.tiers.slots import SlotTier


class Memory:
    """Slots in one array: see Medium. Physical memory is taken as slots are first written."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.slots, self.slot_bytes = slots, slot_bytes
        self._data: Bytes = np.empty((slots, slot_bytes), np.uint8)

    def found(self) -> Iterable[tuple[int, Label]]:
        """Nothing: memory begins empty."""
        return ()

    def fits(self, label: Label) -> bool:
        """Always."""
        return True

    def write(self, slot: int, label: Label, data: Bytes) -> None:
        """A copy."""
        np.copyto(self._data[slot], data)

    def read(self, slot: int, into: Bytes) -> None:
        """A copy."""
        np.copyto(into, self._data[slot])

    def erase(self, slot: int) -> None:
        """The index has forgotten it, and nothing else finds it."""

    def close(self) -> None:
        """The memory goes with the object."""
        self._data = np.empty((0, self.slot_bytes), np.uint8)


def host_tier(shape: Shape, capacity_bytes: int, policy: Policy | None = None) -> SlotTier:
    """A tier of as many blocks as `capacity_bytes` hold. Raises ValueError if that is none."""
    slots = capacity_bytes // shape.block_bytes
    if slots < 1:
        raise ValueError(f"{capacity_bytes} bytes hold no block of {shape.block_bytes}")
    return SlotTier("host", shape, Memory(slots, shape.block_bytes), policy)
