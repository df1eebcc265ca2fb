"""Shared memory, between processes of one host: the sink maps the source's segment and copies.

The source tells its process id and the number of the segment's descriptor; the sink opens
/proc/PID/fd/FD read-only. Both must be in one PID namespace of one boot of one kernel for the
number to mean the same process, and the sink must be allowed to look at it (same user). The nonce
in the segment's header proves that it is the one meant. A mapping serves all fetches from its
source and is dropped once idle, since it keeps the memory of a source that died.

A page of the source costs about 40 ms a GiB more when it is read for the first time through a
mapping. Having the system map all of it ahead (MADV_POPULATE_READ) costs more than that, and would
take memory for every page that the source never wrote.
"""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvtransfer.errors import TransportError, TransportUnusableError
from kvtransfer.memory import HEADER_BYTES, Segment, read_header
from kvtransfer.offload import Offload
from kvtransfer.transports.base import Offer, Read, require_inside

IDLE_SECONDS = 30.0
TURN_BYTES = 2 * 2**20
"""Copied in one go on the event loop, in about 0.2 ms, before others have their turn."""
LOOP_BYTES = 8 * 2**20
"""More goes to a thread: handing it over takes as long as copying 1 MiB does."""
THREAD_BYTES = 16 * 2**20
"""Copied in one go in a thread, in 1 to 2 ms, before it asks whether it may stop."""


def host_identity() -> str:
    """Names this boot of this kernel and this PID namespace; "" where that can't be told."""
    if sys.platform != "linux":
        return ""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


@dataclass(slots=True)
class _Mapping:
    data: NDArray[np.uint8]
    users: int = 0
    idle: asyncio.TimerHandle | None = None


class ShmTransport:
    """Both ends; see the module's docstring and base.Transport."""

    name = "shm"

    def __init__(
        self, segment: Segment, offload: Offload, host_id: str, idle_seconds: float = IDLE_SECONDS
    ) -> None:
        self._segment = segment
        self._offload = offload
        self._host_id = host_id
        self._idle_seconds = idle_seconds
        self._mappings: dict[str, _Mapping] = {}
        self._closed = False

    def why_not(self) -> str:
        """Why this process can't offer it."""
        if not self._host_id:
            return "this system does not tell which host and PID namespace a process is in"
        return self._segment.why_not_shared

    async def start(self) -> None:
        """Nothing to do: the segment is there."""

    async def close(self) -> None:
        """Drops all mappings, those being read as soon as they aren't."""
        self._closed = True
        for nonce, mapping in list(self._mappings.items()):
            if mapping.idle is not None:
                mapping.idle.cancel()
            if not mapping.users:
                del self._mappings[nonce]

    def source_offer(self) -> Offer:
        """The host."""
        return Offer(self.name, {"host": self._host_id})

    def sink_offer(self) -> Offer:
        """The host."""
        return Offer(self.name, {"host": self._host_id})

    def ticket(self) -> Offer:
        """Where the segment is."""
        return Offer(
            self.name,
            {
                "host": self._host_id,
                "pid": str(os.getpid()),
                "fd": str(self._segment.fd),
                "nonce": self._segment.nonce.hex(),
            },
        )

    def obstacle(self, source: Offer, sink: Offer) -> str:
        """They must be on one host."""
        if source.attributes.get("host") == sink.attributes.get("host"):
            return ""
        return "source and sink are not on one host and in one PID namespace"

    async def connect(self, ticket: Offer, address: str, timeout: float) -> ShmReader:
        """Maps the source's segment, or finds it mapped. Raises TransportUnusableError."""
        nonce = ticket.attributes.get("nonce", "")
        mapping = self._mappings.get(nonce)
        if mapping is None:
            mapping = self._mappings[nonce] = _Mapping(mapped(ticket))
        mapping.users += 1
        if mapping.idle is not None:
            mapping.idle.cancel()
            mapping.idle = None
        return ShmReader(
            mapping.data, self._segment.data, self._offload, lambda: self._leave(nonce)
        )

    def _leave(self, nonce: str) -> None:
        mapping = self._mappings[nonce]
        mapping.users -= 1
        if not mapping.users and self._closed:
            del self._mappings[nonce]
        elif not mapping.users:
            loop = asyncio.get_running_loop()
            mapping.idle = loop.call_later(self._idle_seconds, self._drop, nonce)

    def _drop(self, nonce: str) -> None:
        self._mappings.pop(nonce, None)


class ShmReader:
    """Copies from one mapped segment into one's own."""

    def __init__(
        self,
        remote: NDArray[np.uint8],
        local: NDArray[np.uint8],
        offload: Offload,
        leave: Callable[[], None],
    ) -> None:
        self._remote = remote
        self._local = local
        self._offload = offload
        self._leave: Callable[[], None] | None = leave

    async def read(self, reads: Sequence[Read], timeout: float) -> None:
        """Copies once, straight into place. The source takes no part and can't delay it."""
        if self._leave is None:
            raise TransportError("the reader is closed")
        require_inside(reads, self._remote.nbytes, self._local.nbytes)
        size = sum(read.length for read in reads)
        copies = self._copies(reads, TURN_BYTES if size <= LOOP_BYTES else THREAD_BYTES)
        if size <= TURN_BYTES:
            _exhaust(copies, _go_on)
            return
        try:
            async with asyncio.timeout(timeout):
                if size > LOOP_BYTES:
                    await self._offload.run(partial(_exhaust, copies), size)
                    return
                for _ in copies:
                    await asyncio.sleep(0)
        except TimeoutError:
            raise TransportError(f"copying took longer than {timeout:g} s") from None

    async def close(self) -> None:
        """Lets the mapping go."""
        if self._leave is not None:
            self._leave()
            self._leave = None

    def _copies(self, reads: Sequence[Read], step: int) -> Iterator[None]:
        """Copies as it is iterated: `step` bytes and up to as many again each time."""
        local, remote, copied = self._local, self._remote, 0
        for read in reads:
            source, destination, left = read.remote, read.local, read.length
            while left:
                size = min(step, left)
                local[destination : destination + size] = remote[source : source + size]
                source, destination, left = source + size, destination + size, left - size
                copied += size
                if copied >= step:
                    copied = 0
                    yield


def _exhaust(steps: Iterator[None], stop: Callable[[], bool]) -> None:
    for _ in steps:
        if stop():
            return


def _go_on() -> bool:
    return False


def mapped(ticket: Offer) -> NDArray[np.uint8]:
    """The data of the segment that a ticket names, read-only. Raises TransportUnusableError."""
    try:
        pid, number = int(ticket.attributes["pid"]), int(ticket.attributes["fd"])
        nonce = bytes.fromhex(ticket.attributes["nonce"])
    except (KeyError, ValueError) as error:
        raise TransportUnusableError(f"the source's shm ticket makes no sense: {error}") from None
    try:
        fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        raise TransportUnusableError(
            f"memory of process {pid} can't be opened: {error.strerror}"
        ) from None
    try:
        return _map_fd(fd, nonce)
    except (OSError, ValueError) as error:
        raise TransportUnusableError(f"descriptor {number} of process {pid}: {error}") from None
    finally:
        os.close(fd)


def _map_fd(fd: int, nonce: bytes) -> NDArray[np.uint8]:
    header = read_header(os.pread(fd, HEADER_BYTES, 0))
    if header.nonce != nonce:
        raise ValueError("not the segment meant: that source is gone")
    # Unsealed memory could shrink under the mapping, and reading it would kill this process.
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise ValueError("the segment's size is not sealed")
    size = HEADER_BYTES + header.data_bytes
    if os.fstat(fd).st_size < size:
        raise ValueError("the segment is shorter than its header says")
    mapped = mmap.mmap(fd, size, prot=mmap.PROT_READ)
    return np.frombuffer(mapped, np.uint8, offset=HEADER_BYTES)
