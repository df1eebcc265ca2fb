"""What coordinators remember of a request, for whoever asks why it went where it did."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tandem.coordinator.v1 import coordinator_pb2 as pb


@dataclass(frozen=True, slots=True)
class Considered:
    """A worker that was looked at; fields as in coordinator.proto."""

    worker_id: str
    role: str
    chosen: bool
    rejected: str
    score: float
    scores: dict[str, float]
    cached_tokens: int
    prompt_seconds: float
    dp_rank: int


@dataclass(frozen=True, slots=True)
class Decision:
    """One attempt at placing the request; fields as Explanation and Wanted in coordinator.proto."""

    coordinator_id: str
    attempt: int
    asked_seconds_ago: float
    model: str
    tenant: str
    priority: int
    session: str
    adapter: str
    context_tokens: int
    max_tokens: int
    deadline_seconds: float
    wanted_ttft_seconds: float
    wanted_itl_seconds: float
    exclude_workers: tuple[str, ...]
    allowed_regions: tuple[str, ...]
    waits: tuple[tuple[str, float], ...]
    """Why, and for how many seconds."""
    considered: tuple[Considered, ...]
    queued_seconds: float
    outcome: str
    reasons: tuple[str, ...]
    refusal: str
    predicted_ttft_seconds: float
    predicted_itl_seconds: float
    ended: bool
    failed_worker: str
    failure: str
    generated_tokens: int
    ttft_seconds: float


def decisions_from(answers: Iterable[pb.ExplainResponse]) -> list[Decision]:
    """All that several coordinators remember of one request, in order."""
    found = [_decision(a, answer.coordinator_id) for answer in answers for a in answer.attempts]
    return sorted(found, key=lambda d: (d.attempt, -d.asked_seconds_ago))


def _decision(e: pb.Explanation, coordinator_id: str) -> Decision:
    w = e.wanted
    return Decision(
        coordinator_id=coordinator_id,
        attempt=e.attempt,
        asked_seconds_ago=e.asked_seconds_ago,
        model=w.model,
        tenant=w.tenant,
        priority=w.priority,
        session=w.session,
        adapter=w.adapter,
        context_tokens=w.context_tokens,
        max_tokens=w.max_tokens,
        deadline_seconds=w.deadline_seconds,
        wanted_ttft_seconds=w.ttft_seconds,
        wanted_itl_seconds=w.itl_seconds,
        exclude_workers=tuple(w.exclude_workers),
        allowed_regions=tuple(w.allowed_regions),
        waits=tuple((wait.why, wait.seconds) for wait in e.waits),
        considered=tuple(_considered(c) for c in e.considered),
        queued_seconds=e.queued_seconds,
        outcome=e.outcome,
        reasons=tuple(e.reasons),
        refusal=e.refusal,
        predicted_ttft_seconds=e.predicted_ttft_seconds,
        predicted_itl_seconds=e.predicted_itl_seconds,
        ended=e.ended,
        failed_worker=e.failed_worker,
        failure=e.failure,
        generated_tokens=e.generated_tokens,
        ttft_seconds=e.ttft_seconds,
    )


def _considered(c: pb.Considered) -> Considered:
    return Considered(
        worker_id=c.worker_id,
        role=pb.WorkerRole.Name(c.role).removeprefix("WORKER_ROLE_").lower(),
        chosen=c.chosen,
        rejected=c.rejected,
        score=c.score,
        scores=dict(c.scores),
        cached_tokens=c.cached_tokens,
        prompt_seconds=c.prompt_seconds,
        dp_rank=c.dp_rank,
    )
