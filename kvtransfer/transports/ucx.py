"""UCX's streams, over the fastest path that both sides have, from segment to segment.

The sink asks for ranges, the source sends them. A hello goes to the address of the source's
worker, which the ticket holds along with the nonce that authenticates it; nothing is encrypted. One
connection serves one fetch at a time, then waits for the next to the same source. It has a worker
of its own at the sink: two workers pair their endpoints by the order in which they are made.

Streams, and not UCX's tagged messages, which can be without a copy: of those, receives that are
under way can't be ended, and a sink whose source is killed under one is taken along (a segmentation
fault in UCX 1.21). One-sided reads without a copy are what NIXL is for.

Host memory only: GPU memory needs a CUDA context on the event loop's thread, and was not tried.

With a loopback `host` UCX opens no port on other networks. ucxx sets some UCX_* variables of the
process's environment when it is imported, for want of another way; what stood there stays.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtransfer.errors import TransportError, TransportUnusableError
from kvtransfer.memory import NONCE_BYTES, Segment
from kvtransfer.transports import ucx_protocol as protocol
from kvtransfer.transports.base import Offer, Read, require_inside
from kvtransfer.transports.batches import batches
from kvtransfer.transports.ucx_settings import loopback_only
from kvtransfer.transports.ucx_source import UcxSource
from kvtransfer.transports.ucx_worker import UcxRequest, UcxWorker, load

IDLE_SECONDS = 30.0
KEPT_PER_SOURCE = 16
CONNECT_SECONDS = 5.0
"""No source takes longer to be connected to; another transport may do better then."""
WINDOW = 2
"""Requests unanswered at a time."""


@dataclass(frozen=True, slots=True)
class _Place:
    """What a ticket says."""

    address: bytes
    nonce: bytes


@dataclass(frozen=True, slots=True, eq=False)
class _Connection:
    worker: UcxWorker
    endpoint: Any


@dataclass(slots=True, eq=False)
class _Asked:
    """One request: the receives of its answer in their order, and what sends it."""

    requests: list[UcxRequest] = field(default_factory=list)
    reply: NDArray[np.uint8] = field(
        default_factory=lambda: np.zeros(protocol.REPLY_BYTES, np.uint8)
    )


class UcxTransport:
    """Both ends; see the module's docstring and base.Transport.

    `ucx` are settings of UCX, without the prefix UCX_.
    """

    name = "ucx"

    def __init__(
        self,
        segment: Segment,
        host: str,
        *,
        ucx: Mapping[str, str] | None = None,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        self._segment = segment
        self._settings = {**loopback_only(host), **(ucx or {})}
        self._idle_seconds = idle_seconds
        self._kept: dict[_Place, list[tuple[_Connection, asyncio.TimerHandle]]] = {}
        self._context: Any = None
        self._worker: UcxWorker | None = None
        self._source: UcxSource | None = None
        self._address = b""
        self._closing: set[asyncio.Task[None]] = set()

    def why_not(self) -> str:
        """The package may be missing."""
        return load().why_not

    async def start(self) -> None:
        """Makes the source's worker. Raises TransportError."""
        ucx = load().ucx
        try:
            self._context = ucx.UCXContext(self._settings)
            self._worker = UcxWorker(self._context)
        except ucx.UCXError as error:
            raise TransportError(f"UCX can't be started: {error}") from None
        self._address = self._worker.address
        # Sinks close idle connections first; this is for those that are gone.
        self._source = UcxSource(self._segment, self._worker, 4 * self._idle_seconds)

    async def close(self) -> None:
        """Ends all connections, of both ends. Idempotent."""
        self._context = None
        for place in list(self._kept):
            for connection, timer in self._kept.pop(place):
                timer.cancel()
                self._drop(connection)
        await asyncio.gather(*self._closing)
        if self._source is not None:
            await self._source.close()
        if self._worker is not None:
            self._worker.close()

    def source_offer(self) -> Offer:
        """The version."""
        return Offer(self.name, {"version": load().version})

    def sink_offer(self) -> Offer:
        """The version."""
        return Offer(self.name, {"version": load().version})

    def ticket(self) -> Offer:
        """The worker's address, and the nonce."""
        address = base64.b64encode(self._address).decode()
        return Offer(self.name, {"address": address, "nonce": self._segment.nonce.hex()})

    def obstacle(self, source: Offer, sink: Offer) -> str:
        """None: whether a path is there shows when it is tried."""
        return ""

    async def connect(self, ticket: Offer, address: str, timeout: float) -> UcxReader:
        """A kept connection to the source, or a new one. Raises TransportUnusableError."""
        place = _place(ticket)
        kept = self._kept.get(place)
        if kept:
            connection, timer = kept.pop()
            if not kept:
                del self._kept[place]
            timer.cancel()
        else:
            connection = await self._greet(place, min(timeout, CONNECT_SECONDS))
        return UcxReader(self, place, connection, self._segment)

    def keep(self, place: _Place, connection: _Connection) -> None:
        """Takes back a connection on which nothing is under way."""
        if self._context is None or len(self._kept.get(place, ())) >= KEPT_PER_SOURCE:
            self._drop(connection)
            return
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._idle_seconds, self._forget, place, connection)
        self._kept.setdefault(place, []).append((connection, timer))

    def _forget(self, place: _Place, connection: _Connection) -> None:
        rest = [entry for entry in self._kept.get(place, ()) if entry[0] is not connection]
        if rest:
            self._kept[place] = rest
        else:
            self._kept.pop(place, None)
        self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        closing = connection.worker.close_after(connection.endpoint, [])
        task = asyncio.get_running_loop().create_task(closing)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _greet(self, place: _Place, timeout: float) -> _Connection:
        """A new connection, admitted by the source. Raises TransportUnusableError."""
        if self._context is None:
            raise TransportError("UCX is closed")
        worker = UcxWorker(self._context)
        endpoint: Any = None
        under_way: list[UcxRequest] = []
        try:
            endpoint = worker.endpoint(place.address)
            reply = np.zeros(protocol.REPLY_BYTES, np.uint8)
            under_way.append(worker.receive(endpoint, reply))
            hello = protocol.pack_hello(protocol.Hello(place.nonce, worker.address))
            under_way.append(worker.send_message(endpoint, _bytes(hello), protocol.HELLO_TAG))
            async with asyncio.timeout(timeout):
                await worker.finished(under_way, endpoint)
            for request in under_way:
                request.check()
            _check_reply(reply)
            return _Connection(worker, endpoint)
        except BaseException as error:
            if endpoint is None:
                worker.close()
            else:
                await worker.close_after(endpoint, under_way)
            if isinstance(error, TimeoutError):
                raise TransportUnusableError(
                    f"the source did not answer within {timeout:g} s"
                ) from None
            if isinstance(error, worker.error):
                raise TransportUnusableError(f"the source can't be reached: {error}") from None
            raise


class UcxReader:
    """One connection, for one fetch."""

    def __init__(
        self, transport: UcxTransport, place: _Place, connection: _Connection, segment: Segment
    ) -> None:
        self._transport = transport
        self._place = place
        self._connection: _Connection | None = connection
        self._data = segment.data

    async def read(self, reads: Sequence[Read], timeout: float) -> None:
        """Asks for WINDOW batches ahead. A failed connection is closed before this raises."""
        require_inside(reads, 2**63, self._data.nbytes)
        connection = self._connection
        if connection is None:
            raise TransportError("the connection is closed")
        under_way: list[_Asked] = []
        try:
            async with asyncio.timeout(timeout):
                await self._exchange(connection, reads, under_way)
        except BaseException as error:
            self._connection = None
            requests = [request for asked in under_way for request in asked.requests]
            await connection.worker.close_after(connection.endpoint, requests)
            if isinstance(error, TimeoutError):
                raise TransportError(f"the source sent too little within {timeout:g} s") from None
            if isinstance(error, connection.worker.error):
                raise TransportError(f"the connection broke: {error}") from None
            raise

    async def close(self) -> None:
        """Gives the connection back for the next fetch, if it is sound."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._transport.keep(self._place, connection)

    async def _exchange(
        self, connection: _Connection, reads: Sequence[Read], under_way: list[_Asked]
    ) -> None:
        """`under_way` has at any time what is."""
        for batch in batches(reads, protocol.MAX_RANGES, protocol.MAX_BYTES):
            if len(under_way) == WINDOW:
                await _arrived(connection, under_way)
            under_way.append(_Asked())
            self._ask(connection, batch, under_way[-1])
        while under_way:
            await _arrived(connection, under_way)

    def _ask(self, connection: _Connection, batch: Sequence[Read], asked: _Asked) -> None:
        """Begins to receive the answer, and to send the request."""
        worker, endpoint = connection.worker, connection.endpoint
        asked.requests.append(worker.receive(endpoint, asked.reply))
        for read in batch:
            into = self._data[read.local : read.local + read.length]
            asked.requests.append(worker.receive(endpoint, into))
        request = protocol.pack_request([(read.remote, read.length) for read in batch])
        asked.requests.append(worker.send(endpoint, _bytes(request)))


async def _arrived(connection: _Connection, under_way: list[_Asked]) -> None:
    """Waits for the answer to the first of what was asked."""
    asked = under_way[0]
    await connection.worker.finished(asked.requests[:1], connection.endpoint)
    asked.requests[0].check()
    _check_reply(asked.reply)
    await connection.worker.finished(asked.requests, connection.endpoint)
    for request in asked.requests:
        request.check()
    del under_way[0]


def _check_reply(reply: NDArray[np.uint8]) -> None:
    """Raises TransportError if there are words in it."""
    words = protocol.unpack_reply(reply.tobytes())
    if words:
        raise TransportError(f"the source refused: {words}")


def _bytes(raw: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(bytearray(raw), np.uint8)


def _place(ticket: Offer) -> _Place:
    """Raises TransportUnusableError."""
    try:
        nonce = bytes.fromhex(ticket.attributes["nonce"])
        address = base64.b64decode(ticket.attributes["address"], validate=True)
        if len(nonce) != NONCE_BYTES or not address:
            raise ValueError("values of a wrong length")
        return _Place(address, nonce)
    except (KeyError, ValueError, binascii.Error) as error:
        raise TransportUnusableError(f"the source's ucx ticket makes no sense: {error}") from None
