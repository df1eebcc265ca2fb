"""Reads a folder once to describe it, and remembers what it read.

What was read of a file is remembered with the file's identity (device, inode, size, time of last
change): as long as that is what it was, the file is not read again. A file whose bytes were changed
under an unchanged identity is described wrongly; who fetches it notices by the digests.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvtransfer.errors import WeightsNotGivenError
from kvtransfer.weights.manifest import PIECE_BYTES, File, Manifest, may_be_given

Advance = Callable[[int], None]
"""Told how many more bytes are done, on any thread."""

Identity = tuple[int, int, int, int]
"""Device, inode, size, time of last change in nanoseconds."""

Row = tuple[Identity, bytes]
"""Of a file: its identity when it was read, the digests of its pieces."""

_FORMAT = 1


class Digests:
    """What was read of files, by name; with `path` also for the next process.

    For any thread, one at a time.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._rows: Mapping[str, Row] | None = None

    def recall(self, piece_bytes: int) -> Mapping[str, Row]:
        """Rows in pieces of this size. A file that can't be read is as good as none."""
        if self._rows is None:
            self._rows = _load(self._path, piece_bytes)
        return self._rows

    def keep(self, folder: Path, manifest: Manifest) -> None:
        """Keeps what is known of a folder's files. Where it can't, they will be read again."""
        rows = {
            file.name: (identity((folder / file.name).stat()), file.digests)
            for file in manifest.files
        }
        if rows == self._rows:
            return
        self._rows = rows
        if self._path is not None:
            with contextlib.suppress(OSError):
                _save(self._path, manifest.piece_bytes, rows)


def describe(
    folder: Path,
    known: Digests,
    advance: Advance | None = None,
    *,
    piece_bytes: int = PIECE_BYTES,
    threads: int = 2,
) -> Manifest:
    """The manifest of a model's folder; links are followed. Blocks for as long as reading takes.

    Raises WeightsNotGivenError if there is nothing to give or a file changes meanwhile, OSError if
    one can't be read, and what `advance` raises.
    """
    paths = sorted(p for p in folder.iterdir() if may_be_given(p.name) and p.is_file())
    if not paths:
        raise WeightsNotGivenError(f"{folder} has no files of a model", folder=folder)
    rows = known.recall(piece_bytes)
    with ThreadPoolExecutor(threads, "tandem-digests") as pool:
        try:
            files = [_described(path, rows, piece_bytes, pool, advance) for path in paths]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    manifest = Manifest(piece_bytes, tuple(files))
    known.keep(folder, manifest)
    return manifest


def identity(found: os.stat_result) -> Identity:
    """Of a file, as long as nobody writes to it."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def digests_of(
    fd: int, size: int, piece_bytes: int, pool: ThreadPoolExecutor, advance: Advance | None = None
) -> Iterator[bytes]:
    """SHA-256 of each piece of a file, in order; of fewer bytes where it has become shorter."""

    def digest(offset: int) -> bytes:
        length = min(piece_bytes, size - offset)
        found = hashlib.sha256(os.pread(fd, length, offset)).digest()
        if advance is not None:
            advance(length)
        return found

    return pool.map(digest, range(0, size, piece_bytes))


def _described(
    path: Path,
    known: Mapping[str, Row],
    piece_bytes: int,
    pool: ThreadPoolExecutor,
    advance: Advance | None,
) -> File:
    with open(path, "rb") as file:
        before = identity(os.fstat(file.fileno()))
        size = before[2]
        was, digests = known.get(path.name, (None, b""))
        if was == before:
            if advance is not None:
                advance(size)
            return File(path.name, size, digests)
        digests = b"".join(digests_of(file.fileno(), size, piece_bytes, pool, advance))
        if identity(os.fstat(file.fileno())) != before:
            raise WeightsNotGivenError(f"{path} was written to while it was read", file=path)
    return File(path.name, size, digests)


def _load(path: Path | None, piece_bytes: int) -> Mapping[str, Row]:
    if path is None:
        return {}
    try:
        said = json.loads(path.read_text())
        if (said["format"], said["piece_bytes"]) != (_FORMAT, piece_bytes):
            return {}
        rows = {}
        for name, (device, inode, size, changed, digests) in said["files"].items():
            rows[str(name)] = (device, inode, size, changed), bytes.fromhex(digests)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return rows


def _save(path: Path, piece_bytes: int, rows: Mapping[str, Row]) -> None:
    files = {name: [*identity, digests.hex()] for name, (identity, digests) in rows.items()}
    said = {"format": _FORMAT, "piece_bytes": piece_bytes, "files": files}
    path.parent.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(dir=path.parent)
    try:
        with open(number, "w") as file:
            json.dump(said, file)
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise


def total_bytes(folder: Path) -> int:
    """Of the files that describe() reads."""
    found = (p.stat() for p in folder.iterdir() if may_be_given(p.name))
    return sum(s.st_size for s in found if stat.S_ISREG(s.st_mode))
