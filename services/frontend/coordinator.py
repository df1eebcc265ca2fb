"""The coordinator as the frontend sees it: asked for placements, told how attempts ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import grpc

from services.frontend.events import Placement, Report
from services.frontend.served import ServedModel
from services.frontend.validate import Wishes
from services.frontend.wire import models_from, placement_from
from services.runtime.channels import Channels
from services.runtime.errors import (
    CoordinatorUnavailableError,
    DeadlineError,
    TandemError,
    from_rpc,
)
from tandem.coordinator.v1 import coordinator_pb2, coordinator_pb2_grpc

log = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE_SECONDS = 5.0
"""A request waits this long for a coordinator that is away, and for its workers to come back to
one that was."""

FIRST_RETRY_SECONDS = 0.05
LAST_RETRY_SECONDS = 0.5
CALL_SECONDS = 2.0
"""For calls that have nothing to wait for."""
MODELS_SECONDS = 1.0
"""What is known of the models is asked for again after this long."""
MAX_REPORTS = 1024
"""Reports on their way; more are dropped, as nobody can be listening."""

EMPTY_VIEW = frozenset({"NO_WORKERS", "UNKNOWN_MODEL"})
"""What a coordinator says that has just started, until workers have registered again."""


class Coordinator:
    """One per frontend. `clock`: seconds, monotonic."""

    def __init__(
        self, address: str, channels: Channels, frontend_id: str, clock: Callable[[], float]
    ) -> None:
        self._address = address
        self._frontend_id = frontend_id
        self._clock = clock
        self._stub = coordinator_pb2_grpc.CoordinatorServiceStub(channels.get(address))
        self._away_at = -PATIENCE_SECONDS
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
            await self._patiently(self.list_models, PATIENCE_SECONDS)
            return self._models.get(name)
        if self._clock() - self._asked_at >= MODELS_SECONDS and self._refreshing is None:
            self._refreshing = asyncio.create_task(self._refresh())
            self._refreshing.add_done_callback(_retrieve)
        return known

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
            region=wishes.region,
            allowed_regions=wishes.allowed_regions,
            ttft_seconds=wishes.ttft_seconds,
            itl_seconds=wishes.itl_seconds,
        )
        end = self._clock() + timeout

        async def ask() -> Placement:
            left = max(0.001, end - self._clock())
            return placement_from(await self._stub.Place(message, timeout=left))

        return await self._patiently(ask, timeout)

    def report(self, request_id: str, report: Report) -> asyncio.Task[None] | None:
        """Sends a report, if there are not too many; whoever wants can wait for it."""
        if len(self._reports) >= MAX_REPORTS:
            return None
        task = asyncio.create_task(self._report(request_id, report))
        self._reports.add(task)
        task.add_done_callback(self._reports.discard)
        return task

    async def _report(self, request_id: str, report: Report) -> None:
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
        try:
            await self._stub.Report(message, timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            # Its bookings end by themselves; nothing is lost but a little time.
            log.debug("report of %s/%d: %s", request_id, report.attempt, error.code().name)

    async def _refresh(self) -> tuple[ServedModel, ...]:
        self._asked_at = self._clock()
        try:
            request = coordinator_pb2.GetModelsRequest()
            models = models_from(await self._stub.GetModels(request, timeout=CALL_SECONDS))
        except grpc.aio.AioRpcError as error:
            told = self._error(error)
            raise self._away(error) if isinstance(told, DeadlineError) else told from None
        finally:
            self._refreshing = None
        self._models.update((m.name, m) for m in models)
        return models

    async def _patiently(self, ask: Callable[[], Awaitable[T]], timeout: float) -> T:
        """Asks again, for a while, if the coordinator is away or has just come back."""
        end = self._clock() + timeout
        pause = FIRST_RETRY_SECONDS
        give_up: float | None = None
        while True:
            try:
                return await ask()
            except grpc.aio.AioRpcError as rpc:
                error = self._error(rpc)
            except TandemError as told:
                error = told
            now = self._clock()
            if give_up is None:
                give_up = min(end, now + PATIENCE_SECONDS)
            if not self._may_come_back(error, now) or now + pause >= give_up:
                raise error
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_RETRY_SECONDS)

    def _may_come_back(self, error: TandemError, now: float) -> bool:
        if isinstance(error, CoordinatorUnavailableError):
            self._away_at = now
            return True
        return error.reason in EMPTY_VIEW and now - self._away_at < PATIENCE_SECONDS

    def _error(self, error: grpc.aio.AioRpcError) -> TandemError:
        told = from_rpc(error)
        if told is not None:
            return told
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineError("the deadline passed while the coordinator was asked")
        return self._away(error)

    def _away(self, error: grpc.aio.AioRpcError) -> CoordinatorUnavailableError:
        self._away_at = self._clock()
        return CoordinatorUnavailableError(
            f"the coordinator at {self._address} can't be reached ({error.code().name})",
            coordinator=self._address,
        )


def _retrieve(task: asyncio.Task[tuple[ServedModel, ...]]) -> None:
    """Nobody waits for a refresh behind the scenes; the next one may do better."""
    if not task.cancelled() and task.exception() is not None:
        log.debug("models could not be refreshed")
