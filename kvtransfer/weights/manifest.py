"""What files a model's folder has, named by what is in them. Pure.

A folder is described by a digest that stands for every byte of it:

    piece   SHA-256 of its bytes
    folder  SHA-256 of: tag, piece size, and by name: length of the name, name, size, digests of
            the file's pieces

So whoever knows the folder's digest need not trust who describes it, nor who brings a piece. Sizes
are little-endian uint64, lengths uint32. Pieces are numbered over all files, in the order of names.
"""

from __future__ import annotations

import hashlib
import re
import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from kvtransfer.errors import WeightsInvalidError

DIGEST_BYTES = 32
PIECE_BYTES = 4 * 2**20
"""Large enough that a message about each costs nothing, small enough to keep a few in memory."""
SMALLEST_PIECE = 4096
LARGEST_PIECE = 16 * 2**20
MAX_FILES = 4096
MAX_PIECES = 4_000_000
"""16 TB at the usual size."""
LAST_FILE = "config.json"
"""Without it a folder is no model: so it comes last, and where it is all others are."""

_TAG = b"tandem weights 1"
# No code (*.py) among them: whoever gives weights must not give programs.
_NAME = re.compile(
    r"(LICENSE|NOTICE|[A-Za-z0-9_][A-Za-z0-9._-]{0,150}"
    r"\.(safetensors|json|jinja|model|tiktoken|txt|md))"
)


def may_be_given(name: str) -> bool:
    """Whether a file of this name is one of a model's: no path, nothing hidden, no code."""
    return _NAME.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class File:
    """One file. digests: of its pieces, one after the other."""

    name: str
    size: int
    digests: bytes

    @property
    def pieces(self) -> int:
        """How many it has."""
        return len(self.digests) // DIGEST_BYTES


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of one file."""

    file: int
    """Index into Manifest.files."""
    offset: int
    """In the file, bytes."""
    length: int
    digest: bytes


@dataclass(frozen=True)
class Manifest:
    """The files of a folder, by name. Raises WeightsInvalidError if it can't be one."""

    piece_bytes: int
    files: tuple[File, ...]
    _starts: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """Number of each file's first piece; then how many there are."""

    def __post_init__(self) -> None:
        _check(self.piece_bytes, self.files)
        starts = tuple(accumulate((file.pieces for file in self.files), initial=0))
        object.__setattr__(self, "_starts", starts)

    @property
    def pieces(self) -> int:
        """Of all files."""
        return self._starts[-1]

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(file.size for file in self.files)

    @property
    def digest(self) -> bytes:
        """The folder's."""
        whole = hashlib.sha256(_TAG + struct.pack("<I", self.piece_bytes))
        for file in self.files:
            name = file.name.encode()
            whole.update(struct.pack("<I", len(name)) + name + struct.pack("<Q", file.size))
            whole.update(file.digests)
        return whole.digest()

    def piece(self, number: int) -> Piece:
        """One piece. Raises WeightsInvalidError if there is none of that number."""
        if not 0 <= number < self.pieces:
            raise WeightsInvalidError(f"piece {number} of {self.pieces} is asked for")
        index = bisect_right(self._starts, number) - 1
        file, place = self.files[index], number - self._starts[index]
        offset = place * self.piece_bytes
        return Piece(
            index,
            offset,
            min(self.piece_bytes, file.size - offset),
            file.digests[place * DIGEST_BYTES : (place + 1) * DIGEST_BYTES],
        )

    def numbers(self, file: int) -> range:
        """The pieces of one file."""
        return range(self._starts[file], self._starts[file + 1])

    def named(self, number: int) -> str:
        """A piece in words."""
        piece = self.piece(number)
        return f"{self.files[piece.file].name} at {piece.offset}"


def _check(piece_bytes: int, files: Sequence[File]) -> None:
    if not SMALLEST_PIECE <= piece_bytes <= LARGEST_PIECE:
        raise WeightsInvalidError(
            f"pieces of {piece_bytes} bytes; {SMALLEST_PIECE} to {LARGEST_PIECE} are allowed"
        )
    if not 0 < len(files) <= MAX_FILES:
        raise WeightsInvalidError(f"{len(files)} files; 1 to {MAX_FILES} are allowed")
    for file in files:
        _check_file(piece_bytes, file)
    for one, other in pairwise(sorted(files, key=lambda file: file.name.casefold())):
        # Some file systems don't tell case apart.
        if one.name.casefold() == other.name.casefold():
            raise WeightsInvalidError(f"two files are called {one.name!r}")
    if [file.name for file in files] != sorted(file.name for file in files):
        raise WeightsInvalidError("the files are not in the order of their names")
    if sum(file.pieces for file in files) > MAX_PIECES:
        raise WeightsInvalidError(f"more than {MAX_PIECES} pieces")


def _check_file(piece_bytes: int, file: File) -> None:
    if not may_be_given(file.name):
        raise WeightsInvalidError(f"{file.name[:200]!r} is no name of a model's file")
    if file.size < 0 or len(file.digests) != -(-file.size // piece_bytes) * DIGEST_BYTES:
        raise WeightsInvalidError(
            f"{file.name}: {len(file.digests)} bytes of digests for {file.size} bytes"
        )
