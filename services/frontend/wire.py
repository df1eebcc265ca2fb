"""Between generated messages and the frontend's dataclasses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import grpc

from services.engine.api import KvPrefix, Sampling, TokenLogprob
from services.engine.wire import (
    FINISH,
    guide_from,
    guide_to,
    kv_from,
    kv_to,
    prefix_from,
    prefix_to,
)
from services.frontend.chat import Chat, Turn
from services.frontend.events import DecodeOutput, Placement, PrefillDone, Worker
from services.frontend.request import Request
from services.frontend.served import ServedAdapter, ServedModel
from services.frontend.usage import cached_tokens
from services.frontend.validate import Asked, AskedSampling, Prompt, Tokens, check_messages
from services.runtime.errors import DeadlineError, TandemError, WorkerLostError, by_reason, from_rpc
from tandem.coordinator.v1 import coordinator_pb2
from tandem.decode.v1 import decode_pb2
from tandem.generation.v1 import generation_pb2
from tandem.inference.v1 import inference_pb2
from tandem.prefill.v1 import prefill_pb2

_FINISH_FROM = {wire: reason for reason, wire in FINISH.items()}

_OPTIONAL = (
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
    "logprobs",
)


# From clients


def asked_from(message: inference_pb2.GenerateRequest, most_messages: int) -> Asked:
    """What the client sent, unchecked.

    Raises InvalidRequestError for a guide without a form, and for too many messages.
    """
    asked: Prompt | Chat | Tokens | None = None
    match message.WhichOneof("input"):
        case "prompt":
            asked = Prompt(message.prompt)
        case "chat":
            check_messages("chat.messages", len(message.chat.messages), most_messages)
            asked = Chat(tuple(Turn(m.role, m.content) for m in message.chat.messages))
        case "tokens":
            asked = Tokens(tuple(message.tokens.token_ids))
    s = message.sampling
    given = {name: getattr(s, name) for name in _OPTIONAL if s.HasField(name)}  # type: ignore[arg-type]
    sampling = AskedSampling(
        stop_token_ids=tuple(s.stop_token_ids),
        ignore_eos=s.ignore_eos,
        guide=guide_from(s.guide) if s.HasField("guide") else None,
        logit_bias=dict(s.logit_bias),
        **given,
    )
    level = message.service_level
    return Asked(
        message.model,
        asked,
        sampling,
        tuple(message.stop),
        message.request_id,
        message.priority,
        message.session,
        level.ttft_seconds,
        level.itl_seconds,
        adapter=message.adapter,
    )


# To clients


def usage_to(request: Request) -> inference_pb2.Usage:
    """Tokens of an ended request, counted."""
    prompt = request.limits.prompt_tokens
    return inference_pb2.Usage(
        prompt_tokens=prompt,
        completion_tokens=len(request.output),
        cached_tokens=cached_tokens(prompt, request.attempts),
    )


def route_to(request: Request) -> inference_pb2.Route:
    """Where an ended request ran."""
    attempts = []
    for attempt in request.attempts:
        placement = attempt.placement
        decode_kv, prefill_kv = attempt.decode_kv, attempt.prefill_kv
        attempts.append(
            inference_pb2.RouteAttempt(
                prefill_worker=placement.prefill.worker_id if placement.prefill else "",
                decode_worker=placement.decode.worker_id,
                reasons=placement.reasons,
                tokens=attempt.tokens,
                failure=attempt.failure,
                kv=None if decode_kv is None else kv_to(decode_kv),
                prefill_kv=None if prefill_kv is None else kv_to(prefill_kv),
            )
        )
    return inference_pb2.Route(
        attempts=attempts,
        placement_seconds=_since(request.arrived, request.placed_at),
        ttft_seconds=_since(request.arrived, request.first_token_at),
        total_seconds=_since(request.arrived, request.ended_at),
    )


def _since(start: float, then: float | None) -> float:
    return 0.0 if then is None else then - start


# To workers


def sampling_to(sampling: Sampling) -> generation_pb2.SamplingParams:
    """Every field set."""
    return generation_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        stop_token_ids=sampling.stop_token_ids,
        seed=sampling.seed,
        logprobs=sampling.logprobs,
        ignore_eos=sampling.ignore_eos,
        guide=None if sampling.guide is None else guide_to(sampling.guide),
        logit_bias=dict(sampling.logit_bias),
    )


def token_request(
    attempt_id: str,
    prompt: Sequence[int],
    output: Sequence[int],
    sampling: generation_pb2.SamplingParams,
    tenant: str = "",
    adapter: str = "",
) -> generation_pb2.TokenRequest:
    """An attempt as workers see it."""
    return generation_pb2.TokenRequest(
        request_id=attempt_id,
        prompt_token_ids=prompt,
        output_token_ids=output,
        sampling=sampling,
        tenant=tenant,
        adapter=adapter,
    )


def prefill_request(
    request: generation_pb2.TokenRequest, worker: Worker, prefix: KvPrefix | None
) -> prefill_pb2.PrefillRequest:
    """An attempt for a prefill worker."""
    return prefill_pb2.PrefillRequest(
        request=request,
        prefix=None if prefix is None else prefix_to(prefix),
        dp_rank=worker.dp_rank,
    )


def start_message(
    request: generation_pb2.TokenRequest,
    worker: Worker,
    source: Worker | None,
    prefix: KvPrefix | None,
    deadline_ms: int,
) -> decode_pb2.DecodeRequest:
    """An attempt for a decode worker. Its lease at the source has the attempt's id."""
    start = decode_pb2.Start(request=request, dp_rank=worker.dp_rank, deadline_ms=deadline_ms)
    if source is not None:
        start.source.worker_id = source.worker_id
        start.source.address = source.address
        start.source.lease_id = request.request_id
    elif prefix is not None:
        start.prefix.CopyFrom(prefix_to(prefix))
    return decode_pb2.DecodeRequest(start=start)


def proceed_message(
    attempt_id: str, token_ids: tuple[int, ...], handle: bytes
) -> decode_pb2.DecodeRequest:
    """The first tokens."""
    proceed = decode_pb2.Proceed(request_id=attempt_id, token_ids=token_ids, handle=handle)
    return decode_pb2.DecodeRequest(proceed=proceed)


def cancel_message(attempt_id: str) -> decode_pb2.DecodeRequest:
    """Drop it."""
    return decode_pb2.DecodeRequest(cancel=decode_pb2.Cancel(request_id=attempt_id))


# From workers


def output_from(number: int, message: decode_pb2.RequestOutput) -> DecodeOutput:
    """One request's share of an engine step, as an event of that attempt."""
    error = None
    if message.HasField("error"):
        e = message.error
        error = by_reason(e.reason, e.message, e.metadata)
    return DecodeOutput(
        number,
        tuple(message.token_ids),
        _logprobs_from(message.logprobs) if message.logprobs else (),
        _FINISH_FROM.get(message.finish_reason),
        error,
        kv_from(message.kv) if message.HasField("kv") else None,
        message.moving,
    )


def done_from(number: int, message: prefill_pb2.PrefillDone) -> PrefillDone:
    """The end of a prompt, as an event of that attempt."""
    return PrefillDone(
        number,
        tuple(message.token_ids),
        _logprobs_from(message.logprobs),
        _FINISH_FROM.get(message.finish_reason),
        message.handle,
        kv_from(message.kv) if message.HasField("kv") else None,
    )


def _logprobs_from(items: Iterable[generation_pb2.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            item.token_id, item.logprob, tuple((top.token_id, top.logprob) for top in item.top)
        )
        for item in items
    )


# From the coordinator


def placement_from(message: coordinator_pb2.PlaceResponse) -> Placement:
    """Where to go."""
    prefill = _worker_from(message.prefill) if message.HasField("prefill") else None
    return Placement(
        _worker_from(message.decode),
        prefill,
        tuple(message.reasons),
        prefix_from(message.prefix),
        message.predicted_ttft_seconds,
        message.predicted_itl_seconds,
    )


def _worker_from(message: coordinator_pb2.PlacedWorker) -> Worker:
    return Worker(message.worker_id, message.address, message.cached_tokens, message.dp_rank)


def models_from(message: coordinator_pb2.GetModelsResponse) -> tuple[ServedModel, ...]:
    """What is served."""
    return tuple(
        ServedModel(
            name=m.model,
            kv_layout=m.kv_layout,
            block_tokens=m.block_tokens,
            context_tokens=m.context_tokens,
            prefill_workers=m.prefill_workers,
            decode_workers=m.decode_workers,
            adapters=tuple(
                ServedAdapter(a.id, a.decode_workers, a.current_workers) for a in m.adapters
            ),
            numerics=tuple(m.numerics),
        )
        for m in message.models
    )


def failure_of(error: grpc.aio.AioRpcError, who: str) -> tuple[TandemError, bool]:
    """A failed call to a worker as its error, and whether the worker could not be reached."""
    told = from_rpc(error)
    if told is not None:
        return told, False
    code = error.code()
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineError(f"the deadline passed while {who} had the request"), False
    lost = WorkerLostError(f"{who}: {code.name}: {error.details()}", worker=who)
    return lost, code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN)
