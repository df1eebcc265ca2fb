"""Explanations as generated messages, and as attributes of a span."""

from __future__ import annotations

from services.coordinator.core.explain import Considered, Record
from services.coordinator.wire import WIRE_ROLES
from tandem.coordinator.v1 import coordinator_pb2 as pb


def explanation_to(record: Record, now: float) -> pb.Explanation:
    """One attempt, as it is known at time `now` of the core's clock."""
    want, end = record.want, record.end
    until = record.waited_until(now)
    message = pb.Explanation(
        attempt=want.attempt,
        asked_seconds_ago=max(0.0, now - record.asked),
        wanted=pb.Wanted(
            model=want.model,
            tenant=want.tenant,
            priority=want.priority,
            session=want.session,
            adapter=want.adapter,
            context_tokens=want.context_tokens,
            max_tokens=want.max_tokens,
            deadline_seconds=0.0 if record.deadline is None else record.deadline - record.asked,
            ttft_seconds=want.ttft_seconds,
            itl_seconds=want.itl_seconds,
            exclude_workers=sorted(want.exclude_workers),
            allowed_regions=sorted(want.allowed_regions),
        ),
        considered=[_considered_to(one) for one in record.considered],
        queued_seconds=max(0.0, until - record.asked),
        outcome=record.outcome,
        reasons=record.reasons,
        refusal=record.refusal,
        predicted_ttft_seconds=record.ttft_seconds,
        predicted_itl_seconds=record.itl_seconds,
    )
    ends = [since for _, since in record.waits[1:]] + [until]
    for (why, since), ended in zip(record.waits, ends, strict=False):
        message.waits.add(why=why, seconds=max(0.0, ended - since))
    if end is not None:
        message.ended = True
        message.failed_worker, message.failure = end.failed_worker, end.failure
        message.generated_tokens, message.ttft_seconds = end.generated_tokens, end.ttft_seconds
    return message


def _considered_to(one: Considered) -> pb.Considered:
    return pb.Considered(
        worker_id=one.worker_id,
        role=WIRE_ROLES[one.role],
        chosen=one.chosen,
        rejected=one.rejected,
        score=one.score,
        scores=dict(one.scores),
        cached_tokens=one.cached_tokens,
        prompt_seconds=one.prompt_seconds,
        dp_rank=one.dp_rank,
    )


def attributes(record: Record, now: float) -> dict[str, str | int | float | tuple[str, ...]]:
    """Of the span of a placement: the same, flat."""
    want = record.want
    until = record.waited_until(now)
    return {
        "tandem.request_id": want.request_id,
        "tandem.attempt": want.attempt,
        "tandem.tenant": want.tenant,
        "tandem.priority": want.priority,
        "tandem.context_tokens": want.context_tokens,
        "tandem.place.outcome": record.outcome,
        "tandem.place.refusal": record.refusal,
        "tandem.place.reasons": record.reasons,
        "tandem.place.waits": tuple(why for why, _ in record.waits),
        "tandem.place.queued_seconds": max(0.0, until - record.asked),
        "tandem.place.considered": tuple(_line(one) for one in record.considered),
        "tandem.place.predicted_ttft_seconds": record.ttft_seconds,
        "tandem.place.predicted_itl_seconds": record.itl_seconds,
    }


def _line(one: Considered) -> str:
    if one.rejected:
        return f"{one.role.value} {one.worker_id}: out, {one.rejected}"
    parts = " ".join(f"{name}={value:.2f}" for name, value in one.scores)
    won = " chosen" if one.chosen else ""
    return f"{one.role.value} {one.worker_id}:{won} {one.score:.3f} ({parts})"
