"""The sink's call to one peer: asks for pieces, reads them, has them verified and kept."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import grpc

from kvtransfer.errors import TransportError, TransportUnusableError
from kvtransfer.memory import Segment
from kvtransfer.offload import Offload, outlast
from kvtransfer.transports.base import Read, Reader, Transport
from kvtransfer.weights import wire
from kvtransfer.weights.giving import WINDOW
from kvtransfer.weights.landing import FolderLanding
from kvtransfer.weights.plan import Arrived, Event, Lost, Opened
from tandem.weights.v1 import weights_pb2 as pb
from tandem.weights.v1 import weights_pb2_grpc

_Call = grpc.aio.StreamStreamCall[pb.GiveRequest, pb.GiveResponse]


class Memory:
    """Slots of the sink's segment, of one piece each, that sessions read into."""

    def __init__(self, segment: Segment, piece_bytes: int) -> None:
        self.segment = segment
        self._view = memoryview(segment.data.data)
        self._piece_bytes = piece_bytes
        self._free = deque(range(segment.data_bytes // piece_bytes))
        self._news = asyncio.Event()

    async def take(self) -> int:
        """Offset of a free slot."""
        while not self._free:
            self._news.clear()
            await self._news.wait()
        return self._free.popleft() * self._piece_bytes

    def give_back(self, offset: int) -> None:
        """The opposite of take()."""
        self._free.append(offset // self._piece_bytes)
        self._news.set()

    def view(self, offset: int, length: int) -> memoryview:
        """Bytes of it."""
        return self._view[offset : offset + length]


class Session:
    """One peer's. `run` once; `ask` once it has told Opened.

    Events are told through `tell`; `fail` is told why a piece could not be kept (OSError).
    """

    def __init__(
        self,
        peer: int,
        address: str,
        opening: Callable[[Sequence[Transport]], wire.Opening],
        landing: FolderLanding,
        memory: Memory,
        offload: Offload,
        stall_seconds: float,
        tell: Callable[[Event], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        self.transport = ""
        """Name of the one chosen."""
        self.why = ""
        """Why this one, in the source's words."""
        self.bytes = 0
        """Of pieces that were right."""
        self._peer = peer
        self._address = address
        self._opening = opening
        self._landing = landing
        self._memory = memory
        self._offload = offload
        self._stall_seconds = stall_seconds
        self._tell = tell
        self._fail = fail
        self._asking: asyncio.Queue[pb.GiveRequest] = asyncio.Queue()
        self._asked: set[int] = set()
        self._ready: deque[tuple[int, int]] = deque()
        self._news = asyncio.Event()
        self._keeping: set[asyncio.Task[None]] = set()

    def ask(self, pieces: Sequence[int]) -> None:
        """Asks for pieces."""
        self._asked.update(pieces)
        self._asking.put_nowait(wire.want_to(pieces))

    async def run(self, channel: grpc.aio.Channel, transports: Sequence[Transport]) -> None:
        """Until the peer is lost, which it tells, or this is cancelled.

        When it has ended nothing is written any more.
        """
        unusable: dict[str, str] = {}
        try:
            while usable := [t for t in transports if t.name not in unusable]:
                try:
                    await self._once(channel, usable)
                except TransportUnusableError as error:
                    unusable[self.transport] = error.message
            said = "; ".join(f"{name}: {why}" for name, why in unusable.items())
            raise wire.PeerError(f"no transport to it works: {said}", refused=True)
        except wire.PeerError as error:
            self._tell(Lost(self._peer, error.why, error.refused))
        except TransportError as error:
            self._tell(Lost(self._peer, error.message))
        finally:
            await self._settle()

    async def _once(self, channel: grpc.aio.Channel, transports: Sequence[Transport]) -> None:
        stub = weights_pb2_grpc.WeightsServiceStub(channel)
        call: _Call = stub.Give()
        reader: Reader | None = None
        try:
            async with asyncio.timeout(self._stall_seconds):
                await self._write(call, wire.opening_to(self._opening(transports)))
                agreed = wire.agreed_from(await self._next(call))
                transport = next((t for t in transports if t.name == agreed.ticket.name), None)
                if transport is None:
                    why = "it chose a transport that was not offered"
                    raise wire.PeerError(why, refused=True)
                self.transport, self.why = transport.name, agreed.why
                reader = await transport.connect(agreed.ticket, self._address, self._stall_seconds)
            self._tell(Opened(self._peer, min(agreed.window, WINDOW)))
            await _all(self._receive(call), self._send(call), self._read(reader))
        except TimeoutError:
            raise wire.PeerError(f"it did not answer in {self._stall_seconds:g} s") from None
        finally:
            if reader is not None:
                await reader.close()
            call.cancel()

    async def _receive(self, call: _Call) -> None:
        while (message := await self._next(call)) is not None:
            number = message.laid_out.number
            if message.WhichOneof("message") != "laid_out" or number not in self._asked:
                raise wire.PeerError("it offers what was not asked for", refused=True)
            self._asked.remove(number)
            self._ready.append((number, message.laid_out.offset))
            self._news.set()
        raise wire.PeerError("it ended the call")

    async def _send(self, call: _Call) -> None:
        while True:
            await self._write(call, await self._asking.get())

    async def _read(self, reader: Reader) -> None:
        """Reads what is laid out, all that is there by then in one go."""
        while True:
            while not self._ready:
                self._news.clear()
                await self._news.wait()
            taken: list[tuple[int, int]] = []
            reads: list[Read] = []
            try:
                while self._ready:
                    local = await self._memory.take()
                    number, remote = self._ready.popleft()
                    taken.append((number, local))
                    length = self._landing.manifest.piece(number).length
                    reads.append(Read(remote, local, length))
                await reader.read(reads, self._stall_seconds)
            except BaseException:
                for _, local in taken:
                    self._memory.give_back(local)
                raise
            self._asking.put_nowait(wire.read_to([number for number, _ in taken]))
            for number, local in taken:
                keeping = asyncio.create_task(self._keep(number, local))
                self._keeping.add(keeping)
                keeping.add_done_callback(self._kept)

    async def _keep(self, number: int, local: int) -> None:
        length = self._landing.manifest.piece(number).length

        def put(stop: Callable[[], bool]) -> bool:
            return self._landing.put(number, self._memory.view(local, length))

        try:
            right = await self._offload.run(put, length)
        finally:
            self._memory.give_back(local)
        self.bytes += length if right else 0
        self._tell(Arrived(self._peer, number, right))

    def _kept(self, task: asyncio.Task[None]) -> None:
        self._keeping.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    async def _settle(self) -> None:
        """Waits until nothing is written any more, through any cancellation."""
        for task in tuple(self._keeping):
            await outlast(task)

    async def _write(self, call: _Call, message: pb.GiveRequest) -> None:
        try:
            await call.write(message)
        except grpc.aio.AioRpcError as error:
            raise wire.failure(error) from error
        except asyncio.InvalidStateError:
            # The call is over; reading from it says why.
            await self._next(call)
            raise wire.PeerError("it ended the call") from None

    async def _next(self, call: _Call) -> pb.GiveResponse | None:
        """The next message, None at the end."""
        try:
            message = await call.read()
        except grpc.aio.AioRpcError as error:
            raise wire.failure(error) from error
        return message if isinstance(message, pb.GiveResponse) else None


async def _all(*parts: Coroutine[Any, Any, None]) -> None:
    """Runs all until the first fails, with whose error it ends."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
