"""One request's life as a pure state machine: events in, commands out, no clock and no wire.

The frontend is the authority on a request's tokens. Whatever dies, the request is placed again with
the prompt and the tokens it has, and the client's stream goes on. The rules:

 1. An attempt is one placement. Its number is part of every id that workers see, so whatever comes
    late from an old attempt is known as such and dropped.
 2. A token counts once it is taken here. Then it is the client's, and context of every later
    attempt. Tokens come from prefill (the first ones of an attempt) or from decode, never both
    for one position.
 3. Prefill's failure matters until its tokens are here. After that its KV matters only to the
    decode worker, whose failure then says KV_SOURCE_LOST.
 4. An attempt that ends for any reason leaves nothing behind: what still runs is cancelled, a lease
    that no sink has emptied is released, the coordinator is told.
 5. The request ends exactly once, by Finish, by Fail, or silently when the client is gone.

    state     event            what happens                                    next
    --------  ---------------  ----------------------------------------------  ------------------
    PLACING   Placed           start both workers, or decode alone             PROMPT or DECODING
    PLACING   Unplaced         fail                                            ENDED
    PROMPT    PrefillAccepted  prefill's patience starts anew                  PROMPT
    PROMPT    PrefillDone      emit; proceed, or finish and cancel decode      DECODING or ENDED
    PROMPT    DecodeOutput     note KV; error or tokens out of turn: again     PROMPT or PLACING
    PROMPT    WorkerFailed     place again                                     PLACING or ENDED
    DECODING  DecodeOutput     emit; finish; an error: place again             any but PROMPT
    DECODING  WorkerFailed     decode's: place again; prefill's: rule 3        PLACING or same
    any live  ClientGone       rule 4                                          ENDED
    any live  DeadlinePassed   rule 4, fail                                    ENDED
    ENDED     anything         dropped                                         ENDED
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from services.engine.api import FinishReason, KvReport, TokenLogprob
from services.frontend.events import (
    CancelDecode,
    CancelPlace,
    CancelPrefill,
    ClientGone,
    Command,
    DeadlinePassed,
    DecodeOutput,
    Emit,
    Event,
    Fail,
    Finish,
    Place,
    Placed,
    Placement,
    PrefillAccepted,
    PrefillDone,
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
from services.frontend.faults import (
    blames_source,
    excludes,
    given_up,
    is_final,
    no_more_workers,
)
from services.runtime.errors import DeadlineError, EngineFailedError, TandemError


class State(enum.Enum):
    """Whom the request waits for."""

    PLACING = "the coordinator"
    PROMPT = "the prefill worker"
    DECODING = "the decode worker"
    ENDED = "nobody"


class Text(Protocol):
    """Turns a request's tokens into text and watches for its stop strings (text.py)."""

    def push(self, token_ids: Sequence[int]) -> tuple[int, str]:
        """How many tokens were taken, and text that is final now.

        Fewer than given are taken only where a stop string is complete: `stopped` is set then.
        """

    def finish(self) -> str:
        """What was held back, at the end of the tokens. May set `stopped`."""

    @property
    def stopped(self) -> bool:
        """A stop string was found; text ends before it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What ends a request besides its stop strings."""

    prompt_tokens: int
    max_tokens: int
    min_tokens: int
    stop_token_ids: frozenset[int]
    max_attempts: int


@dataclass(slots=True)
class Attempt:
    """One placement of the request, and what came of it."""

    placement: Placement
    context_tokens: int
    accepted: bool = False
    tokens: int = 0
    failure: str = ""
    prefill_kv: KvReport | None = None
    decode_kv: KvReport | None = None
    prefill_runs: bool = False
    decode_runs: bool = False
    leased: bool = False


@dataclass(slots=True)
class Request:
    """See the module's docstring. Times are seconds of the clock that `now` is read from."""

    limits: Limits
    text: Text
    arrived: float
    state: State = State.PLACING
    output: list[int] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)
    placed_at: float | None = None
    first_token_at: float | None = None
    ended_at: float | None = None
    owed_since: float = 0.0
    last_error: TandemError | None = None
    number: int = 0

    def start(self) -> list[Command]:
        """The first command."""
        return [Place(self.number, ())]

    def handle(self, event: Event, now: float) -> list[Command]:
        """What follows from an event. Events of other attempts and ended requests: nothing."""
        if getattr(event, "attempt", self.number) != self.number:
            return []
        act = _TABLE.get((self.state, type(event)))
        return [] if act is None else act(self, event, now)

    @property
    def owing(self) -> tuple[Role, Worker] | None:
        """The worker that owes a token since `owed_since`; None while there is none."""
        if self.state is State.PROMPT:
            worker = self.attempts[-1].placement.prefill
            assert worker is not None
            return Role.PREFILL, worker
        if self.state is State.DECODING:
            return Role.DECODE, self.attempts[-1].placement.decode
        return None

    # Placement

    def _placed(self, event: Placed, now: float) -> list[Command]:
        placement = event.placement
        self.placed_at = self.placed_at if self.placed_at is not None else now
        self.owed_since = now
        context = self.limits.prompt_tokens + len(self.output)
        attempt = Attempt(placement, context, decode_runs=True)
        self.attempts.append(attempt)
        if placement.prefill is None:
            self.state = State.DECODING
            return [StartDecode(self.number, placement.decode, None, placement.prefix)]
        attempt.prefill_runs = True
        self.state = State.PROMPT
        return [
            StartPrefill(self.number, placement.prefill, placement.prefix),
            StartDecode(self.number, placement.decode, placement.prefill),
        ]

    def _unplaced(self, event: Unplaced, now: float) -> list[Command]:
        return self._end(now, [Fail(no_more_workers(event.error, self.last_error))])

    def _place_again(self, error: TandemError, now: float) -> list[Command]:
        """The attempt is over (its commands are out): on to the next, or to the end."""
        if is_final(error):
            return self._end(now, [Fail(error)])
        if len(self.attempts) >= self.limits.max_attempts:
            return self._end(now, [Fail(given_up(error, len(self.attempts)))])
        self.last_error = error
        self.number += 1
        self.state = State.PLACING
        return [Place(self.number, tuple(self.excluded))]

    # Workers' events

    def _accepted(self, event: PrefillAccepted, now: float) -> list[Command]:
        self.attempts[-1].accepted = True
        self.owed_since = now
        return []

    def _prefilled(self, event: PrefillDone, now: float) -> list[Command]:
        attempt = self.attempts[-1]
        attempt.prefill_runs = False
        attempt.prefill_kv = event.kv
        attempt.leased = event.finish_reason is None
        if not event.token_ids or event.finish_reason in _NOT_FINISHED:
            error = EngineFailedError("the prefill worker ended the prompt without a token")
            return self._failed(WorkerFailed(self.number, Role.PREFILL, error), now)
        commands = self._take(event.token_ids, event.logprobs, event.finish_reason, now)
        if self.state is not State.ENDED:
            worker = attempt.placement.decode
            commands.append(Proceed(self.number, worker, event.token_ids, event.handle))
            self.state = State.DECODING
        return commands

    def _early_output(self, event: DecodeOutput, now: float) -> list[Command]:
        """From the decode worker, while prefill has not answered: no tokens can come yet."""
        if event.kv is not None:
            self._kv_arrived(event.kv)
        if event.token_ids or event.finish_reason is not None:
            return self._decode_failed(event, now)
        return []

    def _output(self, event: DecodeOutput, now: float) -> list[Command]:
        self.owed_since = now
        if event.kv is not None:
            self._kv_arrived(event.kv)
        if event.finish_reason in _NOT_FINISHED:
            return self._decode_failed(event, now)
        if event.finish_reason is not None:
            self.attempts[-1].decode_runs = False
        if not event.token_ids and event.finish_reason is None:
            return []
        return self._take(event.token_ids, event.logprobs, event.finish_reason, now)

    def _kv_arrived(self, kv: KvReport) -> None:
        self.attempts[-1].decode_kv = kv
        self.attempts[-1].leased = False

    def _decode_failed(self, event: DecodeOutput, now: float) -> list[Command]:
        error = event.error
        if error is None:
            worker = self.attempts[-1].placement.decode.worker_id
            what = f"finished ({event.finish_reason.value})" if event.finish_reason else "tokens"
            error = EngineFailedError(f"{worker} sent {what} out of turn", worker=worker)
        ended = event.finish_reason is not None
        return self._failed(WorkerFailed(self.number, Role.DECODE, error, ended=ended), now)

    def _failed(self, event: WorkerFailed, now: float) -> list[Command]:
        if self.state is State.DECODING and event.role is Role.PREFILL:
            return []
        attempt = self.attempts[-1]
        if event.ended and event.role is Role.PREFILL:
            attempt.prefill_runs = False
        elif event.ended:
            attempt.decode_runs = False
        placement = attempt.placement
        source_failed = event.role is Role.PREFILL or blames_source(event.error)
        guilty = (placement.prefill if source_failed else None) or placement.decode
        reason = attempt.failure = event.error.reason
        if excludes(event.error) and guilty.worker_id not in self.excluded:
            self.excluded.append(guilty.worker_id)
        commands = self._leave()
        commands.append(Report(self.number, guilty.worker_id, reason, event.unreachable))
        return commands + self._place_again(event.error, now)

    # Tokens

    def _take(
        self,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
        reason: FinishReason | None,
        now: float,
    ) -> list[Command]:
        """Takes tokens on, gives them to the client, and ends the request if they end it."""
        room = self.limits.max_tokens - len(self.output)
        token_ids = token_ids[:room]
        self.output += token_ids
        # A worker that dies with its last token still to be called the last changes nothing.
        reason = self._complete() or reason
        # The token that stops generation is the client's, but no part of the text.
        spoken = len(token_ids) - (reason is FinishReason.STOP)
        taken, text = self.text.push(token_ids[:spoken])
        if self.text.stopped:
            reason = FinishReason.STOP
            del self.output[len(self.output) - len(token_ids) + taken :]
            token_ids = token_ids[:taken]
        self.attempts[-1].tokens += len(token_ids)
        commands: list[Command] = []
        if token_ids:
            if self.first_token_at is None:
                self.first_token_at = now
            commands.append(Emit(token_ids, logprobs[: len(token_ids)], text))
        return commands if reason is None else commands + self._finish(reason, now)

    def _complete(self) -> FinishReason | None:
        """Why the tokens taken so far are all there can be, if they are."""
        count = len(self.output)
        if not count:
            return None
        if self.output[-1] in self.limits.stop_token_ids and count > self.limits.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if count >= self.limits.max_tokens else None

    # Ends

    def _finish(self, reason: FinishReason, now: float) -> list[Command]:
        commands: list[Command] = []
        if not self.text.stopped:
            rest = self.text.finish()
            if self.text.stopped:
                reason = FinishReason.STOP
            if rest:
                commands.append(Emit((), (), rest))
        commands += self._leave()
        return self._end(now, [*commands, Report(self.number), Finish(reason)])

    def _gone(self, event: ClientGone, now: float) -> list[Command]:
        return self._end(now, self._abandon())

    def _late(self, event: DeadlinePassed, now: float) -> list[Command]:
        waited = now - self.arrived
        error = DeadlineError(
            f"the deadline passed after {waited:.3f} s, waiting for {self.state.value}, "
            f"with {len(self.output)} tokens generated",
            tokens=len(self.output),
        )
        return self._end(now, [*self._abandon(), Fail(error)])

    def _abandon(self) -> list[Command]:
        if self.state is State.PLACING:
            # The coordinator may have booked room already, with its answer on the way.
            return [CancelPlace(self.number), Report(self.number)]
        return [*self._leave(), Report(self.number)]

    def _leave(self) -> list[Command]:
        """Rule 4, but for the report."""
        attempt, commands = self.attempts[-1], list[Command]()
        placement = attempt.placement
        if attempt.prefill_runs:
            commands.append(CancelPrefill(self.number))
        if attempt.decode_runs:
            commands.append(CancelDecode(self.number, placement.decode))
        if attempt.leased and placement.prefill is not None:
            commands.append(Release(self.number, placement.prefill))
        return commands

    def _end(self, now: float, commands: list[Command]) -> list[Command]:
        self.state = State.ENDED
        self.ended_at = now
        return commands


_NOT_FINISHED = (FinishReason.ERROR, FinishReason.CANCELLED)

_Act = Callable[[Request, Any, float], list[Command]]

_TABLE: dict[tuple[State, type], _Act] = {
    (State.PLACING, Placed): Request._placed,
    (State.PLACING, Unplaced): Request._unplaced,
    (State.PROMPT, PrefillAccepted): Request._accepted,
    (State.PROMPT, PrefillDone): Request._prefilled,
    (State.PROMPT, DecodeOutput): Request._early_output,
    (State.PROMPT, WorkerFailed): Request._failed,
    (State.DECODING, DecodeOutput): Request._output,
    (State.DECODING, WorkerFailed): Request._failed,
}
for _state in (State.PLACING, State.PROMPT, State.DECODING):
    _TABLE[_state, ClientGone] = Request._gone
    _TABLE[_state, DeadlinePassed] = Request._late
