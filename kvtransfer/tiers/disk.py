"""The tier on a local disk: a folder that outlives the process, and may be torn by its end.

A write first voids the place's record, then writes the block, then the new record. So a process
that is killed leaves a place empty or whole. The system may lose power with anything in any order
on the disk; then the checksums in a record do not fit its block, and the block is dropped when it
is read. Nothing is ever synced: a cache is not worth the wait.

A disk may stop to answer, and a system call waits for it without end. So these are made by threads
that can be left behind, which read into memory of their own: a block of the pool is never
written by a read that nobody waits for any more.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from kvtransfer.errors import TierUnusableError
from kvtransfer.tiers.base import Bytes, Label, Shape
from kvtransfer.tiers.patience import Patience
from kvtransfer.tiers.places import PlaceTier
from kvtransfer.tiers.policy import Policy
from kvtransfer.tiers.record import HEADER_BYTES, RecordFormat

log = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0
"""A disk that takes longer for one block has failed."""

_SCAN_RECORDS = 2048
_THREADS = 3  # Reads for one engine and its peers, and a write.


class Folder:
    """Places in a folder's files: see Medium and record.py. One process at a time has it."""

    def __init__(self, folder: Path, capacity_bytes: int, shape: Shape) -> None:
        self._format = RecordFormat(shape)
        self._block_bytes = shape.block_bytes
        self._record_bytes, self._place_bytes = self._format.record_bytes, self._format.place_bytes
        self.bytes_per_place = self._record_bytes + self._place_bytes
        self.places = (capacity_bytes - HEADER_BYTES) // self.bytes_per_place
        if self.places < 1:
            raise ValueError(f"{capacity_bytes} bytes hold no block of {self.bytes_per_place}")
        self._path = folder
        self._sequence = 0
        self._buffers: list[Bytes] = []
        self._closing = contextlib.ExitStack()
        try:
            with contextlib.ExitStack() as opened:
                folder.mkdir(parents=True, exist_ok=True)
                _lock(folder, opened)
                self._index, self._data = self._open(opened)
                self._patience = Patience("tandem-kv-disk", _THREADS, ANSWER_SECONDS)
                self._closing = opened.pop_all()
        except OSError as error:
            raise TierUnusableError(
                f"the folder {folder} can't hold {capacity_bytes} bytes of KV blocks: "
                f"{error.strerror or error}",
                folder=folder,
            ) from error

    def found(self) -> Iterable[tuple[int, Label]]:
        """What is whole, by its record; the data are not read before they are asked for."""
        whole, torn = [], 0
        for place, raw in self._records():
            read = self._format.read(raw)
            if read is not None:
                whole.append((*read, place))
            elif any(raw):
                torn += 1
        whole.sort(key=lambda found: found[0])
        if whole:
            self._sequence = whole[-1][0]
        if whole or torn:
            log.info("%s has %d KV blocks, and %d torn records", self._path, len(whole), torn)
        return [(place, label) for _, label, place in whole]

    def fits(self, label: Label) -> bool:
        """Whether a record has room for it."""
        return self._format.fits(label)

    def write(self, place: int, label: Label, data: Bytes) -> None:
        """Void, block, record: in this order."""
        self._sequence += 1
        record = self._format.record(self._sequence, label)

        def write() -> None:
            self._void(place)
            _write(self._data, data.data, place * self._place_bytes)
            # If nobody waits any more `data` may be other data by now.
            if not self._patience.lost:
                _write(self._index, record, self._record_at(place))

        self._patience.run(write)

    def read(self, place: int, into: Bytes) -> None:
        """By way of a buffer, see above."""
        try:
            buffer = self._buffers.pop()
        except IndexError:  # asking first whether there is one would be no answer: others take too
            buffer = np.empty(self._block_bytes, np.uint8)
        self._patience.run(lambda: _read(self._data, buffer.data, place * self._place_bytes))
        np.copyto(into, buffer)
        self._buffers.append(buffer)

    def erase(self, place: int) -> None:
        """Voids the record."""
        self._patience.run(lambda: self._void(place))

    def close(self) -> None:
        """Lets the folder go; not before the process ends if a system call never came back."""
        self._patience.close()
        if not self._patience.lost:
            self._closing.close()

    def _open(self, opened: contextlib.ExitStack) -> tuple[int, int]:
        index, data = self._path / "index", self._path / "data"
        why = self._why_not(index, data)
        if why:
            log.warning("%s is cleared: %s", self._path, why)
            index.unlink(missing_ok=True)
            data.unlink(missing_ok=True)
        data_fd = _opened(data, opened)
        _resize(data_fd, self.places * self._place_bytes)
        if not index.exists():
            # Under another name until it has its header: a crash leaves none, or a whole one.
            young = self._path / "index.new"
            young.write_bytes(self._format.header())
            young.rename(index)
        index_fd = _opened(index, opened)
        _resize(index_fd, self._record_at(self.places))
        return index_fd, data_fd

    def _why_not(self, index: Path, data: Path) -> str:
        if not index.exists():
            return "it has blocks without an index" if data.exists() else ""
        if not data.exists():
            return "it has an index without blocks"
        with index.open("rb") as file:
            return self._format.why_not(file.read(HEADER_BYTES))

    def _void(self, place: int) -> None:
        _write(self._index, bytes(self._record_bytes), self._record_at(place))

    def _records(self) -> Iterator[tuple[int, bytes]]:
        size = self._record_bytes
        for first in range(0, self.places, _SCAN_RECORDS):
            count = min(_SCAN_RECORDS, self.places - first)
            raw = bytearray(count * size)
            _read(self._index, memoryview(raw), self._record_at(first))
            for i in range(count):
                yield first + i, bytes(raw[i * size : (i + 1) * size])

    def _record_at(self, place: int) -> int:
        return HEADER_BYTES + place * self._record_bytes


def disk_tier(
    shape: Shape, folder: Path, capacity_bytes: int, policy: Policy | None = None
) -> PlaceTier:
    """A tier of as many blocks as `capacity_bytes` of files hold, with those that the folder has.

    Raises ValueError if that is none, TierUnusableError if the folder can't be used or another
    process has it. One of another layout or version is cleared, which the log says.
    """
    medium = Folder(folder, capacity_bytes, shape)
    try:
        return PlaceTier("disk", shape, medium, policy)
    except OSError as error:
        medium.close()
        raise TierUnusableError(
            f"the folder {folder} can't be read: {error.strerror or error}", folder=folder
        ) from error


def _opened(path: Path, opened: contextlib.ExitStack) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    opened.callback(os.close, fd)
    return fd


def _lock(folder: Path, opened: contextlib.ExitStack) -> None:
    """The lock goes with the process, however that ends."""
    import fcntl

    fd = _opened(folder / "lock", opened)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        raise TierUnusableError(
            f"the folder {folder} is in use by process {owner}; every worker needs its own",
            folder=folder,
            process=owner,
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)


def _resize(fd: int, size: int) -> None:
    """To so many bytes that are there: a disk that is too small says so now."""
    os.ftruncate(fd, size)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)


def _write(fd: int, raw: bytes | memoryview, at: int) -> None:
    view = memoryview(raw)
    while view:
        written = os.pwrite(fd, view, at)
        view, at = view[written:], at + written


def _read(fd: int, into: memoryview, at: int) -> None:
    while into:
        count = os.preadv(fd, [into], at)
        if not count:
            raise OSError(None, "the file is shorter than it was made")
        into, at = into[count:], at + count
