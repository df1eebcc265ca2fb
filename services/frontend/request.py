"""One request's life as a pure state machine: events in, commands out, no clock and no wire.

The frontend is the authority on a request's tokens. Whatever dies, the request is placed again with
the prompt and the tokens it has, and the client's stream goes on. The rules:

 1. An attempt is one placement. Its number is part of every id that workers see, so whatever comes
    late from an old attempt is known as such and dropped.
 2. A token counts once it is taken here. Then it is the client's, and context of every later
    attempt. Tokens come from prefill (the first ones of an attempt) or from decode, never both
    for one position.
 3. Prefill's failure matters until its tokens are here. After that its KV matters only to the
    decode worker, whose failure then says KV_SOURCE_LOST; unless it is silent while its lease is
    not known to be emptied, which the decode worker would be long in finding out.
 4. An attempt that ends for any reason leaves nothing behind: what still runs is cancelled, a lease
    that no sink has emptied is released, the coordinator is told.
 5. The request ends exactly once, by Finish, by Fail, or silently when the client is gone.
 6. While a decode worker that wants to be rid of it goes on, a successor may be placed and catch up
    (moving.py). It has a course of its own through the same table; where what happens to it is
    another thing, the table says so.

    state     event            what happens                                    next
    --------  ---------------  ----------------------------------------------  ------------------
    PLACING   Placed           start both workers, or decode alone             PROMPT or DECODING
    PLACING   Unplaced         fail; a successor: it is over                   ENDED
    PROMPT    PrefillAccepted  prefill's patience starts anew                  PROMPT
    PROMPT    PrefillDone      emit; proceed, or finish and cancel decode      DECODING or ENDED
    PROMPT    DecodeOutput     note KV; error or tokens out of turn: again     PROMPT or PLACING
    PROMPT    WorkerFailed     place again                                     PLACING or ENDED
    DECODING  DecodeOutput     emit; finish; an error: place again; moving:    any but PROMPT
                               place a successor; a successor's first token:
                               it takes over, or begins anew, closer
    DECODING  WorkerFailed     decode's: place again, or the successor takes   PLACING or same
                               over; a successor's: it is over; prefill's:
                               rule 3
    any live  ClientGone       rule 4                                          ENDED
    any live  DeadlinePassed   rule 4, fail                                    ENDED
    ENDED     anything         dropped                                         ENDED
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from typing import Any

from services.engine.api import FinishReason, TokenLogprob
from services.frontend import moving
from services.frontend.attempt import Attempt, Course, State
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
    PrefillAccepted,
    PrefillDone,
    Proceed,
    Release,
    Role,
    StartDecode,
    StartPrefill,
    Unplaced,
    WorkerFailed,
)
from services.frontend.faults import (
    REFUSALS,
    blames_source,
    excludes,
    given_up,
    is_final,
    no_more_workers,
    weighs,
)
from services.frontend.output import Limits, Output, Text
from services.frontend.patience import Debt
from services.runtime.errors import (
    DeadlineError,
    DrainingError,
    EngineFailedError,
    TandemError,
    WorkerLostError,
)


@dataclass(slots=True)
class Request:
    """See the module's docstring. Times are seconds of the clock that `now` is read from."""

    limits: Limits
    text: InitVar[Text]
    arrived: float
    taken: Output = field(init=False)
    attempts: list[Attempt] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)
    course: Course = field(default_factory=lambda: Course(0, 0))
    successor: Course | None = None
    placed_at: float | None = None
    first_token_at: float | None = None
    ended_at: float | None = None
    last_error: TandemError | None = None
    failures: int = 0
    refusals: int = 0
    moves: int = 0
    move_at: float = 0.0
    numbers: int = 1

    def __post_init__(self, text: Text) -> None:
        self.taken = Output(self.limits, text)

    @property
    def output(self) -> list[int]:
        """The client's tokens so far."""
        return self.taken.tokens

    def start(self) -> list[Command]:
        """The first command."""
        return [Place(self.course.number, ())]

    def handle(self, event: Event, now: float) -> list[Command]:
        """What follows from an event. Events of other attempts and ended requests: nothing."""
        number = getattr(event, "attempt", self.course.number)
        for course in (self.course, self.successor):
            if course is not None and course.number == number:
                act = _TABLE.get((course.state, type(event)))
                return [] if act is None else act(self, course, event, now)
        return []

    @property
    def state(self) -> State:
        """Whom the client waits for."""
        return self.course.state

    @property
    def owing(self) -> list[Debt]:
        """What workers owe it."""
        return [debt for course in self._courses() for debt in course.debts()]

    def _courses(self) -> list[Course]:
        return [self.course] if self.successor is None else [self.course, self.successor]

    # Placement

    def _want(self, *avoid: str) -> tuple[Course, list[Command]]:
        number, self.numbers = self.numbers, self.numbers + 1
        exclude = (*self.excluded, *(a for a in avoid if a not in self.excluded))
        return Course(number, number), [Place(number, exclude)]

    def _placed(self, course: Course, event: Placed, now: float) -> list[Command]:
        placement = event.placement
        self.placed_at = self.placed_at if self.placed_at is not None else now
        context = self.limits.prompt_tokens + len(self.output)
        if course is self.successor:
            # The last token's KV is computed with the next one.
            old = self.course.attempt.placement.decode
            placement = moving.handover(placement, old, context - 1)
        attempt = Attempt(placement, context, placed_at=now)
        self.attempts.append(attempt)
        course.begin(attempt, len(self.output), now)
        if placement.prefill is None:
            return [StartDecode(course.number, placement.decode, None, placement.prefix)]
        return [
            StartPrefill(course.number, placement.prefill, placement.prefix),
            StartDecode(course.number, placement.decode, placement.prefill),
        ]

    def _unplaced(self, course: Course, event: Unplaced, now: float) -> list[Command]:
        if course is self.successor:
            return self._no_successor(now)
        return self._end(now, [Fail(no_more_workers(event.error, self.last_error))])

    def _carry_on(self, error: TandemError, now: float) -> list[Command]:
        """The attempt is over (its commands are out): on to the next, or to the end."""
        if is_final(error):
            ends = [] if self.successor is None else self._abandon(self.successor)
            return self._end(now, [*ends, Fail(error)])
        self.last_error = error
        if weighs(error):
            self.failures += 1
        else:
            self.refusals += 1
        if self.successor is not None:
            self.course, self.successor = self.successor, None
            return []
        if self.failures + self.refusals // REFUSALS >= self.limits.max_attempts:
            return self._end(now, [Fail(given_up(error, len(self.attempts)))])
        self.course, commands = self._want()
        return commands

    # Workers' events

    def _accepted(self, course: Course, event: PrefillAccepted, now: float) -> list[Command]:
        course.attempt.accepted = True
        course.owed_since = now
        return []

    def _prefilled(self, course: Course, event: PrefillDone, now: float) -> list[Command]:
        attempt = course.attempt
        course.owed_since = now
        attempt.prefill_runs = False
        attempt.prefill_kv = event.kv
        attempt.leased = event.finish_reason is None
        if not event.token_ids or event.finish_reason in _NOT_FINISHED:
            error = EngineFailedError("the prefill worker ended the prompt without a token")
            return self._failed(course, WorkerFailed(course.number, Role.PREFILL, error), now)
        course.at += len(event.token_ids)
        commands = self._take(event.token_ids, event.logprobs, event.finish_reason, now)
        if self.state is not State.ENDED:
            worker = attempt.placement.decode
            commands.append(Proceed(course.number, worker, event.token_ids, event.handle))
            course.state = State.DECODING
        return commands

    def _early_output(self, course: Course, event: DecodeOutput, now: float) -> list[Command]:
        """From the decode worker, while prefill has not answered: no tokens can come yet."""
        self._note(course, event)
        if event.token_ids or event.finish_reason is not None:
            return self._decode_failed(course, event, now)
        return []

    def _output(self, course: Course, event: DecodeOutput, now: float) -> list[Command]:
        course.owed_since = now
        self._note(course, event)
        if event.finish_reason in _NOT_FINISHED:
            return self._decode_failed(course, event, now)
        if event.finish_reason is not None:
            course.attempt.decode_runs = False
        if not event.token_ids and event.finish_reason is None:
            return []
        course.spoke = True
        commands = self._arrived(course, event, now)
        if self.state is State.DECODING and self.course.attempt.moving:
            commands += self._move(now)
        return commands

    def _note(self, course: Course, event: DecodeOutput) -> None:
        attempt = course.attempt
        attempt.moving = attempt.moving or event.moving
        if event.kv is not None:
            attempt.leased = False
            # What a round begun anew found in its own cache says nothing new.
            attempt.decode_kv = attempt.decode_kv or event.kv

    def _decode_failed(self, course: Course, event: DecodeOutput, now: float) -> list[Command]:
        error = event.error
        if error is None:
            worker = course.attempt.placement.decode.worker_id
            what = f"finished ({event.finish_reason.value})" if event.finish_reason else "tokens"
            error = EngineFailedError(f"{worker} sent {what} out of turn", worker=worker)
        ended = event.finish_reason is not None
        failed = WorkerFailed(course.number, Role.DECODE, error, ended=ended)
        return self._failed(course, failed, now)

    def _failed(self, course: Course, event: WorkerFailed, now: float) -> list[Command]:
        attempt = course.attempt
        if course.state is State.DECODING and event.role is Role.PREFILL:
            if event.ended or not attempt.leased:
                return []
        elif event.ended and event.role is Role.PREFILL:
            attempt.prefill_runs = False
        elif event.ended:
            attempt.decode_runs = False
        placement = attempt.placement
        source_failed = event.role is Role.PREFILL or blames_source(event.error)
        guilty = (placement.prefill if source_failed else None) or placement.decode
        reason = attempt.failure = event.error.reason
        if excludes(event.error) and guilty.worker_id not in self.excluded:
            self.excluded.append(guilty.worker_id)
        commands = self._leave(course)
        # A worker whose engine is dead says so itself, before its stream ends.
        lost = event.unreachable or (event.ended and reason == WorkerLostError.reason)
        blamed = "" if is_final(event.error) and not lost else guilty.worker_id
        commands.append(course.report(blamed, reason, lost))
        if course is self.successor:
            return commands + self._no_successor(now)
        return commands + self._carry_on(event.error, now)

    # Moving

    def _move(self, now: float) -> list[Command]:
        """Has a successor placed, if it is time for one."""
        if self.successor is not None or now < self.move_at:
            return []
        if self.moves >= self.limits.max_attempts:
            return []
        self.moves += 1
        old = self.course.attempt.placement.decode.worker_id
        self.successor, commands = self._want(old)
        return commands

    def _no_successor(self, now: float) -> list[Command]:
        self.successor, self.move_at = None, now + moving.RETRY_SECONDS
        return []

    def _arrived(self, course: Course, event: DecodeOutput, now: float) -> list[Command]:
        """Tokens of the decode worker, which may be behind what the client has."""
        at, course.at = course.at, course.at + len(event.token_ids)
        if course is self.course and at == len(self.output):
            return self._take(event.token_ids, event.logprobs, event.finish_reason, now)
        step = moving.judge(
            self.output,
            at,
            event.token_ids,
            event.finish_reason is not None,
            rounds=course.rounds,
            alone=course is self.course,
        )
        if step is moving.Step.DROP:
            worker = course.attempt.placement.decode.worker_id
            error = EngineFailedError(f"{worker} generated other tokens", worker=worker)
            failed = WorkerFailed(course.number, Role.DECODE, error, ended=False)
            return self._failed(course, failed, now)
        if step is moving.Step.AGAIN:
            return self._begin_again(course, now)
        commands = [] if course is self.course else self._switch()
        skip = len(self.output) - at
        rest, logprobs = event.token_ids[skip:], event.logprobs[skip:]
        if not rest and event.finish_reason is None:
            return commands
        return commands + self._take(rest, logprobs, event.finish_reason, now)

    def _begin_again(self, course: Course, now: float) -> list[Command]:
        attempt, worker = course.attempt, course.attempt.placement.decode
        commands: list[Command] = []
        if attempt.decode_runs:
            commands.append(CancelDecode(course.number, worker))
        number, self.numbers = self.numbers, self.numbers + 1
        course.begin_again(number, len(self.output), now)
        return [*commands, StartDecode(number, worker, None)]

    def _switch(self) -> list[Command]:
        """The successor has caught up: its tokens count from here."""
        old, new = self.course, self.successor
        assert new is not None
        self.course, self.successor = new, None
        old.attempt.failure = DrainingError.reason
        commands = self._leave(old)
        left = old.attempt.placement.decode.worker_id
        if left not in self.excluded:
            self.excluded.append(left)
        return [*commands, old.report(reason=DrainingError.reason)]

    # Tokens

    def _take(
        self,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
        reason: FinishReason | None,
        now: float,
    ) -> list[Command]:
        """Takes tokens on, gives them to the client, and ends the request if they end it."""
        count, text, reason = self.taken.take(token_ids, reason)
        attempt = self.course.attempt
        attempt.tokens += count
        commands: list[Command] = []
        if count:
            if attempt.first_token_at is None:
                attempt.first_token_at = now
            if self.first_token_at is None:
                self.first_token_at = now
            commands.append(Emit(token_ids[:count], logprobs[:count], text))
        return commands if reason is None else commands + self._finish(reason, now)

    # Ends

    def _finish(self, reason: FinishReason, now: float) -> list[Command]:
        rest, reason = self.taken.finish(reason)
        commands: list[Command] = [Emit((), (), rest)] if rest else []
        return self._end(now, [*commands, *self._abandon_all(), Finish(reason)])

    def _gone(self, course: Course, event: ClientGone, now: float) -> list[Command]:
        return self._end(now, self._abandon_all(event.reason))

    def _late(self, course: Course, event: DeadlinePassed, now: float) -> list[Command]:
        waited = now - self.arrived
        error = DeadlineError(
            f"the deadline passed after {waited:.3f} s, waiting for {self.state.value}, "
            f"with {len(self.output)} tokens generated",
            tokens=len(self.output),
        )
        return self._end(now, [*self._abandon_all(error.reason), Fail(error)])

    def _abandon_all(self, reason: str = "") -> list[Command]:
        """Rule 4. `reason`: why the request ends, if it is no worker's doing and no good end."""
        return [command for course in self._courses() for command in self._abandon(course, reason)]

    def _abandon(self, course: Course, reason: str = "") -> list[Command]:
        report = course.report(reason=reason)
        if course.state is State.PLACING:
            # The coordinator may have booked room already, with its answer on the way.
            return [CancelPlace(course.placed_as), report]
        return [*self._leave(course), report]

    def _leave(self, course: Course) -> list[Command]:
        """Rule 4, but for the report."""
        attempt, commands = course.attempt, list[Command]()
        placement = attempt.placement
        if attempt.prefill_runs:
            commands.append(CancelPrefill(course.number))
        if attempt.decode_runs:
            commands.append(CancelDecode(course.number, placement.decode))
        if attempt.leased and placement.prefill is not None:
            commands.append(Release(course.number, placement.prefill))
        return commands

    def _end(self, now: float, commands: list[Command]) -> list[Command]:
        self.course.state = State.ENDED
        self.successor = None
        self.ended_at = now
        return commands


_NOT_FINISHED = (FinishReason.ERROR, FinishReason.CANCELLED)

_Act = Callable[[Request, Course, Any, float], list[Command]]

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
