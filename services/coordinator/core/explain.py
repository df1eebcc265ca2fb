"""What is remembered of decisions, so that each can be explained: a ring of the latest.

A record is opened when a request asks, and follows it until its end is reported. It keeps what the
decision looked at as it was then (figures, not workers), and nothing of the prompt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from services.coordinator.core.messages import AttemptEnded, PlaceRequest, Refusal, Role

CONSIDERED = 8
"""Workers of a role that are remembered of a decision, the best first."""

WAITS = 16
"""Reasons for waiting that are remembered of a request; the latest are kept."""


@dataclass(frozen=True, slots=True)
class Considered:
    """A worker that was looked at; fields as in coordinator.proto."""

    worker_id: str
    role: Role
    chosen: bool = False
    rejected: str = ""
    score: float = 0.0
    scores: tuple[tuple[str, float], ...] = ()
    cached_tokens: int = 0
    prompt_seconds: float = 0.0
    dp_rank: int = 0


@dataclass(slots=True)
class Record:
    """One attempt at placing a request. Times are the core's."""

    want: PlaceRequest
    """Without its block keys."""
    asked: float
    deadline: float | None
    outcome: str = "waiting"
    answered: float | None = None
    waits: list[tuple[str, float]] = field(default_factory=list)
    """What it waited for, and from when on."""
    considered: tuple[Considered, ...] = ()
    reasons: tuple[str, ...] = ()
    refusal: str = ""
    ttft_seconds: float = 0.0
    itl_seconds: float = 0.0
    end: AttemptEnded | None = None

    def waited_until(self, now: float) -> float:
        """When it was answered; `now` if it is not yet."""
        return now if self.answered is None else self.answered


class Explanations:
    """The latest `limit` attempts, by request."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._records: OrderedDict[tuple[str, int], Record] = OrderedDict()
        self._attempts: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self._records)

    def of(self, request_id: str) -> list[Record]:
        """The attempts remembered of a request, in order."""
        attempts = self._attempts.get(request_id, ())
        return [self._records[request_id, number] for number in sorted(attempts)]

    def get(self, request_id: str, attempt: int) -> Record | None:
        """One attempt."""
        return self._records.get((request_id, attempt))

    def asked(self, want: PlaceRequest, now: float, deadline: float | None) -> None:
        """A request asks. The same attempt asked for again is explained anew."""
        key = (want.request_id, want.attempt)
        if self._limit == 0:
            return
        if key not in self._records:
            self._attempts.setdefault(want.request_id, []).append(want.attempt)
        self._records[key] = Record(replace(want, block_keys=()), now, deadline)
        self._records.move_to_end(key)
        if len(self._records) > self._limit:
            self._forget()

    def waiting(self, want: PlaceRequest, why: str, now: float) -> bool:
        """It can't be placed now. False, and nothing is noted, while the reason stays the same."""
        record = self._open(want)
        if record is None or (record.waits and record.waits[-1][0] == why):
            return False
        record.waits.append((why, now))
        del record.waits[:-WAITS]
        return True

    def considered(self, want: PlaceRequest, some: Sequence[Considered]) -> None:
        """The workers that the last decision looked at."""
        record = self._open(want)
        if record is not None:
            record.considered = tuple(some)

    def placed(
        self,
        want: PlaceRequest,
        reasons: tuple[str, ...],
        ttft_seconds: float,
        itl_seconds: float,
        now: float,
    ) -> None:
        """It has its workers."""
        record = self._close(want, "placed", now)
        if record is not None:
            record.reasons = reasons
            record.ttft_seconds, record.itl_seconds = ttft_seconds, itl_seconds

    def refused(self, want: PlaceRequest, refusal: Refusal, now: float) -> None:
        """It will have none."""
        record = self._close(want, "refused", now)
        if record is not None:
            record.reasons, record.refusal = (refusal.message,), refusal.reason.value

    def cancelled(self, want: PlaceRequest, now: float) -> None:
        """Its frontend waits no more."""
        self._close(want, "cancelled", now)

    def ended(self, end: AttemptEnded) -> None:
        """A placed attempt came to its end."""
        record = self._records.get((end.request_id, end.attempt))
        if record is not None and record.outcome == "placed":
            record.end = end

    def _open(self, want: PlaceRequest) -> Record | None:
        record = self._records.get((want.request_id, want.attempt))
        return record if record is not None and record.outcome == "waiting" else None

    def _close(self, want: PlaceRequest, outcome: str, now: float) -> Record | None:
        record = self._open(want)
        if record is not None:
            record.outcome, record.answered = outcome, now
        return record

    def _forget(self) -> None:
        """The oldest record goes."""
        (request_id, attempt), _ = self._records.popitem(last=False)
        attempts = self._attempts[request_id]
        attempts.remove(attempt)
        if not attempts:
            del self._attempts[request_id]
