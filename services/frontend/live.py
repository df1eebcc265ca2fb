"""A request in flight: carries out the core's commands and feeds it what comes of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from services.engine.api import FinishReason, Sampling, TokenLogprob
from services.frontend import wire
from services.frontend.awake import Awake
from services.frontend.calls import Calls
from services.frontend.coordinator import Coordinator
from services.frontend.events import (
    CancelPlace,
    ClientGone,
    Command,
    DeadlinePassed,
    Emit,
    Event,
    Fail,
    Finish,
    Place,
    Placed,
    Report,
    Unplaced,
)
from services.frontend.patience import Patience
from services.frontend.request import Request
from services.frontend.served import ServedModel
from services.frontend.validate import Wishes
from services.frontend.watch import Watch
from services.frontend.workers import Workers
from services.runtime.errors import TandemError

log = logging.getLogger(__name__)

SLACK = 0.01
SLACK_SECONDS = 0.05
"""How much of its time, and how many seconds at least, may be left here of a deadline that has
passed at the client: gRPC rounds it up on the wire, to three digits."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """What requests share. `clock`: seconds, monotonic."""

    coordinator: Coordinator
    workers: Workers
    clock: Callable[[], float]
    patience: Patience
    awake: Awake


@dataclass(frozen=True, slots=True)
class Job:
    """A valid request, tokenized. `deadline`: on the cluster's clock."""

    request_id: str
    served: ServedModel
    prompt: Sequence[int]
    sampling: Sampling
    deadline: float
    wishes: Wishes
    block_keys: Callable[[Sequence[int]], Awaitable[list[bytes]]]
    """Keys of the full blocks of the prompt and these output tokens."""
    use: int = 0
    """How many requests had this id before: what comes late of them is not this one's."""


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
        self._calls: dict[int, Calls] = {}
        self._placing: dict[int, asyncio.Task[None]] = {}
        self._told: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        left = job.deadline - cluster.clock()
        self._deadline = loop.call_later(left, self.feed, DeadlinePassed())
        self._watch = Watch(
            core, cluster.workers, cluster.patience, cluster.awake, cluster.clock, self.feed
        )
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

    async def begun(self) -> None:
        """Waits for the first token, or for the end. Takes nothing."""
        await self._moved.wait()

    async def whole(self) -> Piece:
        """Everything, once the request has ended. Raises the error that ended it."""
        await self._ended.wait()
        if self._error is not None:
            raise self._error
        return self._piece

    def close(self) -> None:
        """Ends the request if it has not ended: the client is gone, perhaps for its deadline."""
        deadline = self._job.deadline
        slack = max(SLACK_SECONDS, SLACK * (deadline - self.core.arrived))
        late = self._cluster.clock() >= deadline - slack
        self.feed(DeadlinePassed() if late else ClientGone())
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
            self._act(self.core.handle(ClientGone(TandemError.reason), self._cluster.clock()))
        except Exception as another:
            log.error("%s: no clean end: %s", self._job.request_id, type(another).__name__)
        self._end(error)

    def _act(self, commands: Sequence[Command]) -> None:
        for command in commands:
            match command:
                case Emit(token_ids, logprobs, text):
                    self._piece.token_ids += token_ids
                    self._piece.logprobs += logprobs
                    self._piece.text += text
                    self._moved.set()
                case Place(attempt, exclude):
                    placing = asyncio.create_task(self._place(attempt, exclude))
                    self._placing[attempt] = placing
                case CancelPlace(attempt):
                    self._placing[attempt].cancel()
                case Report():
                    self._report(command)
                case Finish(reason):
                    self.finish_reason = reason
                    self._end(None)
                case Fail(error):
                    self._end(error)
                case _:
                    self._called(command.attempt).act(command)

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
                wishes=job.wishes.left(len(output), self._cluster.clock() - self.core.arrived),
            )
        except TandemError as error:
            self.feed(Unplaced(number, error))
        except Exception as error:
            self.break_off(error)
        else:
            self.feed(Placed(number, placement))

    def _called(self, number: int) -> Calls:
        """The calls of an attempt, which gets all tokens that there are when it begins."""
        calls = self._calls.get(number)
        if calls is None:
            job, cluster = self._job, self._cluster
            name = f"{job.request_id}/{number}" + (f"~{job.use}" if job.use else "")
            tokens = wire.token_request(
                name,
                job.prompt,
                self.core.output,
                self._sampling,
                job.wishes.tenant,
                job.wishes.adapter,
            )
            calls = self._calls[number] = Calls(
                number, tokens, job.deadline, cluster.workers, cluster.clock, self.feed
            )
        return calls

    def _report(self, report: Report) -> None:
        """The attempt is over."""
        name = self._job.request_id
        if report.failed_worker:
            where = f"{name}/{report.attempt}"
            log.info("%s: %s failed with %s", where, report.failed_worker, report.failure)
        self._told = self._cluster.coordinator.report(name, report)

    def _end(self, error: Exception | None) -> None:
        if self._ended.is_set():
            return
        self._error = error
        self._deadline.cancel()
        self._watch.stop()
        self._moved.set()
        self._ended.set()
