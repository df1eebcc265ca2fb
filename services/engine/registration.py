"""The worker's side of WorkerRegistryService.Register.

A stream with each coordinator, and none of them knows of the others: Hello, a snapshot of the
prefix cache, then heartbeats and changes. Whatever goes wrong with one (the coordinator is away,
silent, or has dropped this worker) ends that session, and a new one begins after a pause, for as
long as the directory lists the coordinator. The worker serves on meanwhile: nothing but new
placements depends on coordinators.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from typing import Any

import grpc

from services.engine.api import Engine, KvEvents
from services.engine.experts import ExpertReports
from services.engine.identity import ROLE_NAMES, ROLES, WorkerIdentity, info_to
from services.engine.wire import plan_from, stats_to
from services.runtime.channels import Channels
from services.runtime.directory import Directory, StaticDirectory
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

_Call = grpc.aio.StreamStreamCall[pb.RegisterRequest, pb.RegisterResponse]


def _keep(role: str, why: str) -> None:
    """What a worker of a fixed role does that is asked for another."""


class Registration:
    """Keeps a worker registered with every coordinator. `draw` gives numbers in [0, 1), for jitter.

    `directory` knows the coordinators; without one they are those that the settings name. `on_role`
    is called with a role that a coordinator asks for, and why; it may call role_changed.
    """

    def __init__(
        self,
        engine: Engine,
        identity: WorkerIdentity,
        settings: WorkerSettings,
        channels: Channels,
        *,
        directory: Directory | None = None,
        on_role: Callable[[str, str], None] = _keep,
        hello_seconds: float = HELLO_SECONDS,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.registered = asyncio.Event()
        """Set while some coordinator has accepted this worker."""
        self._engine = engine
        self._identity = identity
        self._heartbeat_seconds = settings.heartbeat_seconds
        self._directory = directory or StaticDirectory(settings.coordinator)
        self._channels = channels
        self._patience = hello_seconds
        self._draw = draw
        self._on_role = on_role
        self._role = identity.role
        self._draining = False
        self._accepted: set[str] = set()
        self._news: set[asyncio.Event] = set()
        """One a stream: something is to be told before the next heartbeat."""

    def drain(self) -> None:
        """Tells coordinators, now and at every new start, that no new requests are wanted."""
        self._draining = True
        self.tell()

    def role_changed(self, role: str) -> None:
        """Tells coordinators, now and at every new start, what the worker serves."""
        self._role = role
        self.tell()

    def tell(self) -> None:
        """Reports at once, as something has changed that placements rest on."""
        for news in self._news:
            news.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Registers, again and again if need be, until `stop` is set.

        Raises what the engine does, which is no coordinator's fault.
        """
        stopped = asyncio.create_task(stop.wait())
        staying: dict[str, asyncio.Task[None]] = {}
        try:
            while not stop.is_set():
                known = self._directory.coordinators
                for address in known:
                    if address not in staying:
                        staying[address] = asyncio.create_task(self._stay(address, stopped))
                changed = asyncio.create_task(self._directory.changed(known))
                waiting = (stopped, changed, *staying.values())
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                for address, task in list(staying.items()):
                    if task.done():
                        del staying[address]
                        task.result()
        finally:
            stopped.cancel()
            for task in staying.values():
                task.cancel()
            await asyncio.gather(*staying.values(), return_exceptions=True)

    async def _stay(self, address: str, stopped: asyncio.Task[bool]) -> None:
        """Sessions with one coordinator, until `stopped`; one off the list has only this one."""
        clock = asyncio.get_running_loop().time
        pause = FIRST_PAUSE_SECONDS
        while not stopped.done():
            started = clock()
            session = asyncio.create_task(self._session(address))
            try:
                await asyncio.wait((session, stopped), return_when=asyncio.FIRST_COMPLETED)
            finally:
                await self._end(address, session, first=pause == FIRST_PAUSE_SECONDS)
            if address not in self._directory.coordinators:
                await self._channels.drop(address)
                return
            if clock() - started > LONGEST_PAUSE_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            # Between half and all of it: workers that lost the same coordinator spread out.
            await asyncio.wait((stopped,), timeout=pause * (0.5 + self._draw() / 2))
            pause = min(LONGEST_PAUSE_SECONDS, pause * 2)

    async def _end(self, address: str, session: asyncio.Task[None], *, first: bool) -> None:
        """Cleans a session up, and says why there is none, once for a row of failures."""
        was_in = address in self._accepted
        self._accepted.discard(address)
        if not self._accepted:
            self.registered.clear()
        session.cancel()
        try:
            await session
        except asyncio.CancelledError:
            return
        except (grpc.RpcError, grpc.aio.BaseError, TimeoutError, _EndedError) as error:
            level = logging.WARNING if was_in or first else logging.DEBUG
            log.log(level, "not registered with %s: %s", address, _said(error))

    async def _session(self, address: str) -> None:
        """One stream, from Hello to whatever ends it."""
        channel = self._channels.get(address)
        call: _Call = pb_grpc.WorkerRegistryServiceStub(channel).Register()
        role, told = self._role, ExpertReports()
        try:
            async with asyncio.timeout(self._patience):
                await _write(call, self._hello(told))
                answer = await _read(call)
            if not answer.HasField("accepted"):
                raise _EndedError("the coordinator answered a Hello with something else")
            self._accepted.add(address)
            self.registered.set()
            log.info("registered with %s at %s", answer.accepted.coordinator_id, address)
            interval = min(self._heartbeat_seconds, answer.accepted.lease_ms / 3000)
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
            elif answer.HasField("change_role") and answer.change_role.role in ROLE_NAMES:
                self._on_role(ROLE_NAMES[answer.change_role.role], answer.change_role.why)
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
        with self._hearing() as news:
            while True:
                news.clear()
                if self._role != role:
                    role = self._role
                    changed = pb.RoleChanged(role=ROLES[role])
                    await writer.write(pb.RegisterRequest(role_changed=changed))
                if self._draining and not left:
                    left = True
                    await writer.write(pb.RegisterRequest(draining=pb.Draining()))
                stats = stats_to(told.of(self._engine.stats()))
                await writer.write(pb.RegisterRequest(heartbeat=pb.Heartbeat(stats=stats)))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), interval)

    @contextlib.contextmanager
    def _hearing(self) -> Iterator[asyncio.Event]:
        """What is set when there is something to be told."""
        news = asyncio.Event()
        self._news.add(news)
        try:
            yield news
        finally:
            self._news.discard(news)

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
        stats = stats_to(told.of(self._engine.stats()))
        info = info_to(self._identity, self._role)
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
    keys = {name: list(getattr(events, name)) for name in ("removed", "lower", "stored")}
    snapshot = events.snapshot
    while any(keys.values()) or snapshot:
        message, space = pb.KvEvents(snapshot=snapshot), KEYS_IN_A_MESSAGE
        for name, left in keys.items():
            some = left[:space]
            setattr(message, name, b"".join(some))
            del left[:space]
            space -= len(some)
        yield message
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
