"""From what a client asks to requests in flight: what all public services of a frontend share."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import grpc

from kvtransfer.keys import block_keys, salt
from services.engine.api import Guide, Sampling
from services.frontend import validate
from services.frontend.guides import Guides
from services.frontend.live import Cluster, Job, LiveRequest
from services.frontend.model import Model
from services.frontend.output import Limits, Text
from services.frontend.request import Request
from services.frontend.served import ServedModel
from services.frontend.text import TextStream
from services.runtime.errors import DuplicateRequestError, NoWorkersError, TandemError
from services.runtime.settings import FrontendSettings

T = TypeVar("T")

Context = grpc.aio.ServicerContext[Any, Any]


REMEMBERED = 16_384
"""Ids whose use is remembered: more than are used while a worker's last words are under way."""


@dataclass(frozen=True, slots=True)
class Chance:
    """Where ids and seeds come from."""

    request_id: Callable[[], str]
    seed: Callable[[], int]


@dataclass(frozen=True, slots=True)
class Caller:
    """What is known of a call besides its message. Times are seconds of the cluster's clock."""

    arrived: float
    deadline: float
    tenant: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked request, tokenized: any number of answers to it can be begun."""

    caller: Caller
    served: ServedModel
    prompt: Sequence[int]
    sampling: Sampling
    stop: tuple[str, ...]
    wishes: validate.Wishes
    salted: bytes
    keys: list[bytes]
    """Of the prompt's full blocks."""


class Beginning:
    """Of one model's requests. `texts`: threads for tokenizing and hashing.

    Call close() when no more are to begin.
    """

    def __init__(
        self,
        model: Model,
        cluster: Cluster,
        settings: FrontendSettings,
        texts: Executor,
        chance: Chance,
    ) -> None:
        self.model = model
        self.cluster = cluster
        self.settings = settings
        self._texts = texts
        self._chance = chance
        self._live: set[str] = set()
        self._uses: OrderedDict[str, int] = OrderedDict()
        """How often ids were used of late; workers may still speak of the last time."""
        self._guides = Guides(model, settings.guide_bytes, settings.guide_seconds)
        self._tenant_regions = tenant_regions(settings.tenant_regions)

    async def close(self) -> None:
        """Ends what it has started."""
        await self._guides.close()

    @contextmanager
    def named(self, asked: str) -> Iterator[str]:
        """A request's id, which is its own while it lives; one is made if none is asked for.

        Raises InvalidRequestError, DuplicateRequestError.
        """
        validate.check_request_id(asked)
        request_id = asked or self._chance.request_id()
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

    def caller(self, context: Context, arrived: float) -> Caller:
        """Who calls, and until when they wait. Raises InvalidRequestError."""
        left = context.time_remaining()
        deadline = arrived + (self.settings.default_timeout_seconds if left is None else left)
        tenant, name = "", self.settings.tenant_metadata
        if name:
            given = [str(v) for k, v in context.invocation_metadata() or () if k == name]
            tenant = validate.check_tenant(name, given)
        return Caller(arrived, deadline, tenant)

    async def prepare(
        self,
        asked: validate.Asked,
        caller: Caller,
        guide: Callable[[Sequence[int]], Guide | None] | None = None,
    ) -> Prepared:
        """Checks everything, the cheap things first, and tokenizes. Raises TandemError.

        `guide`: gives the answer's form if that depends on the prompt's tokens.
        """
        wishes = self._wishes(asked, caller.tenant)
        served = await self.served(asked.model)
        limits = validate.ModelLimits(
            served.name,
            served.context_tokens,
            self.model.vocabulary,
            self.settings.default_max_tokens,
        )
        given = validate.check_input(asked.input, limits.vocabulary)
        validate.check_length(given, served.context_tokens, self.settings.characters_per_token)
        validate.check_stops(asked.stop)
        sampling = validate.check_sampling(asked.sampling, limits, self._chance.seed)
        if sampling.guide is not None:
            await self._guides.check(sampling.guide)
        if asked.adapter:
            validate.check_adapter(asked.adapter)
            adapter = await self.cluster.coordinator.adapter(served, asked.adapter)
            wishes = replace(wishes, adapter=adapter)
        salted = salt(served.name, served.kv_layout, wishes.tenant, wishes.adapter)
        prompt, keys = await self.off_loop(self._tokenize, given, served, salted)
        if guide is not None and (form := guide(prompt)) is not None:
            await self._guides.check(form)
            sampling = replace(sampling, guide=form)
        room = validate.room_for_output(given, len(prompt), served.context_tokens)
        sampling = clipped(sampling, room)
        return Prepared(caller, served, prompt, sampling, asked.stop, wishes, salted, keys)

    async def check_guide(self, guide: Guide) -> None:
        """Raises InvalidRequestError for one that can't be enforced, or takes too much."""
        await self._guides.check(guide)

    def start(
        self,
        prepared: Prepared,
        request_id: str,
        *,
        seed: int | None = None,
        text: Text | None = None,
    ) -> LiveRequest:
        """Sets an answer going.

        `seed`: instead of the one asked for. `text`: what its tokens go through, instead of a
        TextStream that ends before the stop strings.
        """
        sampling = prepared.sampling if seed is None else replace(prepared.sampling, seed=seed)
        prompt, served = prepared.prompt, prepared.served

        async def keys_with(output: Sequence[int]) -> list[bytes]:
            if not output:
                return prepared.keys
            tokens = [*prompt, *output]
            return await self.off_loop(block_keys, tokens, served.block_tokens, prepared.salted)

        caller, wishes = prepared.caller, prepared.wishes
        use = self._use(request_id)
        job = Job(request_id, served, prompt, sampling, caller.deadline, wishes, keys_with, use)
        core = Request(
            limits=self._limits(len(prompt), sampling),
            text=text or TextStream(self.model.detokenizer(), prepared.stop),
            arrived=caller.arrived,
        )
        return LiveRequest(core, job, self.cluster)

    async def served(self, asked: str) -> ServedModel:
        """The model that is asked for. Raises UnknownModelError, NoWorkersError."""
        own = self.model.name
        if asked not in ("", own):
            models = await self.cluster.coordinator.list_models()
            validate.check_model(asked, own, [m.name for m in models])
        served = await self.cluster.coordinator.model(own)
        if served is None:
            raise NoWorkersError(f"no worker serves {own}", model=own)
        return served

    async def off_loop(self, work: Callable[..., T], *args: Any) -> T:
        """Runs work on text in one of the threads for it."""
        return await asyncio.get_running_loop().run_in_executor(self._texts, work, *args)

    def _use(self, request_id: str) -> int:
        """How many requests had this id before, as far as is remembered."""
        use = self._uses.pop(request_id, -1) + 1
        self._uses[request_id] = use
        if len(self._uses) > REMEMBERED:
            self._uses.popitem(last=False)
        return use

    def _wishes(self, asked: validate.Asked, tenant: str) -> validate.Wishes:
        validate.check_priority(asked.priority)
        validate.check_session(asked.session)
        validate.check_service_level(asked.ttft_seconds, asked.itl_seconds)
        return validate.Wishes(
            tenant=tenant,
            priority=asked.priority,
            session=asked.session,
            region=self.settings.region,
            allowed_regions=self._tenant_regions.get(tenant, ()),
            ttft_seconds=asked.ttft_seconds,
            itl_seconds=asked.itl_seconds,
        )

    def _tokenize(
        self, asked: validate.Input, served: ServedModel, salted: bytes
    ) -> tuple[list[int], list[bytes]]:
        """Runs in a thread."""
        prompt = self.model.encode(asked)
        return prompt, block_keys(prompt, served.block_tokens, salted)

    def _limits(self, prompt_tokens: int, sampling: Sampling) -> Limits:
        ends = () if sampling.ignore_eos else self.model.eos_token_ids
        return Limits(
            prompt_tokens=prompt_tokens,
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            stop_token_ids=frozenset((*ends, *sampling.stop_token_ids)),
            max_attempts=self.settings.max_attempts,
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
