"""Where a fetched folder is put together, file by file.

    <folder>/.NAME.<digest>.part    what has come of a file, the rest is a hole
    <folder>/NAME                   the file, once every byte of it is here, verified, on the disk

config.json gets its name last, so a folder that has it has everything. What a process that died
has left is not believed but read again: pieces that are what they should be count. Files that
are there under their own names are kept if they are the same, and never overwritten.

Blocks; each method may be called on any thread, put() on several at once. One process at a time.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvtransfer.errors import WeightsDifferError
from kvtransfer.weights.describing import Advance, digests_of
from kvtransfer.weights.manifest import DIGEST_BYTES, LAST_FILE, Manifest

_PART = ".part"


class FolderLanding:
    """Files of one manifest on their way into `folder`, which exists."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._suffix = f".{manifest.digest.hex()[:16]}{_PART}"
        self._lock = threading.Lock()
        self._open: dict[int, int] = {}
        """Descriptor of each file that something is missing of."""
        self._missing: list[int] = [file.pieces for file in manifest.files]
        self._waiting = [False] * len(manifest.files)
        """Of config.json: it is whole, and others are not."""
        self._put: set[int] = set()
        """Pieces that are here since the survey, or being written."""

    @property
    def whole(self) -> bool:
        """Every file has its name."""
        return all((self.folder / file.name).is_file() for file in self.manifest.files)

    def survey(self, advance: Advance | None = None, threads: int = 2) -> list[int]:
        """Looks what is here; returns the pieces that are not, by number.

        Sweeps what is left of fetches of other folders. Raises WeightsDifferError if a file of
        the same name is not the same, OSError.
        """
        for left in self.folder.glob(f".*{_PART}"):
            if not left.name.endswith(self._suffix):
                left.unlink()
        missing: list[int] = []
        with ThreadPoolExecutor(threads, "tandem-digests") as pool:
            for index in range(len(self.manifest.files)):
                here = self._whole(index, pool, advance)
                lacks = [] if here else self._lacks(index, pool, advance)
                missing += lacks
                self._missing[index] = -1 if here else len(lacks)
        for index, lacks_none in enumerate(self._missing):
            if lacks_none == 0:
                self._finish(index)
        return missing

    def put(self, number: int, view: memoryview) -> bool:
        """Writes a piece if it is what it should be; whether it is.

        With its last piece a file gets its name. One that two peers have brought is written once.
        Raises OSError.
        """
        piece = self.manifest.piece(number)
        if len(view) != piece.length or hashlib.sha256(view).digest() != piece.digest:
            return False
        with self._lock:
            if number in self._put:
                return True
            self._put.add(number)
            fd, offset = self._open[piece.file], piece.offset
        while view:
            written = os.pwrite(fd, view, offset)
            view, offset = view[written:], offset + written
        with self._lock:
            self._missing[piece.file] -= 1
            last = self._missing[piece.file] == 0
        if last:
            self._finish(piece.file)
        return True

    def close(self) -> None:
        """Gives up what is not whole; it stays for the next attempt. Idempotent."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    def _whole(self, index: int, pool: ThreadPoolExecutor, advance: Advance | None) -> bool:
        """Whether a file is here under its name. Raises WeightsDifferError if it is another."""
        file = self.manifest.files[index]
        path = self.folder / file.name
        try:
            with open(path, "rb") as found:
                same = os.fstat(found.fileno()).st_size == file.size and file.digests == b"".join(
                    digests_of(found.fileno(), file.size, self.manifest.piece_bytes, pool, advance)
                )
        except FileNotFoundError:
            return False
        if not same:
            raise WeightsDifferError(
                f"{path} is here and is not what peers have under this name; move it away, or "
                "fetch into another folder",
                file=path,
            )
        return True

    def _lacks(self, index: int, pool: ThreadPoolExecutor, advance: Advance | None) -> list[int]:
        """The pieces that a file's part, which is made if need be, does not have."""
        file, size = self.manifest.files[index], self.manifest.piece_bytes
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = self._open[index] = os.open(self._part(index), flags, 0o644)
        if os.fstat(fd).st_size != file.size:
            os.ftruncate(fd, file.size)
        if not file.size or _is_hole(fd):
            return list(self.manifest.numbers(index))
        found = digests_of(fd, file.size, size, pool, advance)
        return [
            number
            for place, (number, digest) in enumerate(
                zip(self.manifest.numbers(index), found, strict=True)
            )
            if digest != file.digests[place * DIGEST_BYTES : (place + 1) * DIGEST_BYTES]
        ]

    def _finish(self, index: int) -> None:
        """Gives a file its name, and config.json its own once all others have theirs."""
        fd = self._open[index]
        os.fsync(fd)
        last = []
        with self._lock:
            if self.manifest.files[index].name == LAST_FILE:
                self._waiting[index] = True
            else:
                self._name(index)
            if len(self._open) == sum(self._waiting):
                last = [i for i, waits in enumerate(self._waiting) if waits]
        if last or not self._open:
            _sync_folder(self.folder)
        for index in last:
            self._waiting[index] = False
            self._name(index)
            _sync_folder(self.folder)

    def _name(self, index: int) -> None:
        os.rename(self._part(index), self.folder / self.manifest.files[index].name)
        os.close(self._open.pop(index))

    def _part(self, index: int) -> Path:
        return self.folder / f".{self.manifest.files[index].name}{self._suffix}"


def _is_hole(fd: int) -> bool:
    """Whether nothing was ever written to a file that has its size."""
    try:
        os.lseek(fd, 0, os.SEEK_DATA)
    except OSError as error:
        return error.errno == errno.ENXIO
    return False


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
