"""The memory that KV blocks lie in.

On Linux it is a memfd: memory with a descriptor and no name. Another process that may look at this
one can map it through /proc/PID/fd/FD, and nothing is left behind when this process ends, by
whatever signal. Sealing keeps the size fixed, so that no mapping of it can ever fault. Elsewhere it
is anonymous memory, which can't be shared; `why_not_shared` then says so.

    byte 0      header, one 4096-byte piece: magic, version, nonce, bytes of data
    byte 4096   data

The header lets a reader prove that it mapped what it was told of, and not what a process that
got the same id since has under the same descriptor number.
"""

from __future__ import annotations

import mmap
import os
import struct
import weakref
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HEADER_BYTES = 4096
NONCE_BYTES = 16

_MAGIC = b"TANDEMKV"
_VERSION = 1
_HEADER = struct.Struct(f"<8sI{NONCE_BYTES}sQ")


@dataclass(frozen=True, slots=True)
class Region:
    """A run of a segment in one memory: what a transport registers with a device, once."""

    offset: int
    """Where it begins in the segment, bytes."""
    address: int
    """Pointer to its first byte, in the address space of `kind`."""
    nbytes: int
    kind: str = "DRAM"
    """"DRAM" or "VRAM"."""
    device: int = 0
    """Ordinal of the GPU; 0 for DRAM."""


@dataclass(frozen=True, slots=True)
class Header:
    """What the first bytes of a segment say."""

    nonce: bytes
    data_bytes: int


class Segment:
    """Zeroed memory for `data_bytes` bytes, shared by descriptor where the system can.

    Physical memory is taken as it is first touched. The descriptor is closed with the segment.
    """

    def __init__(self, data_bytes: int, nonce: bytes) -> None:
        if len(nonce) != NONCE_BYTES:
            raise ValueError(f"a nonce has {NONCE_BYTES} bytes")
        self.nonce = nonce
        self.data_bytes = data_bytes
        size = HEADER_BYTES + data_bytes
        self.fd, self.why_not_shared = _create(size)
        """Descriptor of the memory, None if it can't be shared, and then why."""
        if self.fd is not None:
            self._closer = weakref.finalize(self, os.close, self.fd)
        mapped = mmap.mmap(-1 if self.fd is None else self.fd, size)
        mapped[: _HEADER.size] = _HEADER.pack(_MAGIC, _VERSION, nonce, data_bytes)
        self.data: NDArray[np.uint8] = np.frombuffer(mapped, np.uint8, offset=HEADER_BYTES)
        """All data bytes, writable. Its mapping lives as long as anything refers to it."""

    @property
    def regions(self) -> tuple[Region, ...]:
        """What a transport registers; together they are the segment, in order."""
        return (Region(0, self.data.ctypes.data, self.data_bytes),)

    def close(self) -> None:
        """Gives the descriptor up: nobody can map the memory any more. Idempotent."""
        if self.fd is not None:
            self._closer()
            self.fd = None


def read_header(raw: bytes) -> Header:
    """The header from the first bytes of a segment. Raises ValueError if it isn't one."""
    if len(raw) < _HEADER.size:
        raise ValueError("not a KV segment: too short")
    magic, version, nonce, data_bytes = _HEADER.unpack_from(raw)
    if magic != _MAGIC:
        raise ValueError("not a KV segment")
    if version != _VERSION:
        raise ValueError(f"KV segment of version {version}, not {_VERSION}")
    return Header(nonce, data_bytes)


def _create(size: int) -> tuple[int | None, str]:
    if not hasattr(os, "memfd_create"):
        return None, "this system has no memfd"
    import fcntl

    try:
        fd = os.memfd_create("tandem-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        return None, f"memfd_create: {error.strerror}"
    try:
        os.ftruncate(fd, size)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except OSError:
        os.close(fd)
        raise
    return fd, ""
