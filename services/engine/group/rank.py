"""A rank: an engine whose requests come from its leader's stream, and whose outputs go there."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from importlib import metadata
from typing import Any

import grpc

from services.engine.api import EngineFault, EngineStats, FinishReason, FirstTokens, TokenOutput
from services.engine.group import wire
from services.engine.group.member import CHANNEL_OPTIONS
from services.engine.group.part import Part
from services.engine.group.servicer import PACKAGE, SETTINGS
from services.engine.group.task import Task
from services.engine.stepped.engine import SteppedEngine
from services.engine.wire import fault_to, plan_from, stats_to
from services.runtime.errors import (
    EngineFailedError,
    StatusError,
    TandemError,
    WorkerLostError,
)
from services.runtime.load import SettingsError
from services.runtime.server import Server
from services.runtime.settings import RankSettings, ServerSettings
from tandem.group.v1 import group_pb2 as pb
from tandem.group.v1 import group_pb2_grpc
from tandem.kvtransfer.v1 import kvtransfer_pb2_grpc

log = logging.getLogger(__name__)

REPORT_SECONDS = 0.05
"""Between looks at whether there is something to report."""
STILL_REPORTS = 20
"""Of so many looks one is reported although nothing has changed: the rank is alive."""
EXPERT_REPORTS = 10
"""Of so many reports that are not of outputs one says how tokens were routed."""
COALESCE_SECONDS = 0.02
CONFESS_SECONDS = 1.0

FOLLOWING_SECONDS = 1.0
END_SECONDS = 10.0
"""For the last step of a model that is shared, and all that is left of it."""

Make = Callable[[Task, Part], SteppedEngine]
"""An engine that is one rank, not started."""
Along = Callable[[Task, Part, Callable[[], None]], None]
"""Computes along with another's engine, until it ends. Calls back when its weights are read."""


class Rank:
    """From joining to the end. Belongs to the event loop."""

    def __init__(
        self, settings: RankSettings, server: ServerSettings, make: Make, along: Along
    ) -> None:
        self._settings = settings
        self._server_settings = server
        self._make = make
        self._along = along
        self._said: asyncio.Queue[pb.JoinRequest] = asyncio.Queue()
        self._store: concurrent.futures.Future[str] = concurrent.futures.Future()
        self._taken = 0
        self._numbers: dict[str, int] = {}
        """Of requests that are live here: which of the leader's they are."""
        self._told = EngineStats()
        self._loading: set[asyncio.Task[None]] = set()
        self.engine: SteppedEngine | None = None

    async def run(self, ready: Callable[[str], None]) -> None:
        """Serves until the leader says Close. Raises EngineFailedError if the group ends before.

        Then the engine may be in the middle of a step that will never end: nothing is closed.
        """
        self._loop = asyncio.get_running_loop()
        address = self._settings.group
        async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            call = group_pb2_grpc.GroupServiceStub(channel).Join(wait_for_ready=True)
            joined = pb.Joined(rank=self._settings.number, version=metadata.version(PACKAGE))
            self._say(pb.JoinRequest(joined=joined))
            writing = asyncio.create_task(self._write(call))
            try:
                await self._serve(_messages(call), ready)
            except grpc.aio.AioRpcError as error:
                words = f"{error.code().name}: {error.details() or 'no details'}"
                raise EngineFailedError(f"the leader at {address} is lost: {words}") from error
            except Exception as error:
                await self._confess(call, writing, error)
                raise
            finally:
                writing.cancel()
                call.cancel()

    async def _confess(self, call: Any, writing: asyncio.Task[None], error: Exception) -> None:
        """Tells the leader why this rank ends, if it still listens."""
        writing.cancel()
        reason = getattr(error, "reason", EngineFailedError.reason)
        reason = SETTINGS if isinstance(error, SettingsError) else reason
        words = str(error) if isinstance(error, (StatusError, SettingsError)) else repr(error)
        failed = fault_to(EngineFault(reason, words))
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError, TimeoutError):
            async with asyncio.timeout(CONFESS_SECONDS):
                await call.write(pb.JoinRequest(failed=failed))
                await call.done_writing()

    def _say(self, message: pb.JoinRequest) -> None:
        self._said.put_nowait(message)

    def _say_soon(self, message: pb.JoinRequest) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(self._say, message)

    async def _write(self, call: Any) -> None:
        while True:
            await call.write(await self._said.get())

    async def _serve(
        self, messages: AsyncIterator[pb.JoinResponse], ready: Callable[[str], None]
    ) -> None:
        begin = await anext(messages)
        task = Task.from_json(begin.begin.settings)
        if task.engine.tensor_parallel > 1:
            await self._follow_steps(task, messages, ready)
            return
        engine = self._make(task, self._part(task))
        starting = asyncio.create_task(engine.start())
        following = asyncio.create_task(self._follow(messages, starting))
        try:
            await asyncio.wait((starting, following), return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                following.result()
            await starting
        except BaseException:
            following.cancel()
            raise
        self.engine = engine
        server = Server(self._server_settings, f"rank {self._settings.number}")
        server.add(
            kvtransfer_pb2_grpc.add_KvTransferServiceServicer_to_server,
            engine.kv.servicer,
            "tandem.kvtransfer.v1.KvTransferService",
        )
        address = await server.start()
        adapters = [wire.adapter_to(s.adapter) for s in engine.adapters()]
        # What comes before may not be missing in what the leader knows when it is told.
        self._report((), with_experts=True)
        self._say(
            pb.JoinRequest(
                ready=pb.Ready(info=wire.info_to(engine.info), address=address, adapters=adapters)
            )
        )
        ready(address)
        try:
            await self._live(engine, following)
        finally:
            await server.stop(0)

    async def _live(self, engine: SteppedEngine, following: asyncio.Task[None]) -> None:
        """Until Close, and then until the engine is closed."""
        parts = [
            asyncio.create_task(part)
            for part in (self._outputs(engine), self._reports(), self._keys(engine))
        ]
        try:
            done, _ = await asyncio.wait((following, *parts), return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
            if not following.done():
                raise EngineFailedError("the engine of this rank stopped")
            engine.check_integrity()
            await engine.close()
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)

    async def _follow_steps(
        self, task: Task, messages: AsyncIterator[pb.JoinResponse], ready: Callable[[str], None]
    ) -> None:
        """Has no engine, and computes along with the leader's, until Close."""

        def loaded() -> None:
            self._say_soon(pb.JoinRequest(following=pb.Following(loaded=True)))

        computing = self._on_thread(lambda: self._along(task, self._part(task), loaded))
        following = asyncio.create_task(self._until_close(messages))
        saying = asyncio.create_task(self._say_following())
        ready("")
        try:
            await asyncio.wait((computing, following), return_when=asyncio.FIRST_COMPLETED)
            if computing.done():
                computing.result()
            await following
            async with asyncio.timeout(END_SECONDS):
                await computing
        except (WorkerLostError, TimeoutError) as error:
            raise EngineFailedError(f"this rank's group ends: {error}") from error
        finally:
            following.cancel()
            saying.cancel()

    def _on_thread(self, work: Callable[[], None]) -> asyncio.Future[None]:
        """On a thread that the process does not wait for when it ends."""
        done: asyncio.Future[None] = self._loop.create_future()

        def tell(error: BaseException | None) -> None:
            if done.done():
                return
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        def run() -> None:
            try:
                work()
            except BaseException as error:  # told where it is waited for
                self._loop.call_soon_threadsafe(tell, error)
            else:
                self._loop.call_soon_threadsafe(tell, None)

        threading.Thread(target=run, name="computing", daemon=True).start()
        return done

    async def _until_close(self, messages: AsyncIterator[pb.JoinResponse]) -> None:
        async for message in messages:
            if message.HasField("store"):
                self._store.set_result(message.store.address)
            elif message.HasField("close"):
                return
        raise EngineFailedError("the leader ended")

    async def _say_following(self) -> None:
        while True:
            self._say(pb.JoinRequest(following=pb.Following()))
            await asyncio.sleep(FOLLOWING_SECONDS)

    def _part(self, task: Task) -> Part:
        return Part(
            rank=self._settings.number,
            ranks=max(task.engine.ranks, task.engine.tensor_parallel),
            host=self._server_settings.host,
            announce=lambda address: self._say_soon(
                pb.JoinRequest(store=pb.Store(address=address))
            ),
            find=self._store.result,
            want_round=lambda number: self._say_soon(
                pb.JoinRequest(round_wanted=pb.RoundWanted(round=number))
            ),
        )

    # Commands

    async def _follow(
        self, messages: AsyncIterator[pb.JoinResponse], starting: asyncio.Task[None]
    ) -> None:
        """Does what the leader says, until Close."""
        async for message in messages:
            kind = message.WhichOneof("message")
            if kind == "store":
                self._store.set_result(message.store.address)
            elif kind == "close":
                return
            else:
                assert self.engine is not None, f"{kind} before this rank was ready"
                if kind == "cancel":  # What came before is told first, under its number.
                    await asyncio.sleep(0)
                self._do(self.engine, kind, message)
        raise EngineFailedError("the leader ended")

    def _do(self, engine: SteppedEngine, kind: str | None, message: pb.JoinResponse) -> None:
        match kind:
            case "prefill" | "decode":
                self._begin(engine, message)
            case "proceed":
                p = message.proceed
                engine.proceed(p.request_id, FirstTokens(tuple(p.token_ids), p.handle))
            case "cancel":
                engine.cancel(message.cancel.request_id)
                self._numbers.pop(message.cancel.request_id, None)
            case "round":
                engine.call_round(message.round.round)
            case "expert_plan":
                # The leader has checked it against what all ranks have.
                engine.update_experts(*plan_from(message.expert_plan))
            case "load_adapter":
                task = asyncio.create_task(self._load_adapter(engine, message.load_adapter))
                self._loading.add(task)
                task.add_done_callback(self._loading.discard)
            case "unload_adapter":
                self._unload_adapter(engine, message.unload_adapter.name)

    def _begin(self, engine: SteppedEngine, message: pb.JoinResponse) -> None:
        """A refusal, of what the leader could not check, is the request's output."""
        self._taken += 1
        asked = message.prefill if message.HasField("prefill") else message.decode
        self._numbers[asked.request.request_id] = self._taken
        try:
            if message.HasField("prefill"):
                engine.prefill(*wire.prefill_from(message.prefill, engine.info.vocabulary))
            else:
                engine.decode(*wire.decode_from(message.decode, engine.info.vocabulary))
        except TandemError as error:
            refused = TokenOutput(
                asked.request.request_id,
                finish_reason=FinishReason.ERROR,
                error=EngineFault(error.reason, error.message, error.metadata),
            )
            self._report((refused,))

    async def _load_adapter(self, engine: SteppedEngine, asked: pb.LoadAdapter) -> None:
        answer = pb.AdapterLoaded(number=asked.number)
        try:
            adapter = await engine.load_adapter(asked.name, asked.path)
        except Exception as error:
            if not isinstance(error, StatusError):
                log.exception("LoRA adapter %s can't be loaded", asked.name)
                error = EngineFailedError(f"{asked.name}: {type(error).__name__}")
            fault = EngineFault(error.reason, error.message, error.metadata)
            answer.error.CopyFrom(fault_to(fault))
        else:
            answer.adapter.CopyFrom(wire.adapter_to(adapter))
        self._say(pb.JoinRequest(adapter_loaded=answer))

    def _unload_adapter(self, engine: SteppedEngine, name: str) -> None:
        try:
            engine.unload_adapter(name)
        except TandemError as error:  # where another rank could not load it, this one may not have
            log.info("LoRA adapter %s: %s", name, error.message)

    # What the leader is told

    async def _outputs(self, engine: SteppedEngine) -> None:
        async for step in engine.outputs():
            self._report(step.outputs)

    async def _reports(self) -> None:
        """Now and then, as leases end and blocks are freed without an output."""
        still = reports = 0
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            assert self.engine is not None
            still += 1
            if self.engine.stats() != self._told or still >= STILL_REPORTS:
                still = 0
                reports += 1
                self._report((), with_experts=reports % EXPERT_REPORTS == 0)

    def _report(self, outputs: tuple[TokenOutput, ...], *, with_experts: bool = False) -> None:
        assert self.engine is not None
        stats, before = self.engine.stats(), self._told
        self._told = stats
        tokens = stats.expert_tokens if with_experts else ()
        fresh = None if stats.expert_map == before.expert_map else stats.expert_map
        told = [
            wire.output_to(output, self._numbers[output.request_id])
            for output in outputs
            if output.request_id in self._numbers
        ]
        for output in outputs:
            if output.finish_reason is not None or output.prefill_done:
                self._numbers.pop(output.request_id, None)
        self._say(
            pb.JoinRequest(
                outputs=pb.Outputs(
                    outputs=told,
                    stats=stats_to(replace(stats, expert_tokens=tokens, expert_map=fresh)),
                    taken=self._taken,
                )
            )
        )

    async def _keys(self, engine: SteppedEngine) -> None:
        changes = engine.kv_events()
        async with aclosing(changes):  # type: ignore[type-var]
            async for events in changes:
                self._say(wire.events_to(events))
                await asyncio.sleep(COALESCE_SECONDS)


async def _messages(call: Any) -> AsyncIterator[pb.JoinResponse]:
    while isinstance(message := await call.read(), pb.JoinResponse):
        yield message
