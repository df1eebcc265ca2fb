"""Makes the tiers that are asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from kvtransfer.store import KvStore
from kvtransfer.tiers.base import Shape, Tier
from kvtransfer.tiers.disk import disk_tier
from kvtransfer.tiers.host import host_tier
from kvtransfer.tiers.tiers import Tiers


def open_tiers(
    store: KvStore,
    numerics: str,
    *,
    host_bytes: int = 0,
    disk_bytes: int = 0,
    folder: str = "",
    clock: Callable[[], float] = time.monotonic,
) -> Tiers | None:
    """Host memory over disk, each of so many bytes, 0 for none; not started. None if neither.

    `numerics` stands for whatever has to be the same for computed bytes to be the same, weights
    included: a folder of another is cleared. Raises ValueError for a tier that holds no block,
    TierUnusableError.
    """
    shape = shape_of(store, numerics)
    tiers: list[Tier] = []
    if host_bytes:
        tiers.append(host_tier(shape, host_bytes))
    if disk_bytes:
        tiers.append(disk_tier(shape, Path(folder), disk_bytes))
    return Tiers(store, tiers, clock=clock) if tiers else None


def shape_of(store: KvStore, numerics: str) -> Shape:
    """The shape of a store's blocks."""
    grid = store.grid
    sizes = tuple(grid.span(i)[1] * store.layer_bytes for i in range(grid.count))
    return Shape(f"{store.layout.fingerprint}/{numerics}", sizes)
