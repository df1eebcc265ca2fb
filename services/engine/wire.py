"""Between generated messages and the engine's dataclasses, for both worker processes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict

from kvtransfer.observe import Traffic
from kvtransfer.policy import ExportPolicy
from services.engine.api import (
    EngineFault,
    EngineStats,
    ExpertMap,
    ExpertMove,
    ExpertShape,
    FinishReason,
    Guide,
    GuideKind,
    KvPrefix,
    KvReport,
    PrefixReport,
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


def guide_from(message: generation_pb2.Guide) -> Guide:
    """The form asked for, unchecked. Raises InvalidRequestError if the message has none."""
    form = message.WhichOneof("form")
    match form:
        case None:
            names = ", ".join(kind.value for kind in GuideKind)
            raise InvalidRequestError("sampling.guide", None, f"one of {names} must be set")
        case "choice":
            return Guide(GuideKind.CHOICE, tuple(message.choice.texts))
        case "json_object":
            return Guide(GuideKind.JSON_OBJECT)
        case _:
            return Guide(GuideKind(form), (getattr(message, form),))


def guide_to(guide: Guide) -> generation_pb2.Guide:
    """The same for the wire."""
    match guide.kind:
        case GuideKind.JSON_SCHEMA:
            return generation_pb2.Guide(json_schema=guide.texts[0])
        case GuideKind.REGEX:
            return generation_pb2.Guide(regex=guide.texts[0])
        case GuideKind.GRAMMAR:
            return generation_pb2.Guide(grammar=guide.texts[0])
        case GuideKind.CHOICE:
            return generation_pb2.Guide(choice=generation_pb2.Choice(texts=guide.texts))
        case GuideKind.JSON_OBJECT:
            return generation_pb2.Guide(json_object=generation_pb2.JsonObject())
        case GuideKind.FRAME:
            return generation_pb2.Guide(frame=guide.texts[0])


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
        guide=guide_from(s.guide) if s.HasField("guide") else None,
        logit_bias=_bias_from(s, vocabulary) if s.logit_bias else (),
    )
    return Request(
        request_id=message.request_id,
        prompt_token_ids=tuple(message.prompt_token_ids),
        output_token_ids=tuple(message.output_token_ids),
        sampling=sampling,
        tenant=message.tenant,
        adapter=message.adapter,
    )


def _bias_from(
    message: generation_pb2.SamplingParams, vocabulary: int
) -> tuple[tuple[int, float], ...]:
    bias = tuple(sorted(message.logit_bias.items()))
    if bias[-1][0] >= vocabulary:
        allowed = f"ids are below {vocabulary}"
        raise InvalidRequestError("request.sampling.logit_bias", bias[-1][0], allowed)
    if not all(math.isfinite(value) for _, value in bias):
        raise InvalidRequestError("request.sampling.logit_bias", "no number", "numbers")
    return bias


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


def prefix_from(message: generation_pb2.KvPrefix) -> KvPrefix | None:
    """Who holds a prompt's start; None if the message names nobody."""
    if not message.address:
        return None
    return KvPrefix(message.worker_id, message.address, message.tokens)


def prefix_to(prefix: KvPrefix) -> generation_pb2.KvPrefix:
    """The same for the wire."""
    return generation_pb2.KvPrefix(
        worker_id=prefix.worker_id, address=prefix.address, tokens=prefix.tokens
    )


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
        lost=report.lost,
        why=report.why,
        prefix=None if report.prefix is None else _prefix_report_to(report.prefix),
    )


def _prefix_report_to(report: PrefixReport) -> generation_pb2.PrefixReport:
    return generation_pb2.PrefixReport(
        worker_id=report.worker_id,
        tokens=report.tokens,
        fetch_seconds=report.fetch_seconds,
        compute_seconds=report.compute_seconds,
        seconds=report.seconds,
        reason=report.reason,
    )


def kv_from(message: generation_pb2.KvReport) -> KvReport:
    """The same from the wire."""
    return KvReport(
        transport=message.transport,
        bytes=message.bytes,
        blocks=message.blocks,
        seconds=message.seconds,
        exposed_seconds=message.exposed_seconds,
        cached_tokens=message.cached_tokens,
        computed_tokens=message.computed_tokens,
        corrupt_blocks=message.corrupt_blocks,
        lost=message.lost,
        why=message.why,
        prefix=_prefix_report_from(message.prefix) if message.HasField("prefix") else None,
    )


def _prefix_report_from(message: generation_pb2.PrefixReport) -> PrefixReport:
    return PrefixReport(
        worker_id=message.worker_id,
        tokens=message.tokens,
        fetch_seconds=message.fetch_seconds,
        compute_seconds=message.compute_seconds,
        seconds=message.seconds,
        reason=message.reason,
    )


def fault_to(fault: EngineFault) -> generation_pb2.Error:
    """An error inside a stream that goes on for others."""
    return generation_pb2.Error(reason=fault.reason, message=fault.message, metadata=fault.metadata)


def rules_to(policy: ExportPolicy) -> coordinator_pb2.ExportRules | None:
    """Where a worker's KV may go, for the coordinator; None: anywhere."""
    regions = policy.regions
    if regions is None and not policy.tenant_regions:
        return None
    rules = coordinator_pb2.ExportRules()
    if regions is not None:
        rules.regions.names.extend(sorted(regions))
    for tenant, names in policy.tenant_regions.items():
        rules.tenant_regions[tenant].names.extend(names)
    return rules


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
        kv_traffic=[_traffic_to(traffic) for traffic in stats.kv_traffic],
        kv_refused=stats.kv_refused,
        leases_expired=stats.leases_expired,
        kv_tiers=[coordinator_pb2.KvTier(**asdict(tier)) for tier in stats.kv_tiers],
        ranks=[coordinator_pb2.RankStats(**asdict(rank)) for rank in stats.ranks],
        adapters=stats.adapters,
        expert_tokens=stats.expert_tokens,
        expert_map=None if stats.expert_map is None else _map_to(stats.expert_map),
        draft_tokens=stats.draft_tokens,
        accepted_tokens=stats.accepted_tokens,
        decode_steps=stats.decode_steps,
    )


def shape_to(shape: ExpertShape) -> coordinator_pb2.ExpertShape:
    """How a worker's experts can be placed, for the coordinator."""
    return coordinator_pb2.ExpertShape(**asdict(shape))


def plan_from(message: coordinator_pb2.ExpertPlan) -> tuple[ExpertMap, tuple[ExpertMove, ...]]:
    """Where experts are to be, and the copies that bring them there."""
    moves = (ExpertMove(m.layer, m.expert, m.from_place, m.to_place) for m in message.moves)
    return ExpertMap(tuple(message.map.physical_to_logical), message.plan), tuple(moves)


def _map_to(experts: ExpertMap) -> coordinator_pb2.ExpertMap:
    return coordinator_pb2.ExpertMap(
        physical_to_logical=experts.physical_to_logical, plan=experts.plan
    )


def _traffic_to(traffic: Traffic) -> coordinator_pb2.KvTraffic:
    return coordinator_pb2.KvTraffic(
        transport=traffic.transport,
        peer=traffic.peer,
        why=traffic.why,
        **asdict(traffic.figures),
    )
