"""The sink's end of one fetch: carries out what the core (fetching.py) decides.

It makes the call, receives what the source announces, has pieces read and checked (reading.py),
renews the lease, and tells the core of each.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from kvtransfer import wire
from kvtransfer.errors import KvError, KvSourceLostError, TransportError, TransportUnusableError
from kvtransfer.fetching import (
    Announced,
    Command,
    Complete,
    Ended,
    Event,
    FetchCore,
    Limits,
    Opened,
    ReadDone,
    ReadFailed,
    Renew,
    Renewed,
    Tick,
)
from kvtransfer.fetching import Read as ReadCommand
from kvtransfer.landing import Landing
from kvtransfer.offload import Offload
from kvtransfer.pieces import Piece
from kvtransfer.reading import PieceReads
from kvtransfer.report import FetchReport
from kvtransfer.store import KvStore
from kvtransfer.transports.base import Reader, Transport
from tandem.kvtransfer.v1 import kvtransfer_pb2 as pb
from tandem.kvtransfer.v1 import kvtransfer_pb2_grpc

if TYPE_CHECKING:
    # Only the type checker knows the asynchronous kind of stub.
    _Stub = kvtransfer_pb2_grpc.KvTransferServiceStub

GENERATION_BYTES = 8
RENEW_TIMEOUT_SECONDS = 5.0

_Call = grpc.aio.UnaryStreamCall[pb.FetchRequest, pb.FetchResponse]


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be fetched from where, and in whose name."""

    fetch_id: str
    address: str
    lease_id: str
    keys: Sequence[bytes]
    held_only: bool = False
    tenant: str = ""
    region: str = ""


class SinkFetch:
    """One fetch. `run` once."""

    def __init__(
        self,
        store: KvStore,
        offload: Offload,
        order: Order,
        landing: Landing,
        limits: Limits,
        clock: Callable[[], float],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.core = FetchCore(
            landing.layout, len(order.keys), order.address, limits, self._loop.time()
        )
        self.transport = ""
        """Name of the transport, once the source has chosen it."""
        self.why = ""
        """Why this one, in the source's words."""
        self._order = order
        self._landing = landing
        self._pieces = PieceReads(store, offload, landing)
        self._limits = limits
        self._clock = clock
        self._events: deque[Event] = deque()
        self._news = asyncio.Event()
        self._fault: BaseException | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._reader: Reader | None = None
        self._generations_offset = 0
        self._first_bytes: float | None = None
        self._last_bytes: float | None = None

    async def run(self, channel: grpc.aio.Channel, transports: Sequence[Transport]) -> FetchReport:
        """Fetches until every block is complete or corrupt.

        Raises KvErrors: KvSourceLostError, TransportUnusableError (another transport may do), or
        what the source refused it with. However it ends, nothing writes into the blocks later.
        """
        started = self._clock()
        stub = kvtransfer_pb2_grpc.KvTransferServiceStub(channel)
        call = self._call(stub, transports)
        try:
            self._spawn(self._receive(call, transports))
            await self._drive(stub)
        finally:
            # Reads first: nothing may write to the blocks once this returns or raises, whatever
            # else is cancelled meanwhile.
            try:
                await self._stop()
            finally:
                call.cancel()
        if self.core.error is not None:
            raise self.core.error
        return FetchReport(
            transport=self.transport,
            why=self.why,
            bytes=self.core.bytes,
            complete=self.core.arrivals.complete,
            corrupt_blocks=self.core.arrivals.corrupt,
            started=started,
            first_bytes=self._first_bytes,
            ended=self._last_bytes or self._clock(),
        )

    def _call(self, stub: _Stub, transports: Sequence[Transport]) -> _Call:
        order = self._order
        request = wire.wanted_to(
            order.fetch_id,
            order.lease_id,
            self._landing.layout,
            order.keys,
            [t.sink_offer() for t in transports],
            held_only=order.held_only,
            tenant=order.tenant,
            region=order.region,
        )
        return stub.Fetch(request, timeout=max(0.0, self._limits.deadline - self._loop.time()))

    # Events in, commands out

    async def _drive(self, stub: _Stub) -> None:
        core = self.core
        while not core.over:
            event = await self._next_event()
            for command in core.handle(event, self._loop.time()):
                self._carry_out(command, stub)

    async def _next_event(self) -> Event:
        while not self._events:
            if self._fault is not None:
                raise self._fault
            self._news.clear()
            timer = self._loop.call_at(self.core.timer, self._tell, Tick())
            try:
                await self._news.wait()
            finally:
                timer.cancel()
        return self._events.popleft()

    def _tell(self, event: Event) -> None:
        self._events.append(event)
        self._news.set()

    def _carry_out(self, command: Command, stub: _Stub) -> None:
        match command:
            case ReadCommand(pieces, timeout):
                self._spawn(self._read(pieces, timeout))
            case Renew():
                self._spawn(self._renew(stub))
            case Complete(index, checksums):
                self._landing.complete(index, checksums)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fault = error
            self._news.set()

    async def _stop(self) -> None:
        """Ends every task of this fetch, whatever cancellations come in meanwhile."""
        cancelled = False
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        while tasks:
            try:
                _, tasks = await asyncio.wait(tasks)
            except asyncio.CancelledError:
                cancelled = True
        if self._reader is not None:
            await self._reader.close()
        if cancelled:
            raise asyncio.CancelledError

    # The call

    async def _receive(self, call: _Call, transports: Sequence[Transport]) -> None:
        try:
            await self._open(await self._next(call), transports)
            while (message := await self._next(call)) is not None:
                self._tell(Announced(tuple(wire.ready_from(message))))
            self._tell(Ended())
        except asyncio.CancelledError:
            # By our own doing, or because the channel was closed under the call.
            self._tell(Ended(KvSourceLostError("the call was cancelled")))
            raise
        except TransportUnusableError as error:
            self._tell(Ended(error))
        except TransportError as error:
            words = f"source {self._order.address}: {error.message}"
            self._tell(Ended(KvSourceLostError(words, cause=error.reason)))
        except KvError as error:
            self._tell(Ended(error))

    async def _next(self, call: _Call) -> pb.FetchResponse | None:
        """The next message, None at the end."""
        try:
            message = await call.read()
        except grpc.aio.AioRpcError as error:
            raise wire.error_from(error, self._order.address) from error
        return message if isinstance(message, pb.FetchResponse) else None

    async def _open(
        self, message: pb.FetchResponse | None, transports: Sequence[Transport]
    ) -> None:
        agreed = None if message is None else wire.opened_from(message)
        if agreed is None:
            raise KvSourceLostError("the source did not open the fetch as it must")
        transport = next((t for t in transports if t.name == agreed.ticket.name), None)
        if transport is None:
            raise KvSourceLostError("the source chose a transport that was not offered")
        self.transport, self.why = transport.name, agreed.why
        self._generations_offset = agreed.generations_offset
        left = self._limits.deadline - self._loop.time()
        timeout = max(0.0, min(left, self._limits.stall_seconds))
        self._reader = await transport.connect(agreed.ticket, self._order.address, timeout)
        self._tell(Opened(agreed.lease_seconds))

    async def _renew(self, stub: _Stub) -> None:
        request = pb.RenewRequest(lease_id=self._order.lease_id)
        timeout = min(RENEW_TIMEOUT_SECONDS, self._limits.stall_seconds)
        try:
            answer = await stub.Renew(request, timeout=timeout)
            self._tell(Renewed(answer.live))
        except grpc.aio.AioRpcError:
            self._tell(Renewed(None))

    # Bytes

    async def _read(self, pieces: Sequence[Piece], timeout: float) -> None:
        assert self._reader is not None
        try:
            wrong, stale = await self._pieces.read(
                self._reader, pieces, self._generations_offset, timeout
            )
        except TransportError as error:
            self._tell(ReadFailed(error))
            return
        self._last_bytes = self._clock()
        if self._first_bytes is None and len(wrong) < len(pieces):
            self._first_bytes = self._last_bytes
        self._tell(ReadDone(wrong, stale))
