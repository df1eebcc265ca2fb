"""A request's attempts: what is kept about each while it runs and after."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from services.engine.api import KvReport
from services.frontend.events import Placement, Report, Role
from services.frontend.patience import Debt, Owed


class State(enum.Enum):
    """Whom a request waits for."""

    PLACING = "the coordinator"
    PROMPT = "the prefill worker"
    DECODING = "the decode worker"
    ENDED = "nobody"


@dataclass(slots=True)
class Attempt:
    """One placement of the request, and what came of it. Times: seconds of one clock."""

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
    moving: bool = False
    placed_at: float = 0.0
    first_token_at: float | None = None


@dataclass(slots=True)
class Course:
    """A way to the tokens that are missing: a placement that is wanted, then an attempt at work.

    `number` is what workers and their events know it by, `placed_as` what the coordinator does:
    another one after a round that was begun anew on the same worker (moving.py). `at`: index in
    the request's output of the token that it brings next. `owed_since`: when it last moved on.
    `spoke`: this round brought a token from the decode worker.
    """

    number: int
    placed_as: int
    state: State = State.PLACING
    placed: Attempt | None = None
    at: int = 0
    rounds: int = 0
    owed_since: float = 0.0
    spoke: bool = False

    @property
    def attempt(self) -> Attempt:
        """What was placed. Not while PLACING."""
        assert self.placed is not None
        return self.placed

    def begin(self, attempt: Attempt, at: int, now: float) -> None:
        """The coordinator has chosen; the worker gets `at` tokens of output as context."""
        self.placed, self.at, self.owed_since = attempt, at, now
        attempt.decode_runs = True
        attempt.prefill_runs = attempt.placement.prefill is not None
        self.state = State.PROMPT if attempt.prefill_runs else State.DECODING

    def begin_again(self, number: int, at: int, now: float) -> None:
        """On the same decode worker, under another number, with more tokens as context."""
        self.number, self.at, self.owed_since = number, at, now
        self.rounds += 1
        self.spoke = False
        self.attempt.decode_runs = True

    def report(self, worker_id: str = "", reason: str = "", unreachable: bool = False) -> Report:
        """What the coordinator is told when it is over."""
        attempt = self.placed
        if attempt is None:
            return Report(self.placed_as, worker_id, reason, unreachable)
        first = attempt.first_token_at
        kv = (attempt.prefill_kv, attempt.decode_kv)
        return Report(
            self.placed_as,
            worker_id,
            reason,
            unreachable,
            generated_tokens=attempt.tokens,
            ttft_seconds=0.0 if first is None else first - attempt.placed_at,
            computed_tokens=sum(k.computed_tokens for k in kv if k is not None),
        )

    def debts(self) -> list[Debt]:
        """What its workers owe it."""
        if self.state not in (State.PROMPT, State.DECODING):
            return []
        attempt = self.attempt
        placement, tokens = attempt.placement, attempt.context_tokens
        ttft = placement.predicted_ttft_seconds

        def debt(role: Role, owed: Owed, predicted: float = 0.0) -> Debt:
            worker = placement.prefill if role is Role.PREFILL else placement.decode
            assert worker is not None
            return Debt(self.number, role, worker, owed, self.owed_since, tokens, predicted)

        if self.state is State.PROMPT:
            if not attempt.accepted:
                return [debt(Role.PREFILL, Owed.ACCEPTANCE)]
            return [debt(Role.PREFILL, Owed.PROMPT, ttft)]
        if self.spoke:
            return [debt(Role.DECODE, Owed.TOKEN, placement.predicted_itl_seconds)]
        if placement.prefill is None:
            return [debt(Role.DECODE, Owed.PROMPT, ttft)]
        source = [debt(Role.PREFILL, Owed.KV)] if attempt.leased else []
        return [*source, debt(Role.DECODE, Owed.FIRST_TOKEN)]
