"""A small client of a cluster: ask, stream, see what is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from types import TracebackType
from typing import Self

import grpc

from kvtransfer.observe import Figures, Traffic
from kvtransfer.tiers.base import TierStats
from services.runtime.channels import Channels
from services.runtime.errors import InvalidRequestError, from_rpc
from services.runtime.explained import Decision, decisions_from
from tandem.adapters.v1 import adapters_pb2, adapters_pb2_grpc
from tandem.coordinator.v1 import coordinator_pb2, coordinator_pb2_grpc
from tandem.generation.v1 import generation_pb2
from tandem.inference.v1 import inference_pb2, inference_pb2_grpc

CALL_SECONDS = 10.0
"""Deadline of calls that answer at once."""
LOAD_SECONDS = 300.0
"""The same for reading an adapter, which may come from a slow disk."""


class CallFailedError(Exception):
    """A call failed. `reason` is empty when no Tandem server was there to give one."""

    def __init__(self, address: str, code: str, reason: str, message: str) -> None:
        super().__init__(message)
        self.address = address
        self.code = code
        self.reason = reason
        self.message = message

    @property
    def unreachable(self) -> bool:
        """No server answered at all."""
        return not self.reason and self.code == "UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Form:
    """What an answer must look like: `kind` as in Guide of generation.proto, and its texts."""

    kind: str
    texts: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Ask:
    """A request. Exactly one of `chat` and `prompt`; sampling left out takes the server's defaults.

    `sampling` has the fields of SamplingParams in generation.proto.
    """

    chat: Sequence[Turn] = ()
    prompt: str = ""
    model: str = ""
    sampling: dict[str, float | int | bool] = field(default_factory=dict)
    stop: Sequence[str] = ()
    adapter: str = ""
    """LoRA adapter, by name or id."""
    form: Form | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One placement; fields as RouteAttempt and KvReport."""

    prefill_worker: str
    decode_worker: str
    reasons: tuple[str, ...]
    tokens: int
    failure: str
    transport: str
    kv_bytes: int
    kv_blocks: int
    kv_seconds: float
    exposed_seconds: float
    computed_tokens: int
    lost: str = ""
    """Why a fetch did not bring all that it was for."""
    prefix: str = ""
    """What was done about a prefix that another worker holds, and why."""


@dataclass(frozen=True, slots=True)
class End:
    """What the last message of an answer says. Times are the frontend's, in seconds."""

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    ttft_seconds: float
    total_seconds: float
    attempts: tuple[Attempt, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer. `model` and `seed` are set in the first one, `end` in the last."""

    text: str
    token_ids: tuple[int, ...]
    model: str = ""
    seed: int = 0
    end: End | None = None


@dataclass(frozen=True, slots=True)
class Rank:
    """A data-parallel rank of a worker; fields as in RankStats."""

    running: int
    waiting: int
    free_blocks: int


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker as the coordinator sees it; fields as WorkerInfo and WorkerStats."""

    worker_id: str
    role: str
    model: str
    address: str
    pid: int
    running: int
    waiting: int
    free_blocks: int
    cached_blocks: int
    held_blocks: int
    total_blocks: int
    leases: int
    finished: int
    step_seconds: float
    kv_bytes: dict[str, int]
    kv_refused: int
    leases_expired: int
    draining: bool
    silent_seconds: float
    region: str = ""
    kv_transports: tuple[str, ...] = ()
    """Offered, best first."""
    kv_not_offered: dict[str, str] = field(default_factory=dict)
    """Transports that it should offer and can't: why not."""
    kv_traffic: tuple[Traffic, ...] = ()
    """What it fetched: a sum for each transport, then the peers that most came from."""
    kv_tiers: tuple[TierStats, ...] = ()
    """Tiers under its pool, from the top."""
    avoided: str = ""
    """Why it gets only what nobody else can take; empty: it is not avoided."""
    adapters: tuple[str, ...] = ()
    """LoRA adapters that it takes requests with, as name@digest."""
    draft_tokens: int = 0
    accepted_tokens: int = 0
    decode_steps: int = 0
    ranks: tuple[Rank, ...] = ()
    """Its data-parallel ranks, in order; none: it is one."""


@dataclass(frozen=True, slots=True, order=True)
class HeldAdapter:
    """A LoRA adapter of one worker; fields as in adapters.proto."""

    id: str
    name: str
    rank: int
    bytes: int
    requests: int
    leaving: bool


@dataclass(frozen=True, slots=True)
class Status:
    """The cluster as its coordinator sees it."""

    workers: tuple[Worker, ...]
    queued: int
    placed: int
    refused: dict[str, int]
    uptime_seconds: float
    kv_bytes_gone: int = 0
    """Fetched by workers that are gone."""


@dataclass(frozen=True, slots=True)
class Explained:
    """What is remembered of a request, by which of the coordinators `asked`.

    `silent`: why those that did not answer did not.
    """

    decisions: tuple[Decision, ...]
    asked: tuple[str, ...]
    silent: tuple[CallFailedError, ...]


class Client:
    """An async context manager. Every method raises CallFailedError.

    `coordinator` may name several, with commas. stream() also raises InvalidRequestError, for what
    a message can't hold.
    """

    def __init__(self, address: str, coordinator: str = "") -> None:
        self.address = address
        self._coordinators = coordinator.split(",")
        self._channels = Channels()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends all connections."""
        await self._channels.close()

    async def stream(self, ask: Ask, timeout: float | None = None) -> AsyncGenerator[Piece, None]:
        """Yields the answer as it comes. Closing the iterator cancels the request."""
        stub = inference_pb2_grpc.InferenceServiceStub(self._channels.get(self.address))
        request = inference_pb2.StreamGenerateRequest(request=_request(ask))
        call = stub.StreamGenerate(request, timeout=timeout)
        try:
            with _failures(self.address):
                async for message in call:
                    yield _piece(message)
        finally:
            call.cancel()

    async def models(self) -> list[str]:
        """Names of the models served."""
        stub = inference_pb2_grpc.InferenceServiceStub(self._channels.get(self.address))
        with _failures(self.address):
            answer = await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=CALL_SECONDS)
        return [model.name for model in answer.models]

    async def status(self) -> Status:
        """A coordinator's view: of the first that answers, beginning with who did the last time."""
        for address in list(self._coordinators):
            try:
                answer = await self._status_of(address)
                break
            except CallFailedError as error:
                failure = error
                self._coordinators.append(self._coordinators.pop(0))
        else:
            raise failure
        return Status(
            workers=tuple(_worker(worker) for worker in answer.workers),
            queued=answer.queued,
            placed=answer.placed,
            refused=dict(answer.refused),
            uptime_seconds=answer.uptime_seconds,
            kv_bytes_gone=answer.kv_bytes_gone,
        )

    async def adapters(self, worker: str) -> list[HeldAdapter]:
        """What the worker at this address holds."""
        with _failures(worker):
            answer = await self._adapter_service(worker).ListAdapters(
                adapters_pb2.ListAdaptersRequest(), timeout=CALL_SECONDS
            )
        return [_held(adapter) for adapter in answer.adapters]

    async def load_adapter(self, worker: str, name: str, path: str) -> HeldAdapter:
        """Has a worker load an adapter from below its engine.adapter_folder."""
        with _failures(worker):
            answer = await self._adapter_service(worker).LoadAdapter(
                adapters_pb2.LoadAdapterRequest(name=name, path=path), timeout=LOAD_SECONDS
            )
        return _held(answer.adapter)

    async def unload_adapter(self, worker: str, name: str) -> list[HeldAdapter]:
        """Has a worker take no new requests with an adapter; what leaves."""
        with _failures(worker):
            answer = await self._adapter_service(worker).UnloadAdapter(
                adapters_pb2.UnloadAdapterRequest(name=name), timeout=CALL_SECONDS
            )
        return [_held(adapter) for adapter in answer.adapters]

    def _adapter_service(self, worker: str) -> adapters_pb2_grpc.AdapterServiceStub:
        return adapters_pb2_grpc.AdapterServiceStub(self._channels.get(worker))

    async def explain(self, request_id: str) -> Explained:
        """What coordinators remember of a request: each attempt may have asked another one.

        All are asked that were named, and those that they know of.
        """
        answers: dict[str, coordinator_pb2.ExplainResponse] = {}
        asked: list[str] = []
        silent: list[CallFailedError] = []
        new = list(dict.fromkeys(self._coordinators))
        while new:
            asked += new
            told = await asyncio.gather(*(self._explained_by(one, request_id) for one in new))
            peers: list[str] = []
            for result in told:
                if isinstance(result, CallFailedError):
                    silent.append(result)
                    continue
                answer, known = result
                # One may go by several addresses.
                answers[answer.coordinator_id] = answer
                peers += known
            new = [one for one in dict.fromkeys(peers) if one not in asked]
        return Explained(tuple(decisions_from(answers.values())), tuple(asked), tuple(silent))

    async def _explained_by(
        self, address: str, request_id: str
    ) -> tuple[coordinator_pb2.ExplainResponse, list[str]] | CallFailedError:
        """What one remembers, and whom else it knows of."""
        stub = coordinator_pb2_grpc.CoordinatorServiceStub(self._channels.get(address))
        request = coordinator_pb2.ExplainRequest(request_id=request_id)
        try:
            with _failures(address):
                answer = await stub.Explain(request, timeout=CALL_SECONDS)
            return answer, list((await self._status_of(address)).peers)
        except CallFailedError as error:
            return error

    async def _status_of(self, address: str) -> coordinator_pb2.GetStatusResponse:
        stub = coordinator_pb2_grpc.CoordinatorServiceStub(self._channels.get(address))
        with _failures(address):
            return await stub.GetStatus(coordinator_pb2.GetStatusRequest(), timeout=CALL_SECONDS)


@contextmanager
def _failures(address: str) -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        known = from_rpc(error)
        reason = known.reason if known else ""
        message = error.details() or error.code().name
        raise CallFailedError(address, error.code().name, reason, message) from None


def _request(ask: Ask) -> inference_pb2.GenerateRequest:
    """Raises InvalidRequestError for what a message can't hold; servers judge all else."""
    for text in (
        ask.prompt,
        ask.model,
        ask.adapter,
        *ask.stop,
        *(() if ask.form is None else ask.form.texts),
        *(turn.content for turn in ask.chat),
    ):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidRequestError("text", text, "must be UTF-8") from None
    request = inference_pb2.GenerateRequest(
        model=ask.model,
        adapter=ask.adapter,
        stop=ask.stop,
        sampling=_sampling(ask.sampling),
    )
    if ask.form is not None:
        request.sampling.guide.CopyFrom(_guide(ask.form))
    if ask.chat:
        turns: Iterable[inference_pb2.ChatMessage] = (
            inference_pb2.ChatMessage(role=t.role, content=t.content) for t in ask.chat
        )
        request.chat.messages.extend(turns)
    else:
        request.prompt = ask.prompt
    return request


def _guide(form: Form) -> generation_pb2.Guide:
    match form.kind:
        case "choice":
            return generation_pb2.Guide(choice=generation_pb2.Choice(texts=form.texts))
        case "json_object":
            return generation_pb2.Guide(json_object=generation_pb2.JsonObject())
        case kind:
            guide = generation_pb2.Guide()
            setattr(guide, kind, form.texts[0])
            return guide


def _sampling(fields: dict[str, float | int | bool]) -> generation_pb2.SamplingParams:
    sampling = generation_pb2.SamplingParams()
    for name, value in fields.items():
        try:
            setattr(sampling, name, value)
        except (ValueError, TypeError) as error:
            raise InvalidRequestError(f"sampling.{name}", value, str(error)) from None
    return sampling


def _piece(message: inference_pb2.StreamGenerateResponse) -> Piece:
    end = None
    if message.finish_reason:
        reason = generation_pb2.FinishReason.Name(message.finish_reason)
        end = End(
            finish_reason=reason.removeprefix("FINISH_REASON_").lower(),
            prompt_tokens=message.usage.prompt_tokens,
            completion_tokens=message.usage.completion_tokens,
            cached_tokens=message.usage.cached_tokens,
            ttft_seconds=message.route.ttft_seconds,
            total_seconds=message.route.total_seconds,
            attempts=tuple(_attempt(a) for a in message.route.attempts),
        )
    return Piece(message.text, tuple(message.token_ids), message.model, message.seed, end)


def _attempt(a: inference_pb2.RouteAttempt) -> Attempt:
    return Attempt(
        prefill_worker=a.prefill_worker,
        decode_worker=a.decode_worker,
        reasons=tuple(a.reasons),
        tokens=a.tokens,
        failure=a.failure,
        transport=a.kv.transport,
        kv_bytes=a.kv.bytes,
        kv_blocks=a.kv.blocks,
        kv_seconds=a.kv.seconds,
        exposed_seconds=a.kv.exposed_seconds,
        computed_tokens=a.kv.computed_tokens,
        lost=a.kv.lost,
        prefix=a.prefill_kv.prefix.reason or a.kv.prefix.reason,
    )


def _worker(worker: coordinator_pb2.WorkerStatus) -> Worker:
    info, stats = worker.info, worker.stats
    role = coordinator_pb2.WorkerRole.Name(info.role)
    return Worker(
        worker_id=info.worker_id,
        role=role.removeprefix("WORKER_ROLE_").lower(),
        model=info.model,
        address=info.address,
        pid=info.pid,
        running=stats.running,
        waiting=stats.waiting,
        free_blocks=stats.free_blocks,
        cached_blocks=stats.cached_blocks,
        held_blocks=stats.held_blocks,
        total_blocks=info.total_blocks,
        leases=stats.leases,
        finished=stats.finished,
        step_seconds=stats.step_seconds,
        draft_tokens=stats.draft_tokens,
        accepted_tokens=stats.accepted_tokens,
        decode_steps=stats.decode_steps,
        kv_bytes=dict(stats.kv_bytes),
        kv_refused=stats.kv_refused,
        leases_expired=stats.leases_expired,
        draining=worker.draining,
        silent_seconds=worker.silent_seconds,
        region=info.region,
        kv_transports=tuple(info.kv_transports),
        kv_not_offered=dict(info.kv_not_offered),
        kv_traffic=tuple(_traffic(traffic) for traffic in stats.kv_traffic),
        kv_tiers=tuple(
            TierStats(**{f.name: getattr(tier, f.name) for f in fields(TierStats)})
            for tier in stats.kv_tiers
        ),
        avoided=worker.avoided,
        adapters=tuple(stats.adapters),
        ranks=tuple(Rank(r.running, r.waiting, r.free_blocks) for r in stats.ranks),
    )


def _held(adapter: adapters_pb2.Adapter) -> HeldAdapter:
    return HeldAdapter(**{f.name: getattr(adapter, f.name) for f in fields(HeldAdapter)})


def _traffic(traffic: coordinator_pb2.KvTraffic) -> Traffic:
    figures = Figures(**{f.name: getattr(traffic, f.name) for f in fields(Figures)})
    return Traffic(traffic.transport, traffic.peer, figures, traffic.why)
