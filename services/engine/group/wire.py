"""Between the group's messages and the engine's dataclasses, for leader and ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace

from kvtransfer.keys import KEY_BYTES
from kvtransfer.observe import Figures, Traffic
from kvtransfer.tiers.base import TierStats
from kvtransfer.wire import layout_of, layout_to
from services.engine.adapters import Adapter
from services.engine.api import (
    EngineFault,
    EngineInfo,
    EngineStats,
    ExpertMap,
    ExpertMove,
    ExpertShape,
    FirstTokens,
    Hold,
    KvEvents,
    KvPrefix,
    KvSource,
    RankStats,
    Request,
    Sampling,
    TokenLogprob,
    TokenOutput,
)
from services.engine.wire import (
    FINISH,
    fault_to,
    guide_to,
    kv_from,
    kv_to,
    logprobs_to,
    prefix_from,
    prefix_to,
    request_from,
    shape_to,
)
from tandem.coordinator.v1 import coordinator_pb2
from tandem.generation.v1 import generation_pb2
from tandem.group.v1 import group_pb2 as pb

_FINISH_FROM = {number: reason for reason, number in FINISH.items()}

# Requests


def _request_to(request: Request) -> generation_pb2.TokenRequest:
    s = request.sampling
    return generation_pb2.TokenRequest(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=request.output_token_ids,
        sampling=_sampling_to(s),
        tenant=request.tenant,
        adapter=request.adapter,
    )


def _sampling_to(s: Sampling) -> generation_pb2.SamplingParams:
    return generation_pb2.SamplingParams(
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
        min_p=s.min_p,
        repetition_penalty=s.repetition_penalty,
        presence_penalty=s.presence_penalty,
        frequency_penalty=s.frequency_penalty,
        max_tokens=s.max_tokens,
        min_tokens=s.min_tokens,
        stop_token_ids=s.stop_token_ids,
        seed=s.seed,
        logprobs=s.logprobs,
        ignore_eos=s.ignore_eos,
        guide=None if s.guide is None else guide_to(s.guide),
        logit_bias=dict(s.logit_bias),
    )


def prefill_to(request: Request, hold: Hold, prefix: KvPrefix | None) -> pb.JoinResponse:
    """To a rank."""
    return pb.JoinResponse(
        prefill=pb.Prefill(
            request=_request_to(request),
            hold_seconds=hold.seconds,
            deadline_seconds=request.deadline_seconds,
            prefix=None if prefix is None else prefix_to(prefix),
        )
    )


def prefill_from(message: pb.Prefill, vocabulary: int) -> tuple[Request, Hold, KvPrefix | None]:
    """At a rank. Raises InvalidRequestError."""
    request = _timed(message, request_from(message.request, vocabulary))
    return request, Hold(message.hold_seconds), prefix_from(message.prefix)


def decode_to(
    request: Request, source: KvSource | None, prefix: KvPrefix | None
) -> pb.JoinResponse:
    """To a rank."""
    return pb.JoinResponse(
        decode=pb.Decode(
            request=_request_to(request),
            source=None if source is None else pb.KvSource(**asdict(source)),
            deadline_seconds=request.deadline_seconds,
            prefix=None if prefix is None else prefix_to(prefix),
        )
    )


def decode_from(
    message: pb.Decode, vocabulary: int
) -> tuple[Request, KvSource | None, KvPrefix | None]:
    """At a rank. Raises InvalidRequestError."""
    request, source = _timed(message, request_from(message.request, vocabulary)), None
    if message.HasField("source"):
        s = message.source
        source = KvSource(s.worker_id, s.address, s.lease_id)
    return request, source, prefix_from(message.prefix)


def _timed(message: pb.Prefill | pb.Decode, request: Request) -> Request:
    if not message.HasField("deadline_seconds"):
        return request
    return replace(request, deadline_seconds=message.deadline_seconds)


def proceed_to(request_id: str, first: FirstTokens) -> pb.JoinResponse:
    """To a rank."""
    return pb.JoinResponse(
        proceed=pb.Proceed(request_id=request_id, token_ids=first.token_ids, handle=first.handle)
    )


def plan_to(plan: ExpertMap, moves: Iterable[ExpertMove]) -> pb.JoinResponse:
    """To a rank."""
    return pb.JoinResponse(
        expert_plan=coordinator_pb2.ExpertPlan(
            plan=plan.plan,
            map=coordinator_pb2.ExpertMap(
                physical_to_logical=plan.physical_to_logical, plan=plan.plan
            ),
            moves=[coordinator_pb2.ExpertMove(**asdict(move)) for move in moves],
        )
    )


# Outputs


def output_to(output: TokenOutput, number: int) -> pb.Output:
    """To the leader, of the request that it gave as this one."""
    return pb.Output(
        number=number,
        request_id=output.request_id,
        token_ids=output.token_ids,
        logprobs=logprobs_to(output.logprobs),
        finish_reason=FINISH[output.finish_reason],
        error=None if output.error is None else fault_to(output.error),
        kv=None if output.kv is None else kv_to(output.kv),
        prefill_done=output.prefill_done,
        handle=output.handle,
    )


def output_from(message: pb.Output) -> TokenOutput:
    """At the leader."""
    return TokenOutput(
        request_id=message.request_id,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(
            TokenLogprob(x.token_id, x.logprob, tuple((t.token_id, t.logprob) for t in x.top))
            for x in message.logprobs
        ),
        finish_reason=_FINISH_FROM[message.finish_reason],
        error=fault_from(message.error) if message.HasField("error") else None,
        kv=kv_from(message.kv) if message.HasField("kv") else None,
        prefill_done=message.prefill_done,
        handle=message.handle,
    )


def fault_from(message: generation_pb2.Error) -> EngineFault:
    """At the leader."""
    return EngineFault(message.reason, message.message, dict(message.metadata))


# What ranks are and how they do


def info_to(info: EngineInfo) -> pb.EngineInfo:
    """To the leader."""
    return pb.EngineInfo(
        model=info.model,
        layout=layout_to(info.layout),
        context_tokens=info.context_tokens,
        total_blocks=info.total_blocks,
        max_running=info.max_running,
        vocabulary=info.vocabulary,
        eos_token_ids=info.eos_token_ids,
        numerics=info.numerics,
        kv_transports=info.kv_transports,
        kv_not_offered=info.kv_not_offered,
        experts=None if info.experts is None else shape_to(info.experts),
    )


def info_from(message: pb.EngineInfo) -> EngineInfo:
    """At the leader."""
    shape = message.experts
    names = ExpertShape.__dataclass_fields__
    return EngineInfo(
        model=message.model,
        layout=layout_of(message.layout),
        context_tokens=message.context_tokens,
        total_blocks=message.total_blocks,
        max_running=message.max_running,
        vocabulary=message.vocabulary,
        eos_token_ids=tuple(message.eos_token_ids),
        numerics=message.numerics,
        kv_transports=tuple(message.kv_transports),
        kv_not_offered=dict(message.kv_not_offered),
        experts=ExpertShape(**{name: getattr(shape, name) for name in names})
        if message.HasField("experts")
        else None,
    )


_SAME_STATS = (
    "running",
    "waiting",
    "free_blocks",
    "held_blocks",
    "cached_blocks",
    "queued_tokens",
    "prefill_tokens_per_second",
    "step_seconds",
    "finished",
    "preempted",
    "corrupt_blocks",
    "leases",
    "kv_refused",
    "leases_expired",
    "draft_tokens",
    "accepted_tokens",
    "decode_steps",
)


def stats_from(message: coordinator_pb2.WorkerStats, before: EngineStats) -> EngineStats:
    """At the leader: what a rank reports, and of its experts what it reported `before`."""
    placed = before.expert_map
    if message.HasField("expert_map"):
        found = message.expert_map
        placed = ExpertMap(tuple(found.physical_to_logical), found.plan)
    return EngineStats(
        **{name: getattr(message, name) for name in _SAME_STATS},
        kv_bytes=dict(message.kv_bytes),
        kv_traffic=tuple(_traffic_from(t) for t in message.kv_traffic),
        kv_tiers=tuple(
            TierStats(**{n: getattr(t, n) for n in TierStats.__dataclass_fields__})
            for t in message.kv_tiers
        ),
        ranks=tuple(
            RankStats(**{n: getattr(r, n) for n in RankStats.__dataclass_fields__})
            for r in message.ranks
        ),
        adapters=tuple(message.adapters),
        expert_tokens=tuple(message.expert_tokens) or before.expert_tokens,
        expert_map=placed,
    )


def _traffic_from(message: coordinator_pb2.KvTraffic) -> Traffic:
    figures = Figures(**{n: getattr(message, n) for n in Figures.__dataclass_fields__})
    return Traffic(message.transport, message.peer, figures, message.why)


def events_to(events: KvEvents) -> pb.JoinRequest:
    """To the leader."""
    return pb.JoinRequest(
        kv_events=coordinator_pb2.KvEvents(
            snapshot=events.snapshot,
            stored=b"".join(events.stored),
            removed=b"".join(events.removed),
            lower=b"".join(events.lower),
        )
    )


def events_from(message: coordinator_pb2.KvEvents) -> KvEvents:
    """At the leader."""
    return KvEvents(
        _keys(message.stored), _keys(message.removed), message.snapshot, _keys(message.lower)
    )


def _keys(joined: bytes) -> tuple[bytes, ...]:
    return tuple(joined[at : at + KEY_BYTES] for at in range(0, len(joined), KEY_BYTES))


def adapter_to(adapter: Adapter) -> pb.Adapter:
    """To the leader."""
    return pb.Adapter(id=adapter.id, rank=adapter.rank, bytes=adapter.bytes)


def adapter_from(message: pb.Adapter) -> Adapter:
    """At the leader."""
    return Adapter(message.id, message.rank, message.bytes)
