"""NIXL: one-sided reads by RDMA, NVLink, or what else its UCX backend finds between two hosts.

The sink reads; the source's Python has no part in it. A ticket is the metadata of the source's
agent (addresses and keys of its registered memory) and where a greeting lies that holds the nonce:
the sink reads that first, which makes the connection and proves that the source is the one meant.

Each process has two agents, both with the memory registered once, at the start. One serves: a
thread of NIXL sleeps until the network has something for it. One reads, when there is something to
read (nixl_reads.py), and can be thrown away when a read can't be ended otherwise.

What UCX does between two processes differs. With RDMA and NVLink the hardware reads, GPU memory
too; that has not been run, for want of such hardware. On one host it copies by process_vm_readv,
which needs the permission to trace. Across hosts with nothing but TCP it makes reads out of
messages, of which two things are to be known: nobody checks at the source that a read stays inside
registered memory, as RDMA hardware does, so whoever can reach UCX's port has the process's memory;
and a source that was frozen until its readers gave up is ended by UCX (as of 1.23) when it comes
back to answer them. With a loopback `host` UCX opens no port elsewhere.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import secrets
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtransfer.errors import TransportError, TransportUnusableError
from kvtransfer.memory import NONCE_BYTES, Memory, Region
from kvtransfer.transports.base import Offer, Read
from kvtransfer.transports.descriptors import Descriptors, Regions, described, packed, unpacked
from kvtransfer.transports.nixl_agent import NixlAgent, NixlError, load
from kvtransfer.transports.nixl_reads import NixlReads
from kvtransfer.transports.ucx_settings import loopback_only

IDLE_SECONDS = 30.0
GRACE_SECONDS = 1.0
CONNECT_SECONDS = 5.0
"""No source takes longer to be connected to; another transport may do better then."""
GREETINGS = 64
"""So many sources can be connected to at the same moment."""

_GREETING = struct.Struct(f"<8s{NONCE_BYTES}sQ")
_MAGIC = b"TNDMNIXL"
_ROOM = 64


@dataclass(frozen=True, slots=True)
class _Source:
    """What a ticket says."""

    metadata: bytes
    nonce: bytes
    greeting: int
    regions: Regions


@dataclass(slots=True)
class _Kept:
    users: int = 0
    idle: asyncio.TimerHandle | None = None


class NixlTransport:
    """Both ends; see the module's docstring and base.Transport.

    With a loopback `host` UCX keeps to the loopback device. `ucx` are further settings for it,
    without the prefix UCX_; what the environment says goes before both.
    """

    name = "nixl"

    def __init__(
        self,
        memory: Memory,
        host: str,
        *,
        ucx: Mapping[str, str] | None = None,
        idle_seconds: float = IDLE_SECONDS,
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        self._memory = memory
        self._regions = Regions(memory.regions)
        self._ucx = {**loopback_only(host), **(ucx or {})}
        self._idle_seconds = idle_seconds
        self._kept: dict[bytes, _Kept] = {}
        self._serving: NixlAgent | None = None
        self._metadata = b""
        self._greeting = np.zeros(_ROOM, np.uint8)
        self._greeted = np.zeros(GREETINGS * _ROOM, np.uint8)
        self._rooms = list(range(GREETINGS))
        self._reads = NixlReads(self._reading_agent, grace_seconds)

    def why_not(self) -> str:
        """The package may be missing."""
        return load()[2]

    async def start(self) -> None:
        """Makes both agents and registers the memory with them. Raises TransportError."""
        raw = _GREETING.pack(_MAGIC, self._memory.nonce, self._memory.data_bytes)
        self._greeting[: len(raw)] = np.frombuffer(raw, np.uint8)
        try:
            self._serving = await asyncio.to_thread(self._serving_agent)
            self._metadata = self._serving.metadata()
            await self._reads.start()
        except NixlError as error:
            raise TransportError(f"NIXL can't be started: {error}") from None

    async def close(self) -> None:
        """Ends both agents. Idempotent."""
        for kept in self._kept.values():
            if kept.idle is not None:
                kept.idle.cancel()
        self._kept.clear()
        await self._reads.close()
        serving, self._serving = self._serving, None
        if serving is not None:
            await asyncio.to_thread(serving.close)

    def source_offer(self) -> Offer:
        """The version."""
        return Offer(self.name, {"version": load()[1]})

    def sink_offer(self) -> Offer:
        """The version."""
        return Offer(self.name, {"version": load()[1]})

    def ticket(self) -> Offer:
        """The serving agent's metadata, where the greeting is, and what is registered."""
        return Offer(
            self.name,
            {
                "agent": base64.b64encode(self._metadata).decode(),
                "nonce": self._memory.nonce.hex(),
                "greeting": str(self._greeting.ctypes.data),
                "regions": packed(self._regions.regions),
            },
        )

    def obstacle(self, source: Offer, sink: Offer) -> str:
        """Agents of different versions do not promise to understand each other."""
        mine, theirs = (_minor(offer.attributes.get("version", "")) for offer in (source, sink))
        return "" if mine == theirs else f"NIXL {mine} at the source, {theirs} at the sink"

    async def connect(self, ticket: Offer, address: str, timeout: float) -> NixlReader:
        """Reads the source's greeting, unless it is connected. Raises TransportUnusableError."""
        source = _source(ticket)
        kept = self._kept.get(source.metadata)
        if kept is None:
            await self._greet(source, min(timeout, CONNECT_SECONDS))
            kept = self._kept.setdefault(source.metadata, _Kept())
        kept.users += 1
        if kept.idle is not None:
            kept.idle.cancel()
            kept.idle = None
        return NixlReader(self, source, kept)

    async def read(self, source: _Source, reads: Sequence[Read], timeout: float) -> None:
        """Raises TransportError; the source is then connected to anew the next time."""
        work = described(reads, source.regions, self._regions)
        if not work:
            return
        try:
            await self._reads.read(source.metadata, work, timeout)
        except NixlError as error:
            self._kept.pop(source.metadata, None)
            raise TransportError(f"NIXL, {error}") from None

    def leave(self, source: _Source, kept: _Kept) -> None:
        """A reader of this source is closed."""
        kept.users -= 1
        if kept.users:
            return
        current = self._kept.get(source.metadata)
        if current is kept:
            loop = asyncio.get_running_loop()
            kept.idle = loop.call_later(self._idle_seconds, self._drop, source.metadata)
        elif current is None:
            self._reads.forget(source.metadata)

    def _drop(self, metadata: bytes) -> None:
        self._kept.pop(metadata, None)
        self._reads.forget(metadata)

    async def _greet(self, source: _Source, timeout: float) -> None:
        if not self._rooms:
            raise TransportError(f"{GREETINGS} sources are being connected to already")
        room = self._rooms.pop()
        try:
            said = await self._greeting_of(source, room * _ROOM, timeout)
        except NixlError as error:
            self._reads.forget(source.metadata)
            raise TransportUnusableError(f"NIXL, {error}") from None
        finally:
            self._rooms.append(room)
        magic, nonce, nbytes = _GREETING.unpack(said)
        if magic != _MAGIC or not hmac.compare_digest(nonce, source.nonce):
            raise TransportUnusableError("not the source that the ticket is of")
        if nbytes != source.regions.nbytes:
            raise TransportUnusableError("the source's memory is not what its ticket says")

    async def _greeting_of(self, source: _Source, at: int, timeout: float) -> bytes:
        size = _GREETING.size
        remote = np.array([[source.greeting, size, 0]], np.uint64)
        local = np.array([[self._greeted.ctypes.data + at, size, 0]], np.uint64)
        self._greeted[at : at + size] = 0
        await self._reads.read(
            source.metadata, [Descriptors("DRAM", "DRAM", remote, local)], timeout
        )
        return self._greeted[at : at + size].tobytes()

    def _serving_agent(self) -> NixlAgent:
        return self._agent("source", self._greeting, serve=True)

    def _reading_agent(self) -> NixlAgent:
        return self._agent("sink", self._greeted, serve=False)

    def _agent(self, role: str, page: NDArray[np.uint8], *, serve: bool) -> NixlAgent:
        # Names must differ between all agents that ever meet, and do not tell the nonce.
        agent = NixlAgent(load()[0], f"{role}-{secrets.token_hex(8)}", serve=serve, ucx=self._ucx)
        agent.register([*self._regions.regions, Region(0, page.ctypes.data, page.nbytes)])
        return agent


class NixlReader:
    """A connected source, for one fetch."""

    def __init__(self, transport: NixlTransport, source: _Source, kept: _Kept) -> None:
        self._transport = transport
        self._source: _Source | None = source
        self._kept = kept

    async def read(self, reads: Sequence[Read], timeout: float) -> None:
        """Reads into place; see base.Reader."""
        if self._source is None:
            raise TransportError("the reader is closed")
        await self._transport.read(self._source, reads, timeout)

    async def close(self) -> None:
        """Lets the connection be given up when idle."""
        if self._source is not None:
            self._transport.leave(self._source, self._kept)
            self._source = None


def _source(ticket: Offer) -> _Source:
    """Raises TransportUnusableError."""
    attributes = ticket.attributes
    try:
        nonce = bytes.fromhex(attributes["nonce"])
        greeting = int(attributes["greeting"])
        metadata = base64.b64decode(attributes["agent"], validate=True)
        if len(nonce) != NONCE_BYTES or not metadata or not 0 < greeting < 2**63:
            raise ValueError("values out of range")
        return _Source(metadata, nonce, greeting, unpacked(attributes["regions"]))
    except (KeyError, ValueError, binascii.Error) as error:
        raise TransportUnusableError(f"the source's nixl ticket makes no sense: {error}") from None


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
