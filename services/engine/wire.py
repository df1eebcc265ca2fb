"""Between generated messages and the engine's dataclasses, for both worker processes."""

from __future__ import annotations

from collections.abc import Iterable

from services.engine.api import (
    EngineFault,
    EngineStats,
    FinishReason,
    KvReport,
    Request,
    Sampling,
    TokenLogprob,
)
from services.runtime.errors import InvalidRequestError
from tandem.coordinator.v1 import coordinator_pb2
from tandem.generation.v1 import generation_pb2

FINISH = {
    None: generation_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: generation_pb2.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: generation_pb2.FINISH_REASON_ERROR,
}

_SAMPLING_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "max_tokens",
    "min_tokens",
    "seed",
)


def request_from(message: generation_pb2.TokenRequest, vocabulary: int) -> Request:
    """The engine's request. Frontends have validated it; what would break an engine is checked.

    Raises InvalidRequestError naming the field.
    """
    if not message.request_id:
        raise InvalidRequestError("request.request_id", "", "must not be empty")
    if not message.prompt_token_ids:
        raise InvalidRequestError("request.prompt_token_ids", [], "at least one token")
    for field in ("prompt_token_ids", "output_token_ids"):
        highest = max(getattr(message, field), default=0)
        if highest >= vocabulary:
            raise InvalidRequestError(f"request.{field}", highest, f"ids are below {vocabulary}")
    given = {field.name for field, _ in message.sampling.ListFields()}
    for field in _SAMPLING_FIELDS:
        if field not in given:
            raise InvalidRequestError(f"request.sampling.{field}", None, "workers need it set")
    s = message.sampling
    sampling = Sampling(
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
        min_p=s.min_p,
        repetition_penalty=s.repetition_penalty,
        presence_penalty=s.presence_penalty,
        frequency_penalty=s.frequency_penalty,
        max_tokens=s.max_tokens,
        min_tokens=s.min_tokens,
        stop_token_ids=tuple(s.stop_token_ids),
        seed=s.seed,
        logprobs=s.logprobs if s.HasField("logprobs") else None,
        ignore_eos=s.ignore_eos,
    )
    return Request(
        request_id=message.request_id,
        prompt_token_ids=tuple(message.prompt_token_ids),
        output_token_ids=tuple(message.output_token_ids),
        sampling=sampling,
        tenant=message.tenant,
    )


def logprobs_to(items: Iterable[TokenLogprob]) -> list[generation_pb2.TokenLogprob]:
    """Log-probabilities for the wire."""
    return [
        generation_pb2.TokenLogprob(
            token_id=item.token_id,
            logprob=item.logprob,
            top=[generation_pb2.TopLogprob(token_id=t, logprob=p) for t, p in item.top],
        )
        for item in items
    ]


def kv_to(report: KvReport) -> generation_pb2.KvReport:
    """What was done about a prompt's KV, for the wire."""
    return generation_pb2.KvReport(
        transport=report.transport,
        bytes=report.bytes,
        blocks=report.blocks,
        seconds=report.seconds,
        exposed_seconds=report.exposed_seconds,
        cached_tokens=report.cached_tokens,
        computed_tokens=report.computed_tokens,
        corrupt_blocks=report.corrupt_blocks,
    )


def fault_to(fault: EngineFault) -> generation_pb2.Error:
    """An error inside a stream that goes on for others."""
    return generation_pb2.Error(reason=fault.reason, message=fault.message, metadata=fault.metadata)


def stats_to(stats: EngineStats) -> coordinator_pb2.WorkerStats:
    """A worker's load, for the coordinator."""
    return coordinator_pb2.WorkerStats(
        running=stats.running,
        waiting=stats.waiting,
        free_blocks=stats.free_blocks,
        queued_tokens=stats.queued_tokens,
        prefill_tokens_per_second=stats.prefill_tokens_per_second,
        step_seconds=stats.step_seconds,
        held_blocks=stats.held_blocks,
        cached_blocks=stats.cached_blocks,
        finished=stats.finished,
        corrupt_blocks=stats.corrupt_blocks,
        preempted=stats.preempted,
        kv_bytes=stats.kv_bytes,
        leases=stats.leases,
    )
