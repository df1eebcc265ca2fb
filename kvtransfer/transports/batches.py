"""Reads in requests of bounded size. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from kvtransfer.transports.base import Read


def batches(reads: Sequence[Read], max_ranges: int, max_bytes: int) -> list[list[Read]]:
    """The same bytes in order, at most so many reads and bytes together; long reads are cut."""
    result: list[list[Read]] = []
    room = 0
    for read in reads:
        at = 0
        while at < read.length:
            if not room or len(result[-1]) == max_ranges:
                result.append([])
                room = max_bytes
            size = min(read.length - at, room)
            result[-1].append(Read(read.remote + at, read.local + at, size))
            at += size
            room -= size
    return result
