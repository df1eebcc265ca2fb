"""Calls to workers: one Decode stream for each decode worker, one Prefill call for each prompt."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Protocol

import grpc

from services.frontend.pulse import Pulse
from services.frontend.wire import failure_of
from services.runtime.channels import Channels
from services.runtime.errors import EngineFailedError, TandemError, WorkerLostError
from tandem.decode.v1 import decode_pb2, decode_pb2_grpc
from tandem.kvtransfer.v1 import kvtransfer_pb2, kvtransfer_pb2_grpc
from tandem.prefill.v1 import prefill_pb2, prefill_pb2_grpc

log = logging.getLogger(__name__)

IDLE_SECONDS = 60.0
"""Streams and channels that no request has used for this long are closed."""

FAREWELL_SECONDS = 2.0
"""For what is sent without waiting: releases, and the last cancels of a closing stream."""

_Outbox = asyncio.Queue[decode_pb2.DecodeRequest | None]


class DecodeSink(Protocol):
    """Gets what a Decode stream brings for one attempt. Its calls don't raise."""

    def output(self, message: decode_pb2.RequestOutput) -> None:
        """New tokens."""

    def decode_lost(self, error: TandemError, unreachable: bool) -> None:
        """The stream broke: nothing more comes, and the worker drops the attempt."""


class PrefillSink(Protocol):
    """Gets what a Prefill call brings. Its calls don't raise."""

    def accepted(self) -> None:
        """The prompt is in the worker's queue."""

    def prefilled(self, message: prefill_pb2.PrefillDone) -> None:
        """The prompt is done. The call goes on to its end: cut short, its lease would go too."""

    def prefill_failed(self, error: TandemError, unreachable: bool) -> None:
        """The call failed, perhaps after its answer."""


class DecodeLink:
    """The stream to one decode worker: opened by the first request, re-opened after a failure."""

    def __init__(
        self, address: str, channel: grpc.aio.Channel, frontend_id: str, clock: Callable[[], float]
    ) -> None:
        self.pulse = Pulse(channel, clock)
        self._address = address
        self._clock = clock
        self._stub = decode_pb2_grpc.DecodeServiceStub(channel)
        self._open = decode_pb2.DecodeRequest(open=decode_pb2.Open(frontend_id=frontend_id))
        self._sinks: dict[str, DecodeSink] = {}
        self._spoke: frozenset[str] = frozenset()
        self._spoke_at = 0.0
        self._outbox: _Outbox | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        """Some request is on it."""
        return bool(self._sinks)

    def start(self, attempt_id: str, message: decode_pb2.DecodeRequest, sink: DecodeSink) -> None:
        """Sends a Start; what comes of it goes to the sink until forget()."""
        self._sinks[attempt_id] = sink
        if self._outbox is None:
            self._outbox = _Outbox()
            self._outbox.put_nowait(self._open)
            self._task = asyncio.create_task(self._run(self._outbox))
        self._outbox.put_nowait(message)

    def send(self, message: decode_pb2.DecodeRequest) -> None:
        """Sends, if the stream is up: a broken one has told the worker all there is to tell."""
        if self._outbox is not None:
            self._outbox.put_nowait(message)

    def forget(self, attempt_id: str) -> None:
        """Nothing more is wanted of that attempt."""
        self._sinks.pop(attempt_id, None)

    async def close(self) -> None:
        """Half-closes, so that what was sent before still arrives; then ends it."""
        await self.pulse.close()
        task = self._task
        if self._outbox is None or task is None:
            return
        self._outbox.put_nowait(None)
        await asyncio.wait([task], timeout=FAREWELL_SECONDS)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def _run(self, outbox: _Outbox) -> None:
        error: TandemError = WorkerLostError(f"{self._address} ended its stream")
        unreachable = True
        call = self._stub.Decode(_messages(outbox))
        try:
            async for frame in call:
                self._note(frame)
                for output in frame.outputs:
                    sink = self._sinks.get(output.request_id)
                    if sink is not None:
                        sink.output(output)
        except grpc.aio.AioRpcError as failed:
            error, unreachable = failure_of(failed, self._address)
        finally:
            call.cancel()
            outbox.put_nowait(None)
            self._outbox, self._spoke = None, frozenset()
            sinks, self._sinks = self._sinks, {}
            if sinks:
                log.info("lost the stream to %s with %d requests", self._address, len(sinks))
            for sink in sinks.values():
                sink.decode_lost(error, unreachable)

    def _note(self, frame: decode_pb2.DecodeResponse) -> None:
        """How long a step took: the time since the last one, if some request was in both."""
        spoke = frozenset(o.request_id for o in frame.outputs if o.token_ids)
        self.pulse.came(moved=bool(spoke) or any(o.HasField("kv") for o in frame.outputs))
        if not spoke:
            return
        now = self._clock()
        if not spoke.isdisjoint(self._spoke):
            self.pulse.heard.rhythm.note(now - self._spoke_at, now)
        self._spoke, self._spoke_at = spoke, now


async def _messages(outbox: _Outbox) -> AsyncIterator[decode_pb2.DecodeRequest]:
    while (message := await outbox.get()) is not None:
        yield message


class PrefillLink:
    """Calls to one prefill worker."""

    def __init__(self, address: str, channel: grpc.aio.Channel, clock: Callable[[], float]) -> None:
        self.pulse = Pulse(channel, clock)
        self._address = address
        self._clock = clock
        self._prefill = prefill_pb2_grpc.PrefillServiceStub(channel)
        self._kv = kvtransfer_pb2_grpc.KvTransferServiceStub(channel)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def busy(self) -> bool:
        """Some call is on its way."""
        return bool(self._tasks)

    def start(
        self, request: prefill_pb2.PrefillRequest, timeout: float, sink: PrefillSink
    ) -> asyncio.Task[None]:
        """Starts a Prefill call of at most `timeout` seconds; cancelling the task cancels it."""
        return self._spawn(self._call(request, timeout, sink))

    def release(self, lease_id: str) -> None:
        """Releases a lease, without waiting for it."""
        self._spawn(self._release(lease_id))

    async def close(self) -> None:
        """Lets releases through, cancels the rest."""
        await self.pulse.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=FAREWELL_SECONDS)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _call(
        self, request: prefill_pb2.PrefillRequest, timeout: float, sink: PrefillSink
    ) -> None:
        call = self._prefill.Prefill(request, timeout=timeout)
        answered, began = False, self._clock()
        try:
            async for message in call:
                done = message.HasField("done")
                self.pulse.came(moved=done)
                if done:
                    answered = True
                    took = self._clock() - began
                    self.pulse.heard.pace.note(message.done.kv.computed_tokens, took)
                    sink.prefilled(message.done)
                else:
                    began = self._clock()
                    sink.accepted()
        except grpc.aio.AioRpcError as error:
            sink.prefill_failed(*failure_of(error, self._address))
        else:
            if not answered:
                silent = EngineFailedError(f"{self._address} ended the prompt without an answer")
                sink.prefill_failed(silent, False)
        finally:
            call.cancel()

    async def _release(self, lease_id: str) -> None:
        request = kvtransfer_pb2.ReleaseRequest(lease_id=lease_id)
        try:
            await self._kv.Release(request, timeout=FAREWELL_SECONDS)
        except grpc.aio.AioRpcError as error:
            log.debug("lease %s expires instead: %s", lease_id, error.code().name)


class Workers:
    """Every worker that requests were placed on. `clock`: seconds, monotonic."""

    def __init__(self, channels: Channels, frontend_id: str, clock: Callable[[], float]) -> None:
        self._channels = channels
        self._frontend_id = frontend_id
        self._clock = clock
        self._decode: dict[str, DecodeLink] = {}
        self._prefill: dict[str, PrefillLink] = {}
        self._used_at: dict[str, float] = {}

    def decode(self, address: str) -> DecodeLink:
        """The link to a decode worker."""
        self._used_at[address] = self._clock()
        link = self._decode.get(address)
        if link is None:
            channel = self._channels.get(address)
            link = DecodeLink(address, channel, self._frontend_id, self._clock)
            self._decode[address] = link
        return link

    def prefill(self, address: str) -> PrefillLink:
        """The link to a prefill worker."""
        self._used_at[address] = self._clock()
        link = self._prefill.get(address)
        if link is None:
            link = PrefillLink(address, self._channels.get(address), self._clock)
            self._prefill[address] = link
        return link

    async def close_idle(self) -> None:
        """Closes what no request has used for IDLE_SECONDS: workers come and go."""
        now = self._clock()
        for address, used_at in list(self._used_at.items()):
            decode, prefill = self._decode.get(address), self._prefill.get(address)
            links: list[DecodeLink | PrefillLink] = [x for x in (decode, prefill) if x is not None]
            if now - used_at < IDLE_SECONDS or any(link.busy for link in links):
                continue
            del self._used_at[address]
            self._decode.pop(address, None)
            self._prefill.pop(address, None)
            # Nothing may come between: a new request must find neither the links nor the channel.
            await self._channels.drop(address)
            await asyncio.gather(*(link.close() for link in links))

    async def close(self) -> None:
        """Closes all links."""
        links: list[DecodeLink | PrefillLink] = [*self._decode.values(), *self._prefill.values()]
        await asyncio.gather(*(link.close() for link in links))
