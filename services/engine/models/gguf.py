"""Reads GGUF files: metadata and where each tensor's bytes are.

The format, version 2 and 3, little-endian: magic, version, counts; then keys with typed values;
then tensor descriptions; then, from the next multiple of `general.alignment` (32), tensor data at
the offsets described. Every length is held against the file's size before it is believed, so a
truncated or damaged file is a ModelFileError that says what is wrong and at which byte.
Source: the GGUF specification of the ggml project (docs/gguf.md).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt

from services.engine.models.errors import ModelFileError

Value = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]
T = TypeVar("T")

MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
# Value type -> struct code (little-endian, no padding).
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_MAX_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor as stored.

    shape: as numpy has it, slowest dimension first (GGUF writes the reverse).
    type: number of its ggml type. offset: bytes from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF file's metadata and tensor descriptions. `data` are the file's bytes, mapped."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]
    data: npt.NDArray[np.uint8]

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """A value of the metadata; with no default it must be there. Raises ModelFileError."""
        value = self.metadata.get(key, default)
        if value is None:
            raise ModelFileError(self.path, f"metadata key {key} is missing")
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ModelFileError(
                self.path, f"metadata key {key} is a {type(value).__name__}, not a {kind.__name__}"
            )
        return value

    def optional(self, key: str, kind: type[T]) -> T | None:
        """A value of the metadata, or None. Raises ModelFileError if it is of another kind."""
        return self.get(key, kind) if key in self.metadata else None


def read(path: Path) -> GgufFile:
    """Reads the header of a file. Raises ModelFileError, OSError."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(4)
        if start != MAGIC:
            raise ModelFileError(path, f"not a GGUF file: it begins with {start!r}, not {MAGIC!r}")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(path, mapped, size)
    version = cursor.scalar(4, "version")
    if version not in (2, 3):
        raise ModelFileError(path, f"GGUF version {version} can't be read, only 2 and 3")
    tensor_count = cursor.count(10, "tensor count", least_bytes=24)
    key_count = cursor.count(10, "metadata count", least_bytes=13)
    metadata: dict[str, Value] = {}
    for i in range(key_count):
        key = cursor.string(f"name of metadata key {i}")
        if key in metadata:
            raise ModelFileError(path, f"metadata key {key} occurs twice")
        metadata[key] = cursor.value(f"metadata key {key}")
    described = [cursor.tensor(f"description of tensor {i}") for i in range(tensor_count)]
    tensors = _placed(path, described, cursor.at, metadata)
    return GgufFile(path, metadata, tensors, np.frombuffer(mapped, np.uint8))


def _placed(
    path: Path, described: list[GgufTensor], end: int, metadata: Mapping[str, Value]
) -> dict[str, GgufTensor]:
    """Tensors by name, their offsets now from the start of the file. `end`: of the descriptions."""
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ModelFileError(path, f"general.alignment is {alignment!r}, not a power of two")
    start = -(-end // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for t in described:
        if t.name in tensors:
            raise ModelFileError(path, f"tensor {t.name} occurs twice")
        tensors[t.name] = GgufTensor(t.name, t.shape, t.type, start + t.offset)
    return tensors


class _Cursor:
    """Reads on from `at`, never past the end."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self._path = path
        self._data = data
        self._size = size
        self.at = len(MAGIC)

    def _take(self, nbytes: int, what: str) -> int:
        at = self.at
        if nbytes > self._size - at:
            raise ModelFileError(
                self._path,
                f"truncated or damaged: {what} at byte {at} needs {nbytes} bytes, "
                f"but the file ends at {self._size}",
            )
        self.at = at + nbytes
        return at

    def scalar(self, kind: int, what: str) -> bool | int | float:
        code = "<" + _SCALARS[kind]
        at = self._take(struct.calcsize(code), what)
        return cast(bool | int | float, struct.unpack_from(code, self._data, at)[0])

    def count(self, kind: int, what: str, *, least_bytes: int) -> int:
        """A count of things of which each takes at least so many bytes of what is left."""
        at = self.at
        count = int(self.scalar(kind, what))
        if count * least_bytes > self._size - self.at:
            raise ModelFileError(
                self._path,
                f"truncated or damaged: {what} at byte {at} is {count}, "
                f"more than the {self._size - self.at} bytes after it can hold",
            )
        return count

    def string(self, what: str) -> str:
        length = self.count(10, f"length of {what}", least_bytes=1)
        at = self._take(length, what)
        try:
            return self._data[at : at + length].decode()
        except UnicodeDecodeError as error:
            raise ModelFileError(self._path, f"{what} at byte {at} is not UTF-8") from error

    def value(self, what: str) -> Value:
        kind = int(self.scalar(4, f"type of {what}"))
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self._array(what)
        return self.scalar(self._known(kind, what), what)

    def _array(self, what: str) -> Value:
        kind = int(self.scalar(4, f"type of {what}"))
        if kind == _STRING:
            return [self.string(what) for _ in range(self.count(10, what, least_bytes=8))]
        code = _SCALARS[self._known(kind, what)]
        each = struct.calcsize(code)
        length = self.count(10, f"length of {what}", least_bytes=each)
        at = self._take(length * each, what)
        return list(struct.unpack_from(f"<{length}{code}", self._data, at))

    def _known(self, kind: int, what: str) -> int:
        if kind not in _SCALARS:
            raise ModelFileError(
                self._path, f"{what} before byte {self.at} has type {kind}, which can't be read"
            )
        return kind

    def tensor(self, what: str) -> GgufTensor:
        name = self.string(what)
        dimensions = int(self.scalar(4, what))
        if dimensions > _MAX_DIMENSIONS:
            raise ModelFileError(
                self._path, f"tensor {name} has {dimensions} dimensions, at most 4 can be"
            )
        shape = tuple(int(self.scalar(10, what)) for _ in range(dimensions))
        kind = int(self.scalar(4, what))
        offset = int(self.scalar(10, what))
        return GgufTensor(name, shape[::-1], kind, offset)
