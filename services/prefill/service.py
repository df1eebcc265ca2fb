"""PrefillService over an engine: one call a prompt, its end and its cancellation the caller's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc

from services.engine.api import Engine, EngineFault, FinishReason, Hold, TokenOutput
from services.engine.wire import FINISH, kv_to, logprobs_to, prefix_from, request_from
from services.runtime.errors import DuplicateRequestError, TandemError, by_reason
from tandem.prefill.v1 import prefill_pb2, prefill_pb2_grpc

MAX_LEASE_SECONDS = 600.0

_Context = grpc.aio.ServicerContext[
    prefill_pb2.PrefillRequest, AsyncIterator[prefill_pb2.PrefillResponse]
]


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    """Owns which call waits for which request; the engine owns everything else.

    It takes prompts unless it drains, for whatever reason; those it has it finishes.
    """

    def __init__(self, engine: Engine, lease_seconds: float) -> None:
        self._engine = engine
        self._lease_seconds = lease_seconds
        self._waiting: dict[str, asyncio.Future[TokenOutput]] = {}
        self._drains: EngineFault | None = None

    async def Prefill(  # noqa: N802
        self,
        request: prefill_pb2.PrefillRequest,
        context: _Context,
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        """Runs a prompt; see prefill.proto."""
        if self._drains is not None:
            raise _error(self._drains)
        prompt = replace(
            request_from(request.request, self._engine.info.vocabulary),
            dp_rank=request.dp_rank,
            deadline_seconds=context.time_remaining(),
        )
        if prompt.request_id in self._waiting:
            raise DuplicateRequestError(
                f"request {prompt.request_id} is already here", request_id=prompt.request_id
            )
        seconds = min(request.lease_ms / 1000 or self._lease_seconds, MAX_LEASE_SECONDS)
        answer: asyncio.Future[TokenOutput] = asyncio.get_running_loop().create_future()
        self._engine.prefill(prompt, Hold(seconds), prefix_from(request.prefix))
        self._waiting[prompt.request_id] = answer
        handed_over = False
        try:
            yield prefill_pb2.PrefillResponse(accepted=prefill_pb2.PrefillAccepted())
            output = await answer
            if output.error is not None:
                raise _error(output.error)
            yield prefill_pb2.PrefillResponse(done=_done(output))
            handed_over = output.finish_reason is None
        finally:
            # Also when the caller cancelled or went away at any of the yields: without a caller
            # there is no decode worker that will come for the KV.
            del self._waiting[prompt.request_id]
            if not handed_over:
                self._engine.cancel(prompt.request_id)

    def deliver(self, outputs: tuple[TokenOutput, ...]) -> None:
        """Hands an engine step's outputs to the calls that wait for them."""
        for output in outputs:
            answer = self._waiting.get(output.request_id)
            if answer is None or answer.done():
                continue
            if output.prefill_done or output.finish_reason is not None:
                answer.set_result(output)

    @property
    def live(self) -> int:
        """Prompts accepted and not yet answered."""
        return len(self._waiting)

    def open(self) -> None:
        """Takes new prompts again."""
        self._drains = None

    def drain(self, why: EngineFault) -> None:
        """Refuses new prompts with `why`."""
        self._drains = why

    def hand_back(self, why: EngineFault) -> None:
        """Fails what is still here, so that frontends place it elsewhere."""
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(_error(why))


def _error(fault: EngineFault) -> TandemError:
    return by_reason(fault.reason, fault.message, fault.metadata)


def _done(output: TokenOutput) -> prefill_pb2.PrefillDone:
    reason = output.finish_reason
    assert reason is not FinishReason.ERROR
    return prefill_pb2.PrefillDone(
        token_ids=output.token_ids,
        logprobs=logprobs_to(output.logprobs),
        finish_reason=FINISH[reason],
        handle=output.handle,
        kv=None if output.kv is None else kv_to(output.kv),
    )
