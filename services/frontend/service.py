"""InferenceService: what clients call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc

from kvtransfer.keys import block_keys, salt
from services.engine.api import Sampling
from services.engine.wire import FINISH, logprobs_to
from services.frontend import validate, wire
from services.frontend.guides import Guides
from services.frontend.live import Cluster, Job, LiveRequest
from services.frontend.model import Model
from services.frontend.output import Limits
from services.frontend.request import Request
from services.frontend.served import ServedModel
from services.frontend.text import TextStream
from services.runtime.errors import DuplicateRequestError, NoWorkersError, TandemError
from services.runtime.settings import FrontendSettings
from tandem.inference.v1 import inference_pb2, inference_pb2_grpc

_Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class Chance:
    """Where ids and seeds come from."""

    request_id: Callable[[], str]
    seed: Callable[[], int]


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Serves one model's requests. `texts`: threads for tokenizing and hashing.

    Call close() when it serves no more.
    """

    def __init__(
        self,
        model: Model,
        cluster: Cluster,
        settings: FrontendSettings,
        texts: Executor,
        chance: Chance,
    ) -> None:
        self._model = model
        self._cluster = cluster
        self._settings = settings
        self._texts = texts
        self._chance = chance
        self._live: set[str] = set()
        self._guides = Guides(model, settings.guide_bytes, settings.guide_seconds)
        self._tenant_regions = tenant_regions(settings.tenant_regions)

    async def close(self) -> None:
        """Ends what it has started."""
        await self._guides.close()

    async def Generate(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: _Context
    ) -> inference_pb2.GenerateResponse:
        """The whole answer; see inference.proto."""
        arrived = self._cluster.clock()
        asked = wire.asked_from(request)
        with self._named(asked) as request_id:
            live, job = await self._begin(asked, request_id, arrived, context)
            try:
                piece = await live.whole()
            finally:
                live.close()
            return inference_pb2.GenerateResponse(
                request_id=request_id,
                text=piece.text,
                token_ids=piece.token_ids,
                logprobs=logprobs_to(piece.logprobs),
                finish_reason=FINISH[live.finish_reason],
                usage=wire.usage_to(live.core),
                route=wire.route_to(live.core),
                model=job.served.name,
                seed=job.sampling.seed,
            )

    async def StreamGenerate(  # noqa: N802
        self, request: inference_pb2.StreamGenerateRequest, context: _Context
    ) -> AsyncIterator[inference_pb2.StreamGenerateResponse]:
        """The answer as it comes; see inference.proto."""
        arrived = self._cluster.clock()
        asked = wire.asked_from(request.request)
        with self._named(asked) as request_id:
            live, job = await self._begin(asked, request_id, arrived, context)
            try:
                first, last = True, False
                while not last:
                    piece = await live.piece()
                    # Nothing runs between the two: what is not in this piece is to come.
                    last = live.finish_reason is not None
                    message = inference_pb2.StreamGenerateResponse(
                        request_id=request_id, text=piece.text, token_ids=piece.token_ids
                    )
                    if piece.logprobs:
                        message.logprobs.extend(logprobs_to(piece.logprobs))
                    if first:
                        message.model, message.seed = job.served.name, job.sampling.seed
                        first = False
                    if last:
                        message.finish_reason = FINISH[live.finish_reason]
                        message.usage.CopyFrom(wire.usage_to(live.core))
                        message.route.CopyFrom(wire.route_to(live.core))
                    yield message
            finally:
                live.close()

    async def ListModels(  # noqa: N802
        self, request: inference_pb2.ListModelsRequest, context: _Context
    ) -> inference_pb2.ListModelsResponse:
        """The models that can be asked now; see inference.proto."""
        served = await self._cluster.coordinator.list_models()
        return inference_pb2.ListModelsResponse(
            models=[
                inference_pb2.Model(
                    name=m.name,
                    context_tokens=m.context_tokens,
                    block_tokens=m.block_tokens,
                    prefill_workers=m.prefill_workers,
                    decode_workers=m.decode_workers,
                    adapters=[a.id for a in m.adapters],
                )
                for m in served
                if m.name == self._model.name
            ]
        )

    @contextmanager
    def _named(self, asked: validate.Asked) -> Iterator[str]:
        """The request's id, which is its own while it lives."""
        validate.check_request_id(asked.request_id)
        request_id = asked.request_id or self._chance.request_id()
        if request_id in self._live:
            raise DuplicateRequestError(
                f"request {request_id} is still running", request_id=request_id
            )
        self._live.add(request_id)
        try:
            yield request_id
        except TandemError as error:
            # What was refused can be asked about by its name, too.
            error.metadata.setdefault("request_id", request_id)
            raise
        finally:
            self._live.discard(request_id)

    async def _begin(
        self, asked: validate.Asked, request_id: str, arrived: float, context: _Context
    ) -> tuple[LiveRequest, Job]:
        """Checks everything, tokenizes, and sets the request going."""
        left = context.time_remaining()
        deadline = arrived + (self._settings.default_timeout_seconds if left is None else left)
        wishes = self._wishes(asked, context)
        served = await self._served(asked.model)
        limits = validate.ModelLimits(
            served.name,
            served.context_tokens,
            self._model.vocabulary,
            self._settings.default_max_tokens,
        )
        given = validate.check_input(asked.input, limits.vocabulary)
        validate.check_stops(asked.stop)
        sampling = validate.check_sampling(asked.sampling, limits, self._chance.seed)
        if sampling.guide is not None:
            await self._guides.check(sampling.guide)
        if asked.adapter:
            validate.check_adapter(asked.adapter)
            adapter = await self._cluster.coordinator.adapter(served, asked.adapter)
            wishes = replace(wishes, adapter=adapter)
        loop = asyncio.get_running_loop()
        salted = salt(served.name, served.kv_layout, wishes.tenant, wishes.adapter)
        prompt, keys = await loop.run_in_executor(
            self._texts, self._tokenize, given, served, salted
        )
        room = validate.room_for_output(given, len(prompt), served.context_tokens)
        sampling = clipped(sampling, room)

        async def keys_with(output: Sequence[int]) -> list[bytes]:
            if not output:
                return keys
            tokens = [*prompt, *output]
            return await loop.run_in_executor(
                self._texts, block_keys, tokens, served.block_tokens, salted
            )

        job = Job(request_id, served, prompt, sampling, deadline, wishes, keys_with)
        core = Request(
            limits=self._limits(len(prompt), sampling),
            text=TextStream(self._model.detokenizer(), asked.stop),
            arrived=arrived,
        )
        return LiveRequest(core, job, self._cluster), job

    def _wishes(self, asked: validate.Asked, context: _Context) -> validate.Wishes:
        validate.check_priority(asked.priority)
        validate.check_session(asked.session)
        validate.check_service_level(asked.ttft_seconds, asked.itl_seconds)
        tenant, name = "", self._settings.tenant_metadata
        if name:
            given = [str(v) for k, v in context.invocation_metadata() or () if k == name]
            tenant = validate.check_tenant(name, given)
        return validate.Wishes(
            tenant=tenant,
            priority=asked.priority,
            session=asked.session,
            region=self._settings.region,
            allowed_regions=self._tenant_regions.get(tenant, ()),
            ttft_seconds=asked.ttft_seconds,
            itl_seconds=asked.itl_seconds,
        )

    async def _served(self, asked: str) -> ServedModel:
        own = self._model.name
        if asked not in ("", own):
            models = await self._cluster.coordinator.list_models()
            validate.check_model(asked, own, [m.name for m in models])
        served = await self._cluster.coordinator.model(own)
        if served is None:
            raise NoWorkersError(f"no worker serves {own}", model=own)
        return served

    def _tokenize(
        self, asked: validate.Input, served: ServedModel, salted: bytes
    ) -> tuple[list[int], list[bytes]]:
        """Runs in a thread."""
        prompt = self._model.encode(asked)
        return prompt, block_keys(prompt, served.block_tokens, salted)

    def _limits(self, prompt_tokens: int, sampling: Sampling) -> Limits:
        ends = () if sampling.ignore_eos else self._model.eos_token_ids
        return Limits(
            prompt_tokens=prompt_tokens,
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            stop_token_ids=frozenset((*ends, *sampling.stop_token_ids)),
            max_attempts=self._settings.max_attempts,
            final_token_ids=frozenset(() if sampling.guide is None else ends),
        )


def clipped(sampling: Sampling, room: int) -> Sampling:
    """With max_tokens that the context window has room for."""
    if sampling.max_tokens <= room:
        return sampling
    return replace(sampling, max_tokens=room, min_tokens=min(sampling.min_tokens, room))


def tenant_regions(rules: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Regions that a tenant's requests may be computed in, of "tenant=region+region"."""
    parted = (rule.partition("=") for rule in rules)
    return {tenant: tuple(regions.split("+")) for tenant, _, regions in parted}
