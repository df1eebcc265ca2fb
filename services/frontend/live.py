"""A request in flight: carries out the core's commands and feeds it what comes of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from services.engine.api import FinishReason, Sampling, TokenLogprob
from services.frontend import wire
from services.frontend.coordinator import Coordinator
from services.frontend.events import (
    CancelDecode,
    CancelPlace,
    CancelPrefill,
    ClientGone,
    Command,
    DeadlinePassed,
    Emit,
    Event,
    Fail,
    Finish,
    Place,
    Placed,
    PrefillAccepted,
    Proceed,
    Release,
    Report,
    Role,
    StartDecode,
    StartPrefill,
    Unplaced,
    Worker,
    WorkerFailed,
)
from services.frontend.request import Request, State
from services.frontend.served import ServedModel
from services.frontend.workers import DecodeLink, Workers
from services.runtime.errors import TandemError, WorkerLostError
from tandem.decode.v1 import decode_pb2
from tandem.generation.v1 import generation_pb2
from tandem.prefill.v1 import prefill_pb2

log = logging.getLogger(__name__)

SLOWEST_PREFILL = 200.0
"""Tokens a second. A worker that owes a first token has stall_seconds and the time that its prompt
takes at this rate, since it says nothing while it computes."""

MAX_DEADLINE_MS = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Cluster:
    """What requests share. `clock`: seconds, monotonic."""

    coordinator: Coordinator
    workers: Workers
    clock: Callable[[], float]
    stall_seconds: float


@dataclass(frozen=True, slots=True)
class Job:
    """A valid request, tokenized. `deadline`: on the cluster's clock."""

    request_id: str
    served: ServedModel
    prompt: Sequence[int]
    sampling: Sampling
    deadline: float
    block_keys: Callable[[Sequence[int]], Awaitable[list[bytes]]]
    """Keys of the full blocks of the prompt and these output tokens."""


@dataclass(slots=True)
class Piece:
    """What gathered for the client since it was last taken."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text: str = ""


class LiveRequest:
    """One client request from placement to its end. All calls on the event loop's thread."""

    def __init__(self, core: Request, job: Job, cluster: Cluster) -> None:
        self.core = core
        self.finish_reason: FinishReason | None = None
        self._job = job
        self._cluster = cluster
        self._sampling = wire.sampling_to(job.sampling)
        self._error: Exception | None = None
        self._piece = Piece()
        self._moved = asyncio.Event()
        self._ended = asyncio.Event()
        self._attempt: _Attempt | None = None
        self._placing: asyncio.Task[None] | None = None
        self._told: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        left = job.deadline - cluster.clock()
        self._deadline = loop.call_later(left, self.feed, DeadlinePassed())
        self._watch = loop.call_later(cluster.stall_seconds, self._check_silence)
        self._act(core.start())

    async def piece(self) -> Piece:
        """What came since the last call; waits for something, or for the end.

        After the end `finish_reason` is set. Raises the error that ended the request, once all
        that came before it was taken.
        """
        await self._moved.wait()
        piece, self._piece = self._piece, Piece()
        if self._error is None:
            self._moved.clear()
        elif not (piece.token_ids or piece.text):
            raise self._error
        return piece

    async def whole(self) -> Piece:
        """Everything, once the request has ended. Raises the error that ended it."""
        await self._ended.wait()
        if self._error is not None:
            raise self._error
        return self._piece

    def close(self) -> None:
        """Ends the request if it has not ended: the client is gone."""
        self.feed(ClientGone())
        self._end(None)

    def feed(self, event: Event) -> None:
        """Takes in what workers, the coordinator, the clock or the client did. Does not raise."""
        try:
            self._act(self.core.handle(event, self._cluster.clock()))
        except Exception as error:
            self.break_off(error)

    def break_off(self, error: Exception) -> None:
        """Ends the request for a bug of ours, which must not reach the streams of others."""
        try:
            self._act(self.core.handle(ClientGone(), self._cluster.clock()))
        except Exception as another:
            log.error("%s: no clean end: %s", self._job.request_id, type(another).__name__)
        self._end(error)

    def _check_silence(self) -> None:
        """Finds out whether the worker that owes a token has been silent for too long."""
        core, now = self.core, self._cluster.clock()
        late_at = now + self._cluster.stall_seconds
        owing = core.owing
        if owing is not None:
            role, worker = owing
            patience = self._patience(role)
            late_at = max(core.owed_since, self._heard_at(role, worker)) + patience
            if late_at <= now:
                what = f"{worker.worker_id} owes a token and was silent for {patience:.1f} s"
                error = WorkerLostError(what, worker=worker.worker_id)
                self.feed(WorkerFailed(core.number, role, error, ended=False))
                late_at = now + self._cluster.stall_seconds
        if core.state is not State.ENDED:
            wait = late_at - self._cluster.clock()
            self._watch = asyncio.get_running_loop().call_later(wait, self._check_silence)

    def _patience(self, role: Role) -> float:
        attempt = self.core.attempts[-1]
        patience = self._cluster.stall_seconds
        if role is Role.PREFILL or (attempt.placement.prefill is None and not attempt.tokens):
            patience += attempt.context_tokens / SLOWEST_PREFILL
        return patience

    def _heard_at(self, role: Role, worker: Worker) -> float:
        workers = self._cluster.workers
        link = (workers.prefill if role is Role.PREFILL else workers.decode)(worker.address)
        return link.heard_at

    def _act(self, commands: Sequence[Command]) -> None:
        for command in commands:
            match command:
                case Emit(token_ids, logprobs, text):
                    self._piece.token_ids += token_ids
                    self._piece.logprobs += logprobs
                    self._piece.text += text
                    self._moved.set()
                case Place(attempt, exclude):
                    self._placing = asyncio.create_task(self._place(attempt, exclude))
                case CancelPlace():
                    assert self._placing is not None
                    self._placing.cancel()
                case Report():
                    self._report(command)
                case Finish(reason):
                    self.finish_reason = reason
                    self._end(None)
                case Fail(error):
                    self._end(error)
                case _:
                    assert self._attempt is not None
                    self._attempt.act(command)

    async def _place(self, number: int, exclude: tuple[str, ...]) -> None:
        job, output = self._job, tuple(self.core.output)
        try:
            if self._told is not None:
                # So that the coordinator knows of the failure when it chooses again.
                await self._told
            keys = await job.block_keys(output)
            placement = await self._cluster.coordinator.place(
                job.request_id,
                number,
                exclude,
                served=job.served,
                block_keys=keys,
                context_tokens=len(job.prompt) + len(output),
                max_tokens=job.sampling.max_tokens - len(output),
                timeout=job.deadline - self._cluster.clock(),
            )
        except TandemError as error:
            self.feed(Unplaced(number, error))
        except Exception as error:
            self.break_off(error)
        else:
            name = f"{job.request_id}/{number}"
            tokens = wire.token_request(name, job.prompt, output, self._sampling)
            self._attempt = _Attempt(self, number, tokens, job.deadline, self._cluster)
            self.feed(Placed(number, placement))

    def _report(self, report: Report) -> None:
        """The attempt is over."""
        name = self._job.request_id
        if report.failed_worker:
            where = f"{name}/{report.attempt}"
            log.info("%s: %s failed with %s", where, report.failed_worker, report.failure)
        if self._attempt is not None:
            self._attempt.forget()
            self._attempt = None
        self._told = self._cluster.coordinator.report(name, report)

    def _end(self, error: Exception | None) -> None:
        if self._ended.is_set():
            return
        self._error = error
        self._deadline.cancel()
        self._watch.cancel()
        self._moved.set()
        self._ended.set()


class _Attempt:
    """One attempt's calls: sends its commands to workers and their answers to the core."""

    def __init__(
        self,
        live: LiveRequest,
        number: int,
        tokens: generation_pb2.TokenRequest,
        deadline: float,
        cluster: Cluster,
    ) -> None:
        self._live = live
        self._number = number
        self._tokens = tokens
        self._deadline = deadline
        self._workers = cluster.workers
        self._clock = cluster.clock
        self._prefill: asyncio.Task[None] | None = None
        self._link: DecodeLink | None = None

    def act(self, command: Command) -> None:
        """Carries out what concerns workers."""
        name = self._tokens.request_id
        match command:
            case StartPrefill(_, worker, prefix):
                link = self._workers.prefill(worker.address)
                prompt = wire.prefill_request(self._tokens, prefix)
                self._prefill = link.start(prompt, self._left(), self)
            case StartDecode(_, worker, source, prefix):
                deadline_ms = min(round(self._left() * 1000), MAX_DEADLINE_MS)
                message = wire.start_message(self._tokens, worker, source, prefix, deadline_ms)
                self._link = self._workers.decode(worker.address)
                self._link.start(name, message, self)
            case Proceed(_, worker, token_ids, handle):
                self._send(wire.proceed_message(name, token_ids, handle))
            case CancelDecode():
                self._send(wire.cancel_message(name))
            case CancelPrefill():
                assert self._prefill is not None
                self._prefill.cancel()
            case Release(_, worker):
                self._workers.prefill(worker.address).release(name)
            case _:
                raise TypeError(f"{type(command).__name__} is not for workers")

    def forget(self) -> None:
        """Wants nothing more from the decode stream."""
        if self._link is not None:
            self._link.forget(self._tokens.request_id)

    def _left(self) -> float:
        return max(0.001, self._deadline - self._clock())

    def _send(self, message: decode_pb2.DecodeRequest) -> None:
        assert self._link is not None
        self._link.send(message)

    def output(self, message: decode_pb2.RequestOutput) -> None:
        """See DecodeSink."""
        self._live.feed(wire.output_from(self._number, message))

    def decode_lost(self, error: TandemError, unreachable: bool) -> None:
        """See DecodeSink."""
        self._live.feed(WorkerFailed(self._number, Role.DECODE, error, unreachable))

    def accepted(self) -> None:
        """See PrefillSink."""
        self._live.feed(PrefillAccepted(self._number))

    def prefilled(self, message: prefill_pb2.PrefillDone) -> None:
        """See PrefillSink."""
        self._live.feed(wire.done_from(self._number, message))

    def prefill_failed(self, error: TandemError, unreachable: bool) -> None:
        """See PrefillSink."""
        self._live.feed(WorkerFailed(self._number, Role.PREFILL, error, unreachable))
