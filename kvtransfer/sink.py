"""The sink's end of the KV plane: one fetch, from the request to verified blocks in the store.

Announcements are received all the time, while pieces announced before are read and verified in
batches: what came together moves together, and what comes one by one moves at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc

from kvtransfer import wire
from kvtransfer.arrivals import Arrivals
from kvtransfer.errors import KvSourceLostError, TransportError, TransportUnusableError
from kvtransfer.offload import Offload
from kvtransfer.pieces import Piece
from kvtransfer.report import FetchReport, Progress
from kvtransfer.store import KvStore, checksum
from kvtransfer.transports.base import Offer, Read, Reader, Transport
from tandem.kvtransfer.v1 import kvtransfer_pb2 as pb
from tandem.kvtransfer.v1 import kvtransfer_pb2_grpc

BATCH_BYTES = 16 * 2**20

_Call = grpc.aio.UnaryStreamCall[pb.FetchRequest, pb.FetchResponse]


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be fetched from where into which blocks of the store."""

    fetch_id: str
    address: str
    lease_id: str
    keys: Sequence[bytes]
    blocks: Sequence[int]
    partial_last: bool
    on_progress: Progress | None = None


@dataclass(slots=True)
class _Inbox:
    """Announcements received and not moved yet."""

    pieces: deque[Piece] = field(default_factory=deque)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    ended: BaseException | None = None


class SinkFetch:
    """One fetch. `run` once."""

    def __init__(
        self, store: KvStore, offload: Offload, order: Order, clock: Callable[[], float]
    ) -> None:
        self.arrivals = Arrivals(store.layout, len(order.keys))
        self.transport = ""
        """Name of the transport, once the source has chosen it."""
        self.bytes = 0
        self.corrupt_reads = 0
        """Pieces that were wrong the first time."""
        self._store = store
        self._offload = offload
        self._order = order
        self._clock = clock
        self._checksums: dict[int, dict[int, int]] = {}
        self._first_bytes: float | None = None
        self._last_bytes: float | None = None

    async def run(
        self, channel: grpc.aio.Channel, transports: Sequence[Transport], deadline: float
    ) -> FetchReport:
        """Fetches until every block is complete or corrupt; `deadline` by the loop's clock.

        Raises KvErrors: KvSourceLostError, TransportUnusableError (another transport may do), or
        what the source refused it with. However it ends, nothing writes into the blocks later.
        """
        started = self._clock()
        loop = asyncio.get_running_loop()
        call = self._call(channel, transports, deadline - loop.time())
        try:
            opened = await self._opened(call)
            transport = next((t for t in transports if t.name == opened.ticket.name), None)
            if transport is None:
                raise KvSourceLostError("the source chose a transport that was not offered")
            self.transport = transport.name
            await self._move_all(call, transport, opened.ticket, deadline)
        except TransportError as error:
            if isinstance(error, TransportUnusableError):
                raise
            raise KvSourceLostError(
                f"source {self._order.address}: {error.message}", cause=error.reason
            ) from error
        finally:
            call.cancel()
        return FetchReport(
            transport=self.transport,
            why=opened.why,
            bytes=self.bytes,
            complete=self.arrivals.complete,
            corrupt_blocks=self.arrivals.corrupt,
            started=started,
            first_bytes=self._first_bytes,
            ended=self._last_bytes or self._clock(),
        )

    def _call(
        self, channel: grpc.aio.Channel, transports: Sequence[Transport], seconds: float
    ) -> _Call:
        order = self._order
        offers = [t.sink_offer() for t in transports]
        request = wire.wanted_to(
            order.fetch_id, order.lease_id, self._store.layout, order.keys, offers
        )
        stub = kvtransfer_pb2_grpc.KvTransferServiceStub(channel)
        return stub.Fetch(request, timeout=max(0.0, seconds))

    async def _opened(self, call: _Call) -> wire.Opened:
        message = await self._next(call)
        opened = None if message is None else wire.opened_from(message)
        if opened is None:
            raise KvSourceLostError("the source did not open the fetch as it must")
        return opened

    async def _next(self, call: _Call) -> pb.FetchResponse | None:
        """The next message, None at the end."""
        try:
            message = await call.read()
        except grpc.aio.AioRpcError as error:
            raise wire.error_from(error, self._order.address) from error
        return message if isinstance(message, pb.FetchResponse) else None

    async def _move_all(
        self, call: _Call, transport: Transport, ticket: Offer, deadline: float
    ) -> None:
        loop = asyncio.get_running_loop()
        inbox = _Inbox()
        receiving = loop.create_task(self._receive(call, inbox))
        reader: Reader | None = None
        try:
            reader = await transport.connect(ticket, self._order.address, deadline - loop.time())
            while not self.arrivals.done:
                batch = await self._batch(inbox)
                await self._move(reader, batch, deadline)
        finally:
            # The reader first: a second cancellation may come at the next await.
            if reader is not None:
                await reader.close()
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)

    async def _receive(self, call: _Call, inbox: _Inbox) -> None:
        try:
            while (message := await self._next(call)) is not None:
                inbox.pieces.extend(wire.ready_from(message))
                inbox.news.set()
            raise KvSourceLostError("the source ended the fetch before it had announced all")
        except asyncio.CancelledError:
            # Here by our own doing, or because the channel was closed under the call.
            inbox.ended = KvSourceLostError("the call was cancelled")
            raise
        except Exception as error:
            inbox.ended = error
        finally:
            inbox.news.set()

    async def _batch(self, inbox: _Inbox) -> list[Piece]:
        """The next pieces to move, BATCH_BYTES at most unless one is larger."""
        while not inbox.pieces:
            if inbox.ended is not None:
                raise inbox.ended
            inbox.news.clear()
            await inbox.news.wait()
        batch: list[Piece] = []
        size = 0
        while inbox.pieces and (not batch or size + inbox.pieces[0].length <= BATCH_BYTES):
            piece = inbox.pieces.popleft()
            if self.arrivals.claim(piece):
                size += piece.length
                batch.append(piece)
        return batch

    async def _move(self, reader: Reader, pieces: list[Piece], deadline: float) -> None:
        """Reads, verifies, reads what was wrong once more, and keeps the books."""
        wrong = await self._read(reader, pieces, deadline)
        self.corrupt_reads += len(wrong)
        if wrong:
            wrong = await self._read(reader, wrong, deadline)
        right = [p for p in pieces if p not in wrong] if wrong else pieces
        for piece in wrong:
            self.arrivals.failed(piece)
        if not right:
            return
        self._last_bytes = self._clock()
        if self._first_bytes is None:
            self._first_bytes = self._last_bytes
        for piece in right:
            self.bytes += piece.length
            self._remember(piece)
            if self.arrivals.verified(piece):
                self._complete(piece.key_index)

    async def _read(self, reader: Reader, pieces: list[Piece], deadline: float) -> list[Piece]:
        """Reads pieces into place; returns those whose bytes are not what was announced."""
        loop = asyncio.get_running_loop()
        await reader.read(
            merged([Read(p.offset, self._place(p), p.length) for p in pieces]),
            max(0.0, deadline - loop.time()),
        )
        data = self._store.segment.data

        def verify(stop: Callable[[], bool]) -> list[Piece]:
            wrong = []
            for piece in pieces:
                if stop():
                    break
                at = self._place(piece)
                if checksum(data[at : at + piece.length]) != piece.checksum:
                    wrong.append(piece)
            return wrong

        return await self._offload.run(verify, sum(p.length for p in pieces))

    def _place(self, piece: Piece) -> int:
        store, block = self._store, self._order.blocks[piece.key_index]
        return block * store.block_bytes + piece.first_layer * store.layer_bytes

    def _remember(self, piece: Piece) -> None:
        """A verified checksum need not be computed again if both sides cut blocks alike."""
        index, rest = divmod(piece.first_layer, self._store.grid.per_piece)
        if not rest and self._store.grid.span(index)[1] == piece.layers:
            self._checksums.setdefault(piece.key_index, {})[index] = piece.checksum

    def _complete(self, index: int) -> None:
        order, store = self._order, self._store
        checksums = self._checksums.pop(index, {})
        if not (order.partial_last and index == len(order.keys) - 1):
            block = order.blocks[index]
            store.begin(block, order.keys[index])
            if len(checksums) == store.grid.count:
                store.pieces_verified(block, checksums.keys(), checksums.values())
            else:
                store.piece_done(block, 0, store.layout.layers)
            store.commit(block)
        if order.on_progress is not None:
            order.on_progress(index)


def merged(reads: Sequence[Read]) -> list[Read]:
    """The same bytes in fewer reads: neighbours on both sides become one."""
    result: list[Read] = []
    for read in reads:
        last = result[-1] if result else None
        if (
            last is not None
            and last.remote + last.length == read.remote
            and last.local + last.length == read.local
        ):
            result[-1] = Read(last.remote, last.local, last.length + read.length)
        else:
            result.append(read)
    return result
