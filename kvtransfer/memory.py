"""The memory that KV blocks lie in.

On Linux it is a memfd: memory with a descriptor and no name. Another process that may look at this
one can map it through /proc/PID/fd/FD, and nothing is left behind when this process ends, by
whatever signal. Sealing keeps the size fixed, so that no mapping of it can ever fault. Elsewhere it
is anonymous memory, which can't be shared; `why_not_shared` then says so.

    byte 0      header, one 4096-byte piece: magic, version, nonce, bytes of data
    byte 4096   data

The header lets a reader prove that it mapped what it was told of, and not what a process that
got the same id since has under the same descriptor number.

A GPU's blocks are a DeviceSegment: the same offsets, over memory of two kinds. What a transport
needs of either is `Memory`.
"""

from __future__ import annotations

import mmap
import os
import struct
import weakref
from dataclasses import dataclass
from typing import Protocol

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


class Memory(Protocol):
    """`data_bytes` bytes with offsets from 0 on, wherever they lie."""

    @property
    def nonce(self) -> bytes:
        """16 bytes that name this memory in this run of this process. Secret."""

    @property
    def data_bytes(self) -> int:
        """How many bytes there are."""

    @property
    def regions(self) -> tuple[Region, ...]:
        """What a transport registers; together they are the memory, in order, without gaps."""


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


class DeviceCopies(Protocol):
    """Copies between a GPU and the host, as whoever allocated the GPU's memory makes them.

    An engine on torch has them as `tensor[a:b].cpu()` and `copy_`; this room imports no torch.
    """

    def to_host(self, address: int, out: NDArray[np.uint8]) -> None:
        """Fills `out` from device memory. Returns when it is done."""

    def from_host(self, address: int, data: NDArray[np.uint8]) -> None:
        """Writes `data` to device memory. Returns when it is done."""


class DeviceSegment:
    """Blocks in a GPU's memory, and after them host memory for what goes with blocks.

    Offsets 0 to `device_bytes` are the `device_bytes` bytes at `address` on GPU `device`, which the
    caller allocated and keeps; the `host_bytes` after them (generations, scratch) are allocated
    here. Of the transports only NIXL can move it (transports/build.py).

    What is tested is the arithmetic and what NIXL is told, with made-up addresses; no GPU's memory
    was ever registered or read by it.
    """

    fd = None
    why_not_shared = "its blocks are in a GPU's memory, which other processes can't map"

    def __init__(
        self,
        address: int,
        device_bytes: int,
        device: int,
        host_bytes: int,
        nonce: bytes,
        copies: DeviceCopies,
    ) -> None:
        if len(nonce) != NONCE_BYTES:
            raise ValueError(f"a nonce has {NONCE_BYTES} bytes")
        self.nonce = nonce
        self.device_bytes = device_bytes
        self.data_bytes = device_bytes + host_bytes
        mapped = mmap.mmap(-1, max(1, host_bytes))
        self.host: NDArray[np.uint8] = np.frombuffer(mapped, np.uint8, host_bytes)
        """The bytes from offset `device_bytes` on, writable."""
        self._address = address
        self._device = device
        self._copies = copies

    @property
    def regions(self) -> tuple[Region, ...]:
        """The GPU's part, then the host's if there is one."""
        vram = Region(0, self._address, self.device_bytes, "VRAM", self._device)
        if not self.host.nbytes:
            return (vram,)
        return vram, Region(self.device_bytes, self.host.ctypes.data, self.host.nbytes)

    def read(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """A copy of some bytes in host memory, for checksums. Raises ValueError if out of range."""
        out = np.empty(nbytes, np.uint8)
        on_device = self._split(offset, nbytes)
        if on_device:
            self._copies.to_host(self._address + offset, out[:on_device])
        at = offset + on_device - self.device_bytes
        out[on_device:] = self.host[at : at + nbytes - on_device]
        return out

    def write(self, offset: int, data: NDArray[np.uint8]) -> None:
        """Puts bytes in place. Raises ValueError if out of range."""
        on_device = self._split(offset, data.nbytes)
        if on_device:
            self._copies.from_host(self._address + offset, data[:on_device])
        at = offset + on_device - self.device_bytes
        self.host[at : at + data.nbytes - on_device] = data[on_device:]

    def close(self) -> None:
        """Nothing to give up: nobody can map it."""

    def _split(self, offset: int, nbytes: int) -> int:
        """How many of the bytes are the GPU's."""
        if offset < 0 or offset + nbytes > self.data_bytes:
            raise ValueError(f"{nbytes} bytes at {offset} leave the {self.data_bytes} there are")
        return max(0, min(self.device_bytes - offset, nbytes))


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
