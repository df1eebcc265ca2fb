"""The worker's side of WorkerRegistryService.Register.

One stream at a time: Hello, a snapshot of the prefix cache, then heartbeats and changes. Whatever
goes wrong with it (the coordinator is away, silent, or has dropped this worker) ends the session,
and a new one begins after a pause. The worker serves on meanwhile: nothing but new placements
depends on the coordinator.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import grpc

from kvtransfer.policy import ExportPolicy
from services.engine.api import Engine, ExpertShape, KvEvents
from services.engine.experts import ExpertReports
from services.engine.wire import plan_from, rules_to, shape_to, stats_to
from services.runtime.channels import Channels
from services.runtime.errors import InvalidRequestError
from services.runtime.settings import WorkerSettings
from tandem.coordinator.v1 import coordinator_pb2 as pb
from tandem.coordinator.v1 import coordinator_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)

HELLO_SECONDS = 5.0
"""A coordinator that does not answer a Hello, or does not take a message, for this long is gone."""

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 2.0

COALESCE_SECONDS = 0.02
"""KV changes that come within this time go as one message."""

KEYS_IN_A_MESSAGE = 32_768
"""About 600 kB on the wire."""

_ROLES = {
    "prefill": pb.WORKER_ROLE_PREFILL,
    "decode": pb.WORKER_ROLE_DECODE,
    "both": pb.WORKER_ROLE_BOTH,
}
_ROLE_NAMES = {number: name for name, number in _ROLES.items()}

_Call = grpc.aio.StreamStreamCall[pb.RegisterRequest, pb.RegisterResponse]


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """What does not change while the worker lives; fields as WorkerInfo in coordinator.proto."""

    worker_id: str
    role: str
    address: str
    model: str
    kv_layout: str
    block_tokens: int
    total_blocks: int
    max_running: int
    context_tokens: int
    host: str = ""
    region: str = ""
    numerics: str = ""
    dp_ranks: int = 1
    pid: int = 0
    export_policy: ExportPolicy = field(default_factory=ExportPolicy)
    kv_transports: tuple[str, ...] = ()
    kv_not_offered: Mapping[str, str] = field(default_factory=dict)
    can_be: tuple[str, ...] = ()
    """Roles that it can change to; `role` is the one that it begins with."""
    experts: ExpertShape | None = None


def _keep(role: str, why: str) -> None:
    """What a worker of a fixed role does that is asked for another."""


class Registration:
    """Keeps a worker registered. `draw` gives numbers in [0, 1), for jitter.

    `on_role` is called with a role that a coordinator asks for, and why; it may call role_changed.
    """

    def __init__(
        self,
        engine: Engine,
        identity: WorkerIdentity,
        settings: WorkerSettings,
        channels: Channels,
        *,
        on_role: Callable[[str, str], None] = _keep,
        hello_seconds: float = HELLO_SECONDS,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.registered = asyncio.Event()
        """Set while the coordinator has accepted this worker."""
        self._engine = engine
        self._identity = identity
        self._settings = settings
        self._channels = channels
        self._patience = hello_seconds
        self._draw = draw
        self._on_role = on_role
        self._role = identity.role
        self._draining = False
        self._news = asyncio.Event()
        """Something is to be told before the next heartbeat."""

    def drain(self) -> None:
        """Tells the coordinator, now and at every new start, that no new requests are wanted."""
        self._draining = True
        self._news.set()

    def role_changed(self, role: str) -> None:
        """Tells the coordinator, now and at every new start, what the worker serves."""
        self._role = role
        self._news.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Registers, again and again if need be, until `stop` is set."""
        clock = asyncio.get_running_loop().time
        stopped = asyncio.create_task(stop.wait())
        pause = FIRST_PAUSE_SECONDS
        try:
            while not stop.is_set():
                started = clock()
                session = asyncio.create_task(self._session())
                try:
                    await asyncio.wait((session, stopped), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    await self._end(session, first=pause == FIRST_PAUSE_SECONDS)
                if clock() - started > LONGEST_PAUSE_SECONDS:
                    pause = FIRST_PAUSE_SECONDS
                # Between half and all of it: workers that lost the same coordinator spread out.
                await asyncio.wait((stopped,), timeout=pause * (0.5 + self._draw() / 2))
                pause = min(LONGEST_PAUSE_SECONDS, pause * 2)
        finally:
            stopped.cancel()

    async def _end(self, session: asyncio.Task[None], *, first: bool) -> None:
        """Cleans a session up, and says why there is none, once for a row of failures."""
        was_in = self.registered.is_set()
        self.registered.clear()
        session.cancel()
        try:
            await session
        except asyncio.CancelledError:
            return
        except (grpc.RpcError, grpc.aio.BaseError, TimeoutError, _EndedError) as error:
            level = logging.WARNING if was_in or first else logging.DEBUG
            log.log(level, "not registered with %s: %s", self._settings.coordinator, _said(error))

    async def _session(self) -> None:
        """One stream, from Hello to whatever ends it."""
        channel = self._channels.get(self._settings.coordinator)
        call: _Call = pb_grpc.WorkerRegistryServiceStub(channel).Register()
        role, told = self._role, ExpertReports()
        try:
            async with asyncio.timeout(self._patience):
                await _write(call, self._hello(told))
                answer = await _read(call)
            if not answer.HasField("accepted"):
                raise _EndedError("the coordinator answered a Hello with something else")
            self.registered.set()
            log.info("registered with %s", answer.accepted.coordinator_id)
            interval = min(self._settings.heartbeat_seconds, answer.accepted.lease_ms / 3000)
            writer = _Writer(call, self._patience)
            await self._converse(writer, call, interval, role, told)
        finally:
            call.cancel()

    async def _converse(
        self, writer: _Writer, call: _Call, interval: float, role: str, told: ExpertReports
    ) -> None:
        """Runs until one of the three parts fails. `role` and `told` are what the Hello said."""
        resync = asyncio.Event()
        parts = [
            asyncio.create_task(part)
            for part in (
                self._listen(call, resync),
                self._report(writer, interval, role, told),
                self._tell_kv(writer, resync),
            )
        ]
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)

    async def _listen(self, call: _Call, resync: asyncio.Event) -> None:
        while True:
            answer = await _read(call)
            if answer.HasField("resync"):
                resync.set()
            elif answer.HasField("change_role") and answer.change_role.role in _ROLE_NAMES:
                self._on_role(_ROLE_NAMES[answer.change_role.role], answer.change_role.why)
            elif answer.HasField("expert_plan"):
                self._move_experts(answer.expert_plan)

    def _move_experts(self, message: pb.ExpertPlan) -> None:
        """Heartbeats tell where experts are then; a plan that was not taken is just not there."""
        plan, moves = plan_from(message)
        try:
            self._engine.update_experts(plan, moves)
        except InvalidRequestError as error:
            log.warning("expert plan %d is not taken: %s", plan.plan, error.message)
        else:
            log.info("expert plan %d is taken: %s", plan.plan, message.why)

    async def _report(
        self, writer: _Writer, interval: float, role: str, told: ExpertReports
    ) -> None:
        """Heartbeats, each behind what was to be told before it."""
        left = False
        while True:
            self._news.clear()
            if self._role != role:
                role = self._role
                changed = pb.RoleChanged(role=_ROLES[role])
                await writer.write(pb.RegisterRequest(role_changed=changed))
            if self._draining and not left:
                left = True
                await writer.write(pb.RegisterRequest(draining=pb.Draining()))
            stats = stats_to(told.of(self._engine.stats()))
            await writer.write(pb.RegisterRequest(heartbeat=pb.Heartbeat(stats=stats)))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), interval)

    async def _tell_kv(self, writer: _Writer, resync: asyncio.Event) -> None:
        """Sends changes, and starts over with a snapshot whenever the coordinator asks for one."""
        while True:
            resync.clear()
            asked = asyncio.create_task(resync.wait())
            telling = asyncio.create_task(self._follow_kv(writer))
            try:
                await asyncio.wait((asked, telling), return_when=asyncio.FIRST_COMPLETED)
                if telling.done():
                    telling.result()
            finally:
                asked.cancel()
                telling.cancel()
                await asyncio.gather(asked, telling, return_exceptions=True)

    async def _follow_kv(self, writer: _Writer) -> None:
        sequence = 0
        changes: AsyncIterator[KvEvents] = self._engine.kv_events()
        async with _closing(changes):
            async for events in changes:
                for message in _messages(events):
                    sequence += 1
                    message.sequence = sequence
                    await writer.write(pb.RegisterRequest(kv_events=message))
                await asyncio.sleep(COALESCE_SECONDS)
        raise _EndedError("the engine's KV events ended")

    def _hello(self, told: ExpertReports) -> pb.RegisterRequest:
        me = self._identity
        info = pb.WorkerInfo(
            worker_id=me.worker_id,
            role=_ROLES[self._role],
            address=me.address,
            model=me.model,
            kv_layout=me.kv_layout,
            block_tokens=me.block_tokens,
            total_blocks=me.total_blocks,
            max_running=me.max_running,
            context_tokens=me.context_tokens,
            host=me.host,
            region=me.region,
            numerics=me.numerics,
            dp_ranks=me.dp_ranks,
            pid=me.pid,
            export_rules=rules_to(me.export_policy),
            kv_transports=me.kv_transports,
            kv_not_offered=me.kv_not_offered,
            can_be=[_ROLES[role] for role in me.can_be],
            experts=None if me.experts is None else shape_to(me.experts),
        )
        stats = stats_to(told.of(self._engine.stats()))
        return pb.RegisterRequest(hello=pb.Hello(info=info, stats=stats))


class _EndedError(Exception):
    """The session is over without an error of gRPC's."""


class _Writer:
    """One message at a time; one that is not taken in time means that nobody is there."""

    def __init__(self, call: _Call, patience: float) -> None:
        self._call = call
        self._patience = patience
        self._turn = asyncio.Lock()

    async def write(self, message: pb.RegisterRequest) -> None:
        """Raises TimeoutError, grpc.RpcError, _EndedError."""
        async with self._turn, asyncio.timeout(self._patience):
            await _write(self._call, message)


def _messages(events: KvEvents) -> Iterator[pb.KvEvents]:
    """The events in messages of bounded size, sequence numbers not set.

    A snapshot's first message says that it is one; the rest of it follows as changes.
    """
    stored, removed = list(events.stored), list(events.removed)
    snapshot = events.snapshot
    while stored or removed or snapshot:
        gone, removed = removed[:KEYS_IN_A_MESSAGE], removed[KEYS_IN_A_MESSAGE:]
        space = KEYS_IN_A_MESSAGE - len(gone)
        new, stored = stored[:space], stored[space:]
        yield pb.KvEvents(snapshot=snapshot, stored=new, removed=gone)
        snapshot = False


def _closing(iterator: AsyncIterator[KvEvents]) -> contextlib.AbstractAsyncContextManager[Any]:
    """Ends a generator with its block; iterators of another kind need no end."""
    return aclosing(iterator) if hasattr(iterator, "aclose") else contextlib.nullcontext()


async def _write(call: _Call, message: pb.RegisterRequest) -> None:
    """Raises grpc.RpcError, or _EndedError if the call is over, however it ended."""
    try:
        await call.write(message)
    except asyncio.InvalidStateError:
        raise await _ended(call) from None


async def _read(call: _Call) -> pb.RegisterResponse:
    """The next answer. Raises grpc.RpcError, or _EndedError if there will be none."""
    answer = await call.read()
    if isinstance(answer, pb.RegisterResponse):
        return answer
    raise await _ended(call)


async def _ended(call: _Call) -> _EndedError:
    """What ended a call, in words."""
    code, details = await call.code(), await call.details()
    return _EndedError(f"{code.name.lower()}: {details}" if details else "the stream ended")


def _said(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return error.details() or error.code().name
    return str(error) or "no answer in time"
