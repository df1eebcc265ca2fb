"""The folder that fetched and converted models live in, and how it stays whole.

    <cache>/<model>/<file>.gguf                    as fetched, checked against the catalogue
    <cache>/<model>/hf-<sha256>-v<converter>/      what engines load, made from it
    <cache>/local/hf-<sha256>-v<converter>/        the same, of GGUF files named by path

Everything is made in a `.part-` folder beside its place and renamed into it while the model's lock
is held, so what has its final name is complete; what a killed process left is swept by the next.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from services.engine.models.errors import ModelFetchError, ModelSpaceError

PART = ".part-"
_CHUNK = 1 << 20

Advance = Callable[[int], None]
"""Told how many more bytes are done."""


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Where models are kept: below $XDG_CACHE_HOME, or ~/.cache."""
    base = environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is invalid and to be ignored.
    root = (
        Path(base) if base.startswith("/") else Path(environ.get("HOME") or Path.home(), ".cache")
    )
    return root / "tandem" / "models"


@contextmanager
def locked(folder: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds the lock of a model's folder, which is made if need be. `waiting` if it must wait.

    The kernel drops the lock when its holder dies, however it dies.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")  # noqa: SIM115 - closed below
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def part(folder: Path) -> Iterator[Path]:
    """An empty folder to work in; the lock of `folder` must be held.

    It is removed at the end with what was not renamed out of it, and so is what dead ones left.
    """
    for left in folder.glob(f"{PART}*"):
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=PART, dir=folder))
    try:
        with writing(folder):
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def publish(made: Path, place: Path) -> None:
    """Renames a complete file or folder into its place, after its bytes are on the disk."""
    for path in sorted(made.rglob("*")) if made.is_dir() else [made]:
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    if place.is_dir():
        shutil.rmtree(place)
    os.replace(made, place)


def need_space(folder: Path, size: int) -> None:
    """Raises ModelSpaceError if the disk has less than `size` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ModelSpaceError(
            f"{folder}: {size / 1e6:.0f} MB are needed, the disk has {free / 1e6:.0f} MB free",
            needed=size,
            free=free,
        )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns what the operating system says of a disk that takes no more into words of our own."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelSpaceError(f"{folder}: the disk is full ({error.strerror})") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ModelFetchError(f"{folder} can't be written: {error.strerror}") from error
        raise


def sha256_of(path: Path, advance: Advance | None = None) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if advance is not None:
                advance(len(chunk))
    return digest.hexdigest()
