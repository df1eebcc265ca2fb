"""UCX: messages over the fastest path that both sides have, from segment to segment.

The sink asks for ranges and names a tag for each; the source sends each as a message of its own,
which UCX moves without a copy where hardware or kernel can. Requests go to the address of the
source's worker, which the ticket holds along with the nonce that authenticates them; nothing is
encrypted. One connection serves one fetch at a time, then waits for the next to the same source.

Host memory only: GPU memory needs a CUDA context on the event loop's thread, and was not tried.

With a loopback `host` UCX opens no port on other networks. ucxx sets some UCX_* variables of the
process's environment when it is imported, for want of another way; what stood there stays.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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
FAREWELL_SECONDS = 1.0
WINDOW = 2
"""Requests unanswered at a time."""


@dataclass(frozen=True, slots=True)
class _Place:
    """What a ticket says."""

    address: bytes
    nonce: bytes


@dataclass(frozen=True, slots=True, eq=False)
class _Connection:
    endpoint: Any
    id: int
    reply: UcxRequest
    """A refusal, should one come."""


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
        self._worker: UcxWorker | None = None
        self._source: UcxSource | None = None
        self._address = b""
        self._ending: set[asyncio.Task[None]] = set()

    def why_not(self) -> str:
        """The package may be missing."""
        return load().why_not

    async def start(self) -> None:
        """Makes the worker. Raises TransportError."""
        try:
            self._worker = UcxWorker(self._settings)
        except load().ucx.UCXError as error:
            raise TransportError(f"UCX can't be started: {error}") from None
        self._address = self._worker.address
        # Sinks close idle connections first; this is for those that are gone.
        self._source = UcxSource(self._segment, self._worker, 4 * self._idle_seconds)

    async def close(self) -> None:
        """Ends all connections, of both ends. Idempotent."""
        for place in list(self._kept):
            for connection, timer in self._kept.pop(place):
                timer.cancel()
                self._drop(connection)
        source, self._source = self._source, None
        if source is not None:
            await source.close()
        await asyncio.gather(*self._ending)
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
        return UcxReader(self, self._living(), place, connection, self._segment)

    def keep(self, place: _Place, connection: _Connection) -> None:
        """Takes back a connection on which nothing is under way."""
        if self._source is None or len(self._kept.get(place, ())) >= KEPT_PER_SOURCE:
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
        task = asyncio.get_running_loop().create_task(self._take_leave(connection))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _take_leave(self, connection: _Connection) -> None:
        worker, under_way = self._living(), [connection.reply]
        try:
            under_way.append(_request(worker, connection, protocol.Request(0, [])))
            async with asyncio.timeout(FAREWELL_SECONDS):
                await worker.finished(under_way[1:])
        except (TimeoutError, worker.error):
            pass  # It is gone, or finds out by itself.
        finally:
            await worker.end(connection.endpoint, under_way)

    def _living(self) -> UcxWorker:
        if self._worker is None or self._worker.closed:
            raise TransportError("UCX is closed")
        return self._worker

    async def _greet(self, place: _Place, timeout: float) -> _Connection:
        """A new connection, admitted by the source. Raises TransportUnusableError."""
        worker = self._living()
        try:
            endpoint = worker.endpoint(place.address)
        except worker.error as error:
            raise TransportUnusableError(f"the source can't be reached: {error}") from None
        id_ = secrets.randbits(64)
        under_way: list[UcxRequest] = []
        try:
            under_way.append(_receive_reply(worker, endpoint, id_))
            hello = protocol.pack_hello(protocol.Hello(place.nonce, id_, self._address))
            data = np.frombuffer(bytearray(hello), np.uint8)
            under_way.append(worker.send(endpoint, data, protocol.HELLO_TAG))
            async with asyncio.timeout(timeout):
                await worker.finished(under_way)
            for request in under_way:
                request.check()
            _check_reply(under_way[0])
            return _Connection(endpoint, id_, _receive_reply(worker, endpoint, id_))
        except BaseException as error:
            await worker.end(endpoint, under_way)
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
        self,
        transport: UcxTransport,
        worker: UcxWorker,
        place: _Place,
        connection: _Connection,
        segment: Segment,
    ) -> None:
        self._transport = transport
        self._worker = worker
        self._place = place
        self._connection: _Connection | None = connection
        self._data = segment.data

    async def read(self, reads: Sequence[Read], timeout: float) -> None:
        """Asks for WINDOW batches ahead. A failed connection is closed before this raises."""
        require_inside(reads, 2**63, self._data.nbytes)
        connection = self._connection
        if connection is None:
            raise TransportError("the connection is closed")
        under_way: dict[int, UcxRequest] = {}
        try:
            async with asyncio.timeout(timeout):
                await self._exchange(connection, reads, under_way)
        except BaseException as error:
            self._connection = None
            await self._worker.end(connection.endpoint, [connection.reply, *under_way.values()])
            if not self._worker.closed:
                self._worker.discard(list(under_way))
            if isinstance(error, TimeoutError):
                raise TransportError(f"the source sent too little within {timeout:g} s") from None
            if isinstance(error, self._worker.error):
                raise TransportError(f"the connection broke: {error}") from None
            raise

    async def close(self) -> None:
        """Gives the connection back for the next fetch, if it is sound."""
        connection, self._connection = self._connection, None
        if connection is not None and not self._worker.closed:
            self._transport.keep(self._place, connection)

    async def _exchange(
        self, connection: _Connection, reads: Sequence[Read], under_way: dict[int, UcxRequest]
    ) -> None:
        """`under_way` has at any time what is, by tag."""
        asked: list[list[int]] = []
        for batch in batches(reads, protocol.MAX_RANGES, protocol.MAX_BYTES):
            if len(asked) == WINDOW:
                await self._arrived(connection, asked.pop(0), under_way)
            asked.append(self._ask(connection, batch, under_way))
        while asked:
            await self._arrived(connection, asked.pop(0), under_way)

    def _ask(
        self, connection: _Connection, batch: Sequence[Read], under_way: dict[int, UcxRequest]
    ) -> list[int]:
        """Sends a request, with the receives for its answer begun; their tags."""
        first = secrets.randbits(63)
        tags = [first + at for at in range(len(batch) + 1)]
        for tag, read in zip(tags, batch, strict=False):
            into = self._data[read.local : read.local + read.length]
            under_way[tag] = self._worker.receive(connection.endpoint, into, tag)
        request = protocol.Request(first, [(read.remote, read.length) for read in batch])
        under_way[tags[-1]] = _request(self._worker, connection, request)
        return tags

    async def _arrived(
        self, connection: _Connection, tags: Sequence[int], under_way: dict[int, UcxRequest]
    ) -> None:
        requests = [under_way[tag] for tag in tags]
        await self._worker.finished(requests, unless=connection.reply)
        if connection.reply.over:
            connection.reply.check()
            _check_reply(connection.reply)
            raise TransportError("the source answered what was not asked")
        for request in requests:
            request.check()
        for tag in tags:
            del under_way[tag]


def _request(worker: UcxWorker, connection: _Connection, request: protocol.Request) -> UcxRequest:
    data = np.frombuffer(bytearray(protocol.pack_request(request)), np.uint8)
    return worker.send(connection.endpoint, data, connection.id)


def _receive_reply(worker: UcxWorker, endpoint: Any, connection: int) -> UcxRequest:
    return worker.receive(endpoint, np.zeros(protocol.REPLY_BYTES, np.uint8), connection)


def _check_reply(reply: UcxRequest) -> None:
    """Raises TransportError if there are words in it."""
    words = protocol.unpack_reply(reply.data.tobytes())
    if words:
        raise TransportError(f"the source refused: {words}")


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
