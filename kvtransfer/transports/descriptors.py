"""Reads between two memories as descriptor lists: (address, bytes, device). Pure.

A memory is a run of regions (memory.Region), which may be of different kinds; a library that moves
descriptors wants one kind on each side of a list. So reads are cut where a region ends on either
side, and what has the same two kinds goes together.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from kvtransfer.errors import TransportError
from kvtransfer.memory import Region
from kvtransfer.transports.base import Read


@dataclass(frozen=True, slots=True)
class Descriptors:
    """Copy remote[i] to local[i]; both are (n, 3) uint64: address, bytes, device."""

    remote_kind: str
    local_kind: str
    remote: NDArray[np.uint64]
    local: NDArray[np.uint64]


class Regions:
    """The regions of one memory, in order and without gaps, to look offsets up in."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self.regions = tuple(regions)
        self.nbytes = sum(region.nbytes for region in regions)
        self._ends = np.cumsum([region.nbytes for region in regions], dtype=np.int64)
        starts = [int(end) - region.nbytes for end, region in zip(self._ends, regions, strict=True)]
        if starts != [region.offset for region in regions]:
            raise ValueError("regions must follow each other without a gap")
        # Address of offset 0 as seen from each region: adding an offset gives its address.
        self._bases = np.array([r.address - r.offset for r in regions], np.int64)
        self._devices = np.array([r.device for r in regions], np.uint64)
        kinds = [region.kind for region in regions]
        self.kinds = tuple(dict.fromkeys(kinds))
        self._kinds = np.array([self.kinds.index(kind) for kind in kinds], np.int64)

    def region_of(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index of the region that each offset is in."""
        return np.searchsorted(self._ends, offsets, side="right")

    def room_at(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bytes from each offset to the end of its region."""
        room: NDArray[np.int64] = self._ends[self.region_of(offsets)] - offsets
        return room

    def kind_of(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index into `kinds` of each offset."""
        kinds: NDArray[np.int64] = self._kinds[self.region_of(offsets)]
        return kinds

    def addressed(
        self, offsets: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.uint64]:
        """(n, 3): address, bytes, device."""
        at = self.region_of(offsets)
        table = np.empty((len(offsets), 3), np.uint64)
        table[:, 0] = self._bases[at] + offsets
        table[:, 1] = lengths
        table[:, 2] = self._devices[at]
        return table


def described(reads: Sequence[Read], remote: Regions, local: Regions) -> list[Descriptors]:
    """The lists for some reads. Empty reads are left out.

    Raises TransportError if a read leaves one of the two memories.
    """
    table = _table(reads)
    _require_inside(table, remote.nbytes, local.nbytes)
    table = table[table[:, 2] > 0]
    if not len(table):
        return []
    from_, to, lengths = _cut(table, remote, local).T
    kinds = remote.kind_of(from_) * len(local.kinds) + local.kind_of(to)
    lists = []
    for kind in np.unique(kinds).tolist():
        mine = slice(None) if (kinds == kind).all() else kinds == kind
        lists.append(
            Descriptors(
                remote.kinds[kind // len(local.kinds)],
                local.kinds[kind % len(local.kinds)],
                remote.addressed(from_[mine], lengths[mine]),
                local.addressed(to[mine], lengths[mine]),
            )
        )
    return lists


def _table(reads: Sequence[Read]) -> NDArray[np.int64]:
    """Rows of (remote, local, bytes). A field at a time, as that is the quickest."""
    try:
        columns = [
            np.fromiter(map(attrgetter(field), reads), np.int64, len(reads))
            for field in ("remote", "local", "length")
        ]
    except OverflowError:
        raise TransportError("a read at an offset that no memory has") from None
    return np.column_stack(columns)


def _require_inside(table: NDArray[np.int64], remote_bytes: int, local_bytes: int) -> None:
    lengths = table[:, 2]
    wrong = (
        (table < 0).any(axis=1)
        | (lengths > remote_bytes - table[:, 0])
        | (lengths > local_bytes - table[:, 1])
    )
    if wrong.any():
        remote, local, length = table[wrong][0].tolist()
        raise TransportError(
            f"a read of {length} bytes from {remote} to {local} leaves memory "
            f"of {remote_bytes} or {local_bytes} bytes"
        )


def _cut(table: NDArray[np.int64], remote: Regions, local: Regions) -> NDArray[np.int64]:
    """Rows of (remote, local, bytes), none of which goes over the end of a region."""
    done = []
    while len(table):
        fits = np.minimum(remote.room_at(table[:, 0]), local.room_at(table[:, 1]))
        size = np.minimum(fits, table[:, 2])
        done.append(np.column_stack((table[:, 0], table[:, 1], size)))
        rest = size < table[:, 2]
        table = (table + np.column_stack((size, size, -size)))[rest]
    return done[0] if len(done) == 1 else np.concatenate(done)


def packed(regions: Sequence[Region]) -> str:
    """Regions as text, for a ticket."""
    return json.dumps([[r.offset, r.address, r.nbytes, r.kind, r.device] for r in regions])


def unpacked(text: str) -> Regions:
    """Regions from a ticket. Raises ValueError if it makes no sense."""
    try:
        rows = json.loads(text)
        regions = [Region(int(o), int(a), int(n), str(k), int(d)) for o, a, n, k, d in rows]
    except (TypeError, ValueError) as error:
        raise ValueError(f"not a list of regions: {error}") from None
    if not regions or any(
        r.nbytes < 0 or r.address < 0 or r.address + r.nbytes >= 2**63 or r.kind not in _KINDS
        for r in regions
    ):
        raise ValueError("not a list of regions")
    return Regions(regions)


_KINDS = ("DRAM", "VRAM")
