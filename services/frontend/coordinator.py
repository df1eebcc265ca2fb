"""Coordinators as the frontend asks them for placements, and tells them how attempts ended.

Whom to ask is in replicas.py. One that is away, or has just started and knows no workers yet, is
not the last word while there is another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import grpc

from services.frontend.events import Placement, Report
from services.frontend.replicas import Replica, Replicas
from services.frontend.served import ServedModel
from services.frontend.validate import Wishes
from services.frontend.wire import models_from, placement_from
from services.runtime.channels import Channels
from services.runtime.directory import Directory
from services.runtime.errors import (
    CoordinatorUnavailableError,
    DeadlineError,
    TandemError,
    UnknownAdapterError,
    UnknownModelError,
    from_rpc,
)
from tandem.coordinator.v1 import coordinator_pb2

log = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE_SECONDS = 10.0
"""A request waits this long while every coordinator is away, and for workers to come back to
one that was."""

FIRST_RETRY_SECONDS = 0.05
LAST_RETRY_SECONDS = 0.5
CALL_SECONDS = 2.0
"""For calls that have nothing to wait for."""
MODELS_SECONDS = 1.0
"""What is known of the models is asked for again after this long."""
MAX_REPORTS = 1024
"""Reports on their way; more are dropped, as nobody can be listening."""

EMPTY_VIEW = frozenset({"NO_WORKERS", "UNKNOWN_MODEL", "UNKNOWN_ADAPTER"})
"""What a coordinator says that has just started, until workers have registered again."""


class Coordinator:
    """One per frontend, for all coordinators. `clock`: seconds, monotonic."""

    def __init__(
        self,
        directory: Directory,
        channels: Channels,
        frontend_id: str,
        clock: Callable[[], float],
    ) -> None:
        self._frontend_id = frontend_id
        self._clock = clock
        self._replicas = Replicas(directory, channels, frontend_id, clock)
        self._asked: dict[tuple[str, int], Replica] = {}
        """Who was asked to place an attempt of which no end was reported."""
        self._models: dict[str, ServedModel] = {}
        self._asked_at = -MODELS_SECONDS
        self._refreshing: asyncio.Task[tuple[ServedModel, ...]] | None = None
        self._reports: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Gives the last reports a moment, then drops what is on its way."""
        if self._reports:
            await asyncio.wait(self._reports, timeout=CALL_SECONDS)
        tasks = [*self._reports, *([self._refreshing] if self._refreshing else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._replicas.close()

    async def list_models(self) -> tuple[ServedModel, ...]:
        """What is served now. Raises CoordinatorUnavailableError."""
        if self._refreshing is None:
            self._refreshing = asyncio.create_task(self._refresh())
        return await asyncio.shield(self._refreshing)

    async def model(self, name: str) -> ServedModel | None:
        """What is known of a model, refreshed behind the caller's back when it is old.

        Kept while the model is not served: whether a request can be placed is for place() to
        find out. Waits only for a model not known yet. Raises CoordinatorUnavailableError.
        """
        known = self._models.get(name)
        if known is None:
            with contextlib.suppress(UnknownModelError):
                await self._patiently(self._get_models, PATIENCE_SECONDS)
            return self._models.get(name)
        if self._clock() - self._asked_at >= MODELS_SECONDS and self._refreshing is None:
            self._refreshing = asyncio.create_task(self._refresh())
            self._refreshing.add_done_callback(_retrieve)
        return known

    async def adapter(self, served: ServedModel, asked: str) -> str:
        """The id of a LoRA adapter that is asked for by name or id.

        One that is not known is asked for anew: it may have been loaded a moment ago. Raises
        UnknownAdapterError, CoordinatorUnavailableError.
        """
        found = served.adapter_for(asked)
        if found:
            return found
        await self.list_models()
        served = self._models.get(served.name, served)
        found = served.adapter_for(asked)
        if not found:
            have = ", ".join(sorted({a.name for a in served.adapters})) or "none"
            raise UnknownAdapterError(
                f"adapter {asked!a} of {served.name} is not loaded; loaded: {have}",
                adapter=asked,
                model=served.name,
            )
        return found

    async def place(
        self,
        request_id: str,
        attempt: int,
        exclude: Sequence[str],
        *,
        served: ServedModel,
        block_keys: Sequence[bytes],
        context_tokens: int,
        max_tokens: int,
        timeout: float,
        wishes: Wishes,
    ) -> Placement:
        """Workers for an attempt, within `timeout` seconds. Raises TandemError."""
        message = coordinator_pb2.PlaceRequest(
            request_id=request_id,
            attempt=attempt,
            model=served.name,
            block_keys=block_keys,
            context_tokens=context_tokens,
            max_tokens=max_tokens,
            exclude_workers=exclude,
            frontend_id=self._frontend_id,
            kv_layout=served.kv_layout,
            tenant=wishes.tenant,
            priority=wishes.priority,
            session=wishes.session,
            adapter=wishes.adapter,
            region=wishes.region,
            allowed_regions=wishes.allowed_regions,
            ttft_seconds=wishes.ttft_seconds,
            itl_seconds=wishes.itl_seconds,
        )
        end = self._clock() + timeout

        async def ask(replica: Replica) -> Placement:
            left = max(0.001, end - self._clock())
            # From here on, since whoever cancels does not know whether it was placed.
            self._asked[request_id, attempt] = replica
            try:
                call = replica.stub.Place(message, timeout=left)
                return placement_from(await replica.answer(call))
            except (TandemError, grpc.aio.AioRpcError):
                del self._asked[request_id, attempt]
                raise

        return await self._patiently(ask, timeout)

    def report(self, request_id: str, report: Report) -> asyncio.Task[None] | None:
        """Sends a report, if there are not too many; whoever wants can wait for it.

        It is for the coordinator that placed the attempt. Of a worker that could not be reached
        all are told, and then it is the one to be asked next that can be waited for.
        """
        placed_by = self._asked.pop((request_id, report.attempt), None)
        told = [r for r in (placed_by,) if r is not None and r.up]
        if report.unreachable:
            told = self._replicas.up()
        elif report.failed_worker and not told:
            told = self._replicas.up()[:1]
        if len(self._reports) + len(told) > MAX_REPORTS:
            return None
        message = coordinator_pb2.ReportRequest(
            request_id=request_id,
            attempt=report.attempt,
            failed_worker=report.failed_worker,
            failure=report.failure,
            unreachable=report.unreachable,
            generated_tokens=report.generated_tokens,
            ttft_seconds=report.ttft_seconds,
            computed_tokens=report.computed_tokens,
        )
        next_asked, sent = self._replicas.pick(), None
        for replica in told:
            task = asyncio.create_task(self._report(replica, message))
            self._reports.add(task)
            task.add_done_callback(self._reports.discard)
            if sent is None or replica is next_asked:
                sent = task
        return sent

    async def _report(self, replica: Replica, message: coordinator_pb2.ReportRequest) -> None:
        try:
            await replica.answer(replica.stub.Report(message, timeout=CALL_SECONDS))
        except (CoordinatorUnavailableError, grpc.aio.AioRpcError) as error:
            # Its bookings end by themselves; nothing is lost but a little time.
            log.debug("report of %s/%d: %s", message.request_id, message.attempt, error)

    async def _refresh(self) -> tuple[ServedModel, ...]:
        try:
            return await self._ask_around(self._get_models)
        except UnknownModelError:
            return ()
        finally:
            self._refreshing = None

    async def _get_models(self, replica: Replica) -> tuple[ServedModel, ...]:
        """Raises UnknownModelError where none is served, which another one may know better."""
        self._asked_at = self._clock()
        request = coordinator_pb2.GetModelsRequest()
        try:
            answer = await replica.answer(replica.stub.GetModels(request, timeout=CALL_SECONDS))
        except grpc.aio.AioRpcError as error:
            told = _error(error)
            raise _silent(replica) if isinstance(told, DeadlineError) else told from None
        models = models_from(answer)
        if not models:
            raise UnknownModelError("no worker has registered yet")
        self._models.update((m.name, m) for m in models)
        return models

    async def _patiently(self, ask: Callable[[Replica], Awaitable[T]], timeout: float) -> T:
        """Asks around again, for a while, if all are away, or one has just come back."""
        end = self._clock() + timeout
        pause = FIRST_RETRY_SECONDS
        give_up: float | None = None
        while True:
            try:
                return await self._ask_around(ask)
            except TandemError as told:
                error = told
            now = self._clock()
            if give_up is None:
                give_up = min(end, now + PATIENCE_SECONDS)
            if not self._may_yet_know(error, now) or now + pause >= give_up:
                raise error
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_RETRY_SECONDS)

    async def _ask_around(self, ask: Callable[[Replica], Awaitable[T]]) -> T:
        """Asks one coordinator, and the next if that one is away or knows nobody.

        Raises TandemError: a refusal, or that all are away.
        """
        tried: list[Replica] = []
        failure: TandemError = CoordinatorUnavailableError("no coordinator is known yet")
        while (replica := self._replicas.pick(tried)) is not None:
            tried.append(replica)
            try:
                return await ask(replica)
            except grpc.aio.AioRpcError as rpc:
                error = _error(rpc)
            except TandemError as told:
                error = told
            if isinstance(error, CoordinatorUnavailableError):
                failure = failure if failure.reason in EMPTY_VIEW else error
            elif error.reason in EMPTY_VIEW:
                failure = error
            else:
                raise error
        raise failure

    def _may_yet_know(self, error: TandemError, now: float) -> bool:
        if isinstance(error, CoordinatorUnavailableError):
            return True
        young = any(now - r.up_since < PATIENCE_SECONDS for r in self._replicas.up())
        return error.reason in EMPTY_VIEW and young


def _error(error: grpc.aio.AioRpcError) -> TandemError:
    """Of a coordinator that is there."""
    told = from_rpc(error)
    return told or DeadlineError("the deadline passed while the coordinator was asked")


def _silent(replica: Replica) -> CoordinatorUnavailableError:
    return CoordinatorUnavailableError(
        f"the coordinator at {replica.address} does not answer", coordinator=replica.address
    )


def _retrieve(task: asyncio.Task[tuple[ServedModel, ...]]) -> None:
    """Nobody waits for a refresh behind the scenes; the next one may do better."""
    if not task.cancelled() and task.exception() is not None:
        log.debug("models could not be refreshed")
