"""One attempt's calls: sends its commands to workers and their answers to the core."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from services.frontend import wire
from services.frontend.events import (
    CancelDecode,
    CancelPrefill,
    Command,
    Event,
    PrefillAccepted,
    Proceed,
    Release,
    Role,
    StartDecode,
    StartPrefill,
    WorkerFailed,
)
from services.frontend.workers import DecodeLink, Workers
from services.runtime.errors import TandemError
from tandem.decode.v1 import decode_pb2
from tandem.generation.v1 import generation_pb2
from tandem.prefill.v1 import prefill_pb2

MAX_DEADLINE_MS = 2**32 - 1


class Calls:
    """Of the attempt of this number; `tokens.request_id` is its name at workers.

    `deadline` on `clock`, seconds. What comes of the calls is given to `feed`, until nothing of it
    is wanted any more.
    """

    def __init__(
        self,
        number: int,
        tokens: generation_pb2.TokenRequest,
        deadline: float,
        workers: Workers,
        clock: Callable[[], float],
        feed: Callable[[Event], None],
    ) -> None:
        self._number = number
        self._tokens = tokens
        self._deadline = deadline
        self._workers = workers
        self._clock = clock
        self._feed = feed
        self._prefill: asyncio.Task[None] | None = None
        self._link: DecodeLink | None = None

    def act(self, command: Command) -> None:
        """Carries out what concerns workers."""
        name = self._tokens.request_id
        match command:
            case StartPrefill(_, worker, prefix):
                link = self._workers.prefill(worker.address)
                prompt = wire.prefill_request(self._tokens, worker, prefix)
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
                self._forget()
            case CancelPrefill():
                assert self._prefill is not None
                self._prefill.cancel()
            case Release(_, worker):
                self._workers.prefill(worker.address).release(name)
            case _:
                raise TypeError(f"{type(command).__name__} is not for workers")

    def _forget(self) -> None:
        """Wants nothing more from the decode stream."""
        assert self._link is not None
        self._link.forget(self._tokens.request_id)

    def _left(self) -> float:
        return max(0.001, self._deadline - self._clock())

    def _send(self, message: decode_pb2.DecodeRequest) -> None:
        assert self._link is not None
        self._link.send(message)

    def output(self, message: decode_pb2.RequestOutput) -> None:
        """See DecodeSink."""
        if message.finish_reason:
            self._forget()
        self._feed(wire.output_from(self._number, message))

    def decode_lost(self, error: TandemError, unreachable: bool) -> None:
        """See DecodeSink."""
        self._feed(WorkerFailed(self._number, Role.DECODE, error, unreachable))

    def accepted(self) -> None:
        """See PrefillSink."""
        self._feed(PrefillAccepted(self._number))

    def prefilled(self, message: prefill_pb2.PrefillDone) -> None:
        """See PrefillSink."""
        self._feed(wire.done_from(self._number, message))

    def prefill_failed(self, error: TandemError, unreachable: bool) -> None:
        """See PrefillSink."""
        self._feed(WorkerFailed(self._number, Role.PREFILL, error, unreachable))
