"""DecodeService over an engine: one stream a frontend, one frame an engine step."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace

import grpc

from services.decode.wire import error_output, moving_output, output_to
from services.engine.api import Engine, EngineFault, FirstTokens, KvSource, TokenOutput
from services.engine.wire import prefix_from, request_from
from services.runtime.errors import (
    DuplicateRequestError,
    InvalidRequestError,
    TandemError,
    by_reason,
)
from tandem.decode.v1 import decode_pb2, decode_pb2_grpc

_Context = grpc.aio.ServicerContext[
    AsyncIterator[decode_pb2.DecodeRequest], AsyncIterator[decode_pb2.DecodeResponse]
]


class _Stream:
    """A frontend's stream: outputs that wait to be written, and the requests it owns.

    What gathers while a frame is being written goes out as the next frame, so a slow frontend
    gets fewer, larger frames and never holds up the engine. What can gather is bounded by the
    tokens its requests may still generate.
    """

    def __init__(self) -> None:
        self.requests: set[str] = set()
        self._pending: deque[decode_pb2.RequestOutput] = deque()
        self._wake = asyncio.Event()
        self._ended = False

    def put(self, output: decode_pb2.RequestOutput) -> None:
        self._pending.append(output)
        self._wake.set()

    def end(self) -> None:
        self._ended = True
        self._wake.set()

    async def frames(self) -> AsyncIterator[decode_pb2.DecodeResponse]:
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._pending:
                frame = decode_pb2.DecodeResponse(outputs=self._pending)
                self._pending.clear()
                yield frame
            if self._ended and not self._pending:
                return


class DecodeServicer(decode_pb2_grpc.DecodeServiceServicer):
    """Owns which stream a request belongs to; the engine owns everything else.

    It takes requests unless it drains, for whatever reason. Then each request that runs is told to
    move, once, and goes on meanwhile: its frontend cancels it when another worker has caught up.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._owner: dict[str, _Stream] = {}
        self._deadlines: dict[str, asyncio.TimerHandle] = {}
        self._drains: EngineFault | None = None
        self._moving: set[str] = set()

    async def Decode(  # noqa: N802
        self,
        request_iterator: AsyncIterator[decode_pb2.DecodeRequest],
        context: _Context,
    ) -> AsyncIterator[decode_pb2.DecodeResponse]:
        """Serves one frontend; see decode.proto."""
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("message") != "open":
            kind = "nothing" if first is None else first.WhichOneof("message")
            raise InvalidRequestError("message", kind, "the first message must be open")
        stream = _Stream()
        reader = asyncio.create_task(self._read(request_iterator, stream))
        try:
            async for frame in stream.frames():
                yield frame
            await reader
        finally:
            # The frontend is gone or wants no more: nobody would read these tokens.
            reader.cancel()
            for request_id in list(stream.requests):
                self._cancel(request_id, stream)

    async def _read(
        self, messages: AsyncIterator[decode_pb2.DecodeRequest], stream: _Stream
    ) -> None:
        try:
            async for message in messages:
                kind = message.WhichOneof("message")
                if kind == "start":
                    self._start(message.start, stream)
                elif kind == "proceed":
                    first = FirstTokens(tuple(message.proceed.token_ids), message.proceed.handle)
                    if message.proceed.request_id in stream.requests:
                        self._engine.proceed(message.proceed.request_id, first)
                elif kind == "cancel":
                    self._cancel(message.cancel.request_id, stream)
                else:
                    raise InvalidRequestError("message", kind, "start, proceed or cancel")
        finally:
            stream.end()

    def _start(self, start: decode_pb2.Start, stream: _Stream) -> None:
        """Takes a request on. A refusal is this request's output; the stream goes on."""
        request_id = start.request.request_id
        source = None
        if start.HasField("source"):
            s = start.source
            source = KvSource(s.worker_id, s.address, s.lease_id)
        try:
            if self._drains is not None:
                raise by_reason(self._drains.reason, self._drains.message, self._drains.metadata)
            if request_id in self._owner:
                raise DuplicateRequestError(
                    f"request {request_id} is already here", request_id=request_id
                )
            if start.dp_rank >= self._engine.info.dp_ranks:
                allowed = f"this worker has {self._engine.info.dp_ranks}"
                raise InvalidRequestError("dp_rank", start.dp_rank, allowed)
            request = request_from(start.request, self._engine.info.vocabulary)
            request = replace(
                request,
                dp_rank=start.dp_rank,
                deadline_seconds=start.deadline_ms / 1000 if start.deadline_ms else None,
            )
            self._engine.decode(request, source, prefix_from(start.prefix))
        except TandemError as error:
            fault = EngineFault(error.reason, error.message, error.metadata)
            stream.put(error_output(request_id, fault))
            return
        self._owner[request_id] = stream
        stream.requests.add(request_id)
        if start.deadline_ms:
            # The frontend cancels at the deadline; this holds even if it does not.
            self._deadlines[request_id] = asyncio.get_running_loop().call_later(
                start.deadline_ms / 1000, self._expire, request_id
            )

    def _expire(self, request_id: str) -> None:
        self._give_up(request_id, EngineFault("DEADLINE", "the request's deadline has passed"))

    def _give_up(self, request_id: str, fault: EngineFault) -> None:
        stream = self._owner[request_id]
        self._cancel(request_id, stream)
        stream.put(error_output(request_id, fault))

    def _cancel(self, request_id: str, stream: _Stream) -> None:
        if request_id in stream.requests:
            self._forget(request_id)
            self._engine.cancel(request_id)

    def _forget(self, request_id: str) -> None:
        self._owner.pop(request_id).requests.discard(request_id)
        self._moving.discard(request_id)
        timer = self._deadlines.pop(request_id, None)
        if timer is not None:
            timer.cancel()

    def deliver(self, outputs: Iterable[TokenOutput]) -> None:
        """Puts an engine step's outputs on the streams of their frontends."""
        for output in outputs:
            stream = self._owner.get(output.request_id)
            if stream is None:
                continue
            stream.put(output_to(output))
            if output.finish_reason is not None:
                self._forget(output.request_id)

    @property
    def live(self) -> int:
        """Requests taken on and not finished."""
        return len(self._owner)

    def open(self) -> None:
        """Takes new requests again."""
        self._drains = None
        self._moving.clear()

    def drain(self, why: EngineFault) -> None:
        """Refuses new requests with `why`, and asks frontends to move those that run."""
        self._drains = why
        for request_id, stream in self._owner.items():
            if request_id not in self._moving:
                self._moving.add(request_id)
                stream.put(moving_output(request_id))

    def hand_back(self, why: EngineFault) -> None:
        """Gives what still runs back to the frontends, which place it elsewhere."""
        for request_id in list(self._owner):
            self._give_up(request_id, why)
