"""The public API as the load generator speaks it: generated messages stop here."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import grpc

from loadtest.errors import ModelError
from loadtest.outcome import OK, TRUNCATED, WRONG_COUNT, Progress, Served
from loadtest.workload import RequestPlan, SamplingSpec
from services.runtime.channels import Channels
from services.runtime.client import CallFailedError
from services.runtime.errors import from_rpc
from tandem.coordinator.v1 import coordinator_pb2, coordinator_pb2_grpc
from tandem.generation.v1 import generation_pb2
from tandem.inference.v1 import inference_pb2, inference_pb2_grpc

STATUS_SECONDS = 5.0

_GOOD_ENDS = (generation_pb2.FINISH_REASON_STOP, generation_pb2.FINISH_REASON_LENGTH)


class InferenceClient:
    """Makes requests on one channel and notes when each piece of the answer came."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        model: str,
        sampling: SamplingSpec,
        timeout_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._stub = inference_pb2_grpc.InferenceServiceStub(channel)
        self._model = model
        self._sampling = sampling
        self._timeout = timeout_seconds
        self._clock = clock
        self.examples: dict[str, str] = {}
        """What the first failure of each reason said."""

    async def ask(self, plan: RequestPlan, progress: Progress) -> str:
        """Sends the request, fills `progress` as the answer comes; returns OK or a reason code."""
        message = inference_pb2.StreamGenerateRequest(request=self._message(plan))
        progress.sent = self._clock()
        last = None
        try:
            async for last in self._stub.StreamGenerate(message, timeout=self._timeout):
                if last.token_ids:
                    progress.arrivals.append((self._clock(), len(last.token_ids)))
        except grpc.aio.AioRpcError as error:
            reason, words = _reason(error)
        else:
            reason, words = self._judge(plan, progress, last)
        if reason != OK:
            self.examples.setdefault(reason, words)
        return reason

    async def tokens(
        self,
        plan: RequestPlan,
        timeout_seconds: float,
        on_tokens: Callable[[Sequence[int]], None],
    ) -> Served:
        """Sends the request and passes on the answer's tokens as they come.

        Raises CallFailedError; whatever `on_tokens` raises ends the request.
        """
        message = inference_pb2.StreamGenerateRequest(request=self._message(plan))
        progress, last = Progress(plan.index, self._clock(), len(plan.token_ids)), None
        call = self._stub.StreamGenerate(message, timeout=timeout_seconds)
        try:
            async for last in call:
                if last.token_ids:
                    progress.arrivals.append((self._clock(), len(last.token_ids)))
                    on_tokens(last.token_ids)
        except grpc.aio.AioRpcError as error:
            reason, words = _reason(error)
            raise CallFailedError("", error.code().name, reason, words) from None
        finally:
            call.cancel()
        reason, words = self._judge(plan, progress, last)
        if progress.served is None or reason != OK:
            raise CallFailedError("", "OK", reason, words)
        return progress.served

    def _judge(
        self,
        plan: RequestPlan,
        progress: Progress,
        last: inference_pb2.StreamGenerateResponse | None,
    ) -> tuple[str, str]:
        """Reason code, and words, of a stream that ended without an error status."""
        if last is None or last.finish_reason not in _GOOD_ENDS:
            ended = generation_pb2.FinishReason.Name(last.finish_reason) if last else "no message"
            return TRUNCATED, f"the stream ended with {ended} and status OK"
        progress.served = _served(last)
        came = sum(count for _, count in progress.arrivals)
        said = progress.served.completion_tokens
        wanted = plan.max_tokens if self._sampling.ignore_eos else came
        if not came == said == wanted:
            return WRONG_COUNT, f"{came} tokens came, usage says {said}, {wanted} were asked for"
        return OK, ""

    def _message(self, plan: RequestPlan) -> inference_pb2.GenerateRequest:
        given = self._sampling
        sampling = generation_pb2.SamplingParams(
            max_tokens=plan.max_tokens,
            ignore_eos=given.ignore_eos,
            seed=plan.seed,
            temperature=given.temperature,
            top_k=given.top_k,
            top_p=given.top_p,
        )
        tokens = inference_pb2.TokenInput(token_ids=plan.token_ids.tolist())
        return inference_pb2.GenerateRequest(model=self._model, tokens=tokens, sampling=sampling)


def _served(last: inference_pb2.StreamGenerateResponse) -> Served:
    attempts = last.route.attempts
    moved: Counter[str] = Counter()
    for attempt in attempts:
        if attempt.kv.bytes:
            moved[attempt.kv.transport] += attempt.kv.bytes
    return Served(
        completion_tokens=last.usage.completion_tokens,
        cached_tokens=last.usage.cached_tokens,
        attempts=len(attempts),
        local_prefill=bool(attempts) and not attempts[-1].prefill_worker,
        kv_bytes=dict(moved),
        kv_seconds=sum(a.kv.seconds for a in attempts),
        kv_exposed_seconds=sum(a.kv.exposed_seconds for a in attempts),
        lost_fetches=sum(bool(kv.lost) for a in attempts for kv in (a.kv, a.prefill_kv)),
    )


def _reason(error: grpc.aio.AioRpcError) -> tuple[str, str]:
    """The service's own reason and words; a failure of the transport gives its status code."""
    known = from_rpc(error)
    if known is not None:
        return known.reason, known.message
    return f"RPC_{error.code().name}", error.details() or ""


async def context_tokens(channels: Channels, address: str, model: str) -> tuple[str, int]:
    """Name and context window of the model to load. Raises ModelError, CallFailedError."""
    stub = inference_pb2_grpc.InferenceServiceStub(channels.get(address))
    with _failures(address):
        answer = await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=STATUS_SECONDS)
    served = {m.name: m.context_tokens for m in answer.models}
    names = ", ".join(served) or "none"
    if model and model not in served:
        raise ModelError(f"model {model!r} is not served at {address}; served: {names}")
    if not model and len(served) != 1:
        raise ModelError(f"name the model to load; served at {address}: {names}")
    name = model or next(iter(served))
    return name, served[name]


async def worker_pids(channels: Channels, coordinator: str) -> dict[str, int]:
    """Workers of a coordinator that run on this machine: id to pid. Raises CallFailedError."""
    stub = coordinator_pb2_grpc.CoordinatorServiceStub(channels.get(coordinator))
    with _failures(coordinator):
        answer = await stub.GetStatus(coordinator_pb2.GetStatusRequest(), timeout=STATUS_SECONDS)
    here = socket.gethostname()
    return {
        w.info.worker_id: w.info.pid for w in answer.workers if w.info.host == here and w.info.pid
    }


@contextmanager
def _failures(address: str) -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        known = from_rpc(error)
        reason, words = (known.reason, known.message) if known else ("", error.details() or "")
        raise CallFailedError(address, error.code().name, reason, words) from None
