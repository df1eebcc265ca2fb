"""The contract of a transport: one-sided reads from a source's registered memory into the sink's.

Both ends have a segment (memory.Segment) that a transport is made for, so that one which must
register memory with a device does it once. The two sides meet like this; offers and tickets
travel in the KV plane's gRPC messages, never over the transport itself:

    sink                                     source
    sink_offer()  ── in the Fetch ────────▶  obstacle(source_offer(), sink's offer): "" if it fits
                  ◀─ in FetchOpened ───────  ticket()
    connect(ticket) -> Reader
    Reader.read([...]) ═════ bytes ════════  serves without its engine knowing
    Reader.close()

A read names offsets into both segments and nothing else: no pointers, no Python buffers. That is
a descriptor list as RDMA and NIXL take it, and the memory behind it need not be the host's.

What every transport guarantees (tests/contract/test_transports.py holds them to it):

1. When read() returns, every byte is in place. When it raises or is cancelled, any part may be.
   In all three cases nothing writes to the destination afterwards.
2. read() ends within its timeout whatever the peer does: dies, stops, answers slowly or nonsense.
3. It neither blocks the event loop for long nor polls in a busy loop.
4. Offsets are checked on the side whose memory they are in.
5. Only who has a ticket of this run of the source can read: a ticket names a nonce.
6. What is kept between reads (connections, mappings) is bounded, and given up when idle.

Content is not a transport's business: the sink verifies checksums itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvtransfer.errors import TransportError


@dataclass(frozen=True, slots=True)
class Offer:
    """A way to move bytes that one side has: the transport's name and what the other must know."""

    name: str
    attributes: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Read:
    """Copy `length` bytes at `remote` of the source's segment to `local` of one's own."""

    remote: int
    local: int
    length: int


class Reader(Protocol):
    """A sink's way to one source; used by one fetch at a time, one read() at a time."""

    async def read(self, reads: Sequence[Read], timeout: float) -> None:
        """See the module's docstring. `timeout` in seconds. Raises TransportError."""

    async def close(self) -> None:
        """Gives it back, at once: it does not wait for anything. Idempotent."""


class Transport(Protocol):
    """Both ends of one transport, for one segment."""

    name: str

    def why_not(self) -> str:
        """Why this process can't offer it; "" if it can."""

    async def start(self) -> None:
        """Begins to serve reads. Raises TransportError."""

    async def close(self) -> None:
        """Ends everything it started. Idempotent."""

    def source_offer(self) -> Offer:
        """What a sink needs to judge whether it fits. Not secret."""

    def sink_offer(self) -> Offer:
        """What a source needs to judge whether it fits."""

    def ticket(self) -> Offer:
        """What an admitted sink connects with: secret."""

    def obstacle(self, source: Offer, sink: Offer) -> str:
        """Why a source with this offer and a sink with that can't use it; "" if they can."""

    async def connect(self, ticket: Offer, address: str, timeout: float) -> Reader:
        """A reader of the ticket's source, whose gRPC server is at `address` (host:port).

        Raises TransportUnusableError if another transport may do better, else TransportError.
        """


def require_inside(reads: Sequence[Read], remote_bytes: int, local_bytes: int) -> None:
    """Raises TransportError if a read leaves one of the two segments."""
    for read in reads:
        remote, local, length = read.remote, read.local, read.length
        inside = remote + length <= remote_bytes and local + length <= local_bytes
        if not inside or remote < 0 or local < 0 or length < 0:
            raise TransportError(
                f"a read of {read.length} bytes from {read.remote} to {read.local} leaves memory "
                f"of {remote_bytes} or {local_bytes} bytes"
            )
