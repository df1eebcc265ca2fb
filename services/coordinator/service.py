"""The coordinator's two gRPC services: they hand events to the core and act on its commands."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
from opentelemetry import trace
from opentelemetry.trace import Span

from services.coordinator import wire
from services.coordinator.core import messages as m
from services.coordinator.core.core import Core
from services.coordinator.explained import attributes, explanation_to
from services.runtime import incident
from services.runtime.errors import (
    CoordinatorUnavailableError,
    InvalidRequestError,
    WorkerLostError,
)
from tandem.coordinator.v1 import coordinator_pb2 as pb
from tandem.coordinator.v1 import coordinator_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)

_tracer = trace.get_tracer("tandem.coordinator")

_Context = grpc.aio.ServicerContext[Any, Any]


class _Stream:
    """What is to be said on one Register stream; an error ends it, None ends it in peace."""

    def __init__(self) -> None:
        self.out: asyncio.Queue[pb.RegisterResponse | Exception | None] = asyncio.Queue()


class Driver:
    """The core's edge: the clock, the tickets, who waits for what. Use on one event loop."""

    def __init__(
        self, core: Core, coordinator_id: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.core = core
        self.coordinator_id = coordinator_id
        self.clock = clock
        self.stopping = False
        self._numbers = itertools.count(1)
        self._streams: dict[int, _Stream] = {}
        self._answers: dict[int, asyncio.Future[m.AnswerPlacement]] = {}
        self._reported: set[tuple[str, str, int]] = set()

    async def run_clock(self, interval_seconds: float) -> None:
        """Tells the core that time passes, until cancelled. A tick that fails ends nothing."""
        while True:
            await asyncio.sleep(interval_seconds)
            self.tick()

    def tick(self) -> None:
        """Tells the core that time passed. Whatever it raises is logged, once for each place."""
        try:
            self.dispatch(m.Tick())
        except Exception as error:
            kind = _kind(error)
            if kind not in self._reported:
                self._reported.add(kind)
                words = incident.report(error, None)
                log.error("a tick failed, and goes on at the next one:\n%s", words)

    def dispatch(self, event: m.Event) -> None:
        """Hands an event to the core and acts on what it says. Raises what the core raises."""
        try:
            commands = self.core.handle(event, self.clock())
        except Exception:
            # What was decided before that holds, and its state counts on its being done.
            for command in self.core.decided():
                self._act(command)
            raise
        for command in commands:
            self._act(command)

    def open_stream(self) -> tuple[int, _Stream]:
        """A number for a new Register stream, and what is to be said on it."""
        number, stream = next(self._numbers), _Stream()
        self._streams[number] = stream
        if self.stopping:
            stream.out.put_nowait(_stopping())
        return number, stream

    def close_stream(self, number: int) -> None:
        """The stream is over."""
        self._streams.pop(number, None)
        self.dispatch(m.StreamLost(number))

    async def place(self, want: m.PlaceRequest, timeout: float | None) -> m.AnswerPlacement:
        """Waits for the core's answer. Raises the TandemError of a refusal."""
        if self.stopping:
            raise _stopping()
        ticket = next(self._numbers)
        answer: asyncio.Future[m.AnswerPlacement] = asyncio.get_running_loop().create_future()
        self._answers[ticket] = answer
        deadline = None if timeout is None else self.clock() + timeout
        try:
            self.dispatch(m.PlaceRequested(ticket, want, deadline))
            return await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                # Answered, and nobody there to use it.
                self.dispatch(m.AttemptEnded(want.request_id, want.attempt))
            else:
                self.dispatch(m.PlaceCancelled(ticket))
            raise
        finally:
            self._answers.pop(ticket, None)

    def describe(self, want: m.PlaceRequest, span: Span) -> None:
        """Makes a span's attributes of what was decided on a request."""
        record = self.core.desk.explanations.get(want.request_id, want.attempt)
        if record is not None:
            span.set_attributes(attributes(record, self.clock()))

    def stop(self) -> None:
        """Ends all streams and refuses all who wait, and all who come from now on."""
        self.stopping = True
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(_stopping())
        for stream in self._streams.values():
            stream.out.put_nowait(_stopping())

    def _act(self, command: m.Command) -> None:
        match command:
            case m.AnswerPlacement(ticket=ticket):
                answer = self._answers.get(ticket)
                if answer is not None and not answer.done():
                    answer.set_result(command)
            case m.RefusePlacement(ticket=ticket, refusal=refusal):
                answer = self._answers.get(ticket)
                if answer is not None and not answer.done():
                    answer.set_exception(wire.refusal_to(refusal))
            case (
                m.GrantLease(stream=number)
                | m.AskResync(stream=number)
                | m.AskRole(stream=number)
                | m.AskExperts(stream=number)
            ):
                if number in self._streams:
                    message = wire.command_to(command, self.coordinator_id)
                    self._streams[number].out.put_nowait(message)
            case m.DropWorker(stream=number, worker_id=worker_id, why=why):
                log.warning("worker %s is dropped: %s", worker_id, why)
                if number in self._streams:
                    lost = WorkerLostError(f"dropped: {why}; register again", worker=worker_id)
                    self._streams[number].out.put_nowait(lost)


class CoordinatorServicer(pb_grpc.CoordinatorServiceServicer):
    """Decisions for frontends. `peers`: addresses of the other coordinators that are known."""

    def __init__(self, driver: Driver, peers: Callable[[], Sequence[str]] = tuple) -> None:
        self._driver = driver
        self._peers = peers

    async def Place(self, request: pb.PlaceRequest, context: _Context) -> pb.PlaceResponse:  # noqa: N802
        """See coordinator.proto."""
        want, driver = wire.place_from(request), self._driver
        with _tracer.start_as_current_span("coordinator.place", record_exception=False) as span:
            try:
                answer = await driver.place(want, context.time_remaining())
            finally:
                if span.is_recording():
                    driver.describe(want, span)
        return wire.place_to(answer, driver.coordinator_id)

    async def Report(self, request: pb.ReportRequest, context: _Context) -> pb.ReportResponse:  # noqa: N802
        """See coordinator.proto."""
        self._driver.dispatch(wire.ended_from(request))
        return pb.ReportResponse()

    async def GetModels(  # noqa: N802
        self, request: pb.GetModelsRequest, context: _Context
    ) -> pb.GetModelsResponse:
        """See coordinator.proto."""
        return wire.models_to(self._driver.core)

    async def GetStatus(  # noqa: N802
        self, request: pb.GetStatusRequest, context: _Context
    ) -> pb.GetStatusResponse:
        """See coordinator.proto."""
        driver = self._driver
        status = wire.status_to(driver.core, driver.coordinator_id, driver.clock())
        status.peers.extend(self._peers())
        return status

    async def Explain(  # noqa: N802
        self, request: pb.ExplainRequest, context: _Context
    ) -> pb.ExplainResponse:
        """See coordinator.proto."""
        driver = self._driver
        kept, now = driver.core.desk.explanations, driver.clock()
        return pb.ExplainResponse(
            attempts=[explanation_to(record, now) for record in kept.of(request.request_id)],
            coordinator_id=driver.coordinator_id,
            remembered=len(kept),
        )


class WorkerRegistryServicer(pb_grpc.WorkerRegistryServiceServicer):
    """Membership, load and KV events."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    async def Register(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.RegisterRequest], context: _Context
    ) -> AsyncIterator[pb.RegisterResponse]:
        """See coordinator.proto."""
        number, stream = self._driver.open_stream()
        reading = asyncio.create_task(self._read(number, request_iterator, stream))
        try:
            while (item := await stream.out.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            reading.cancel()
            self._driver.close_stream(number)

    async def _read(
        self, number: int, messages: AsyncIterator[pb.RegisterRequest], stream: _Stream
    ) -> None:
        """Hands on what the worker says; what ends its side of the stream ends the other too."""
        end: Exception | None = None
        worker_id, draining = "", False
        try:
            async for message in messages:
                event = wire.report_from(number, message)
                draining = draining or isinstance(event, m.WorkerDraining)
                if isinstance(event, m.WorkerHello):
                    worker_id = event.info.worker_id
                    log.info("worker %s registers: %s", worker_id, event.info.address)
                elif not worker_id:
                    raise InvalidRequestError("message", "no hello", "a stream starts with hello")
                self._driver.dispatch(event)
            # gRPC ends the messages of the dead and of those that leave alike: these say so first.
            how = "leaves" if draining else "is gone: its stream broke"
            log.info("worker %s %s", worker_id, how)
        except asyncio.CancelledError:  # one that hung up may be seen here first
            if draining:
                log.info("worker %s leaves", worker_id)
            raise
        except Exception as error:  # whatever it is, the handler raises it: see the interceptor
            end = error
        finally:
            stream.out.put_nowait(end)


def _kind(error: BaseException) -> tuple[str, str, int]:
    """What was raised, and where."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return type(error).__qualname__, frame.filename, frame.lineno or 0


def _stopping() -> CoordinatorUnavailableError:
    return CoordinatorUnavailableError("the coordinator is shutting down", retry_seconds=0.5)
