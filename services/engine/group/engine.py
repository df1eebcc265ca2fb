"""The engine of a worker of several ranks: the leader's side.

It computes nothing. Requests go to the rank that the coordinator chose, and what ranks bring is
told as one engine's. If a rank is lost the others wait for it inside their model, for ever: so all
are ended, every request fails with an error that places it again, and outputs() ends; whoever runs
the worker starts it anew.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace

import grpc

from services.engine.adapters import (
    LINGER_SECONDS,
    Adapter,
    AdapterBooks,
    AdapterLimits,
    AdapterStatus,
)
from services.engine.admission import check_request
from services.engine.api import (
    EngineFault,
    EngineInfo,
    EngineStats,
    ExpertMap,
    ExpertMove,
    FinishReason,
    FirstTokens,
    Hold,
    KvEvents,
    KvPrefix,
    KvSource,
    Request,
    StepOutput,
    TokenOutput,
)
from services.engine.experts import check_plan
from services.engine.group import wire
from services.engine.group.forward import KvForwarder, Leases
from services.engine.group.keys import GroupKeys
from services.engine.group.launch import Launch
from services.engine.group.member import CHANNEL_OPTIONS, Given, Member, all_left, watch_silence
from services.engine.group.servicer import SETTINGS, GroupServicer
from services.engine.group.sums import differs, group_info, group_stats
from services.engine.group.task import Task
from services.engine.unread import Unread
from services.runtime.errors import (
    DuplicateRequestError,
    EngineFailedError,
    EngineOverloadedError,
    InvalidRequestError,
    WorkerLostError,
    by_reason,
)
from services.runtime.load import SettingsError
from services.runtime.server import Server
from services.runtime.settings import ServerSettings
from tandem.group.v1 import group_pb2 as pb
from tandem.group.v1 import group_pb2_grpc

log = logging.getLogger(__name__)

CLOSE_SECONDS = 10.0


class GroupEngine:
    """See api.Engine. `launch` starts the ranks; `server` is where they meet."""

    def __init__(
        self,
        task: Task,
        launch: Launch,
        server: ServerSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._task = task
        self._launch = launch
        self._clock = clock
        self._servicer = GroupServicer(task, self, range(task.engine.ranks))
        self._members = self._servicer.members
        self._server = Server(server, "group")
        self._keys = GroupKeys(len(self._members))
        self._leases = Leases()
        self._keys_changed: set[asyncio.Event] = set()
        self._live: dict[str, Given] = {}
        self._outputs = Unread()
        self._adapters = AdapterBooks(AdapterLimits.of(task.engine))
        self._questions = itertools.count(1)
        self._loading: set[asyncio.Task[Adapter]] = set()
        self._round = 0
        self._plan: ExpertMap | None = None
        """The last one given out."""
        self._closing = False
        self._failed = ""
        self._bad_setting = False
        self._ready = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        forwarder = KvForwarder(self._members, self._keys, self._leases)
        self.kv = SimpleNamespace(servicer=forwarder)
        """As SteppedEngine.kv: its servicer belongs on the worker's gRPC server."""

    # Life

    @property
    def info(self) -> EngineInfo:
        """Valid after start()."""
        return self._info

    async def start(self) -> None:
        """Has ranks started and waits until all are ready.

        Raises EngineFailedError if one ends before, or is not like the others; SettingsError.
        """
        self._server.add(
            group_pb2_grpc.add_GroupServiceServicer_to_server,
            self._servicer,
            "tandem.group.v1.GroupService",
        )
        try:
            address = await self._server.start()
            await self._launch.start(address, range(len(self._members)), self._ended)
            await self._ready.wait()
            if self._failed:
                raise (SettingsError if self._bad_setting else EngineFailedError)(self._failed)
        except BaseException:
            await self._end(0)
            raise
        self._info = group_info([m.info for m in self._members if m.info is not None])
        silence = self._task.engine.rank_silence_seconds
        watching = watch_silence(self._members, silence, self._clock, self._ended)
        self._watching = asyncio.create_task(watching)

    async def close(self) -> None:
        """Cancels what runs, frees everything, ends outputs(). Idempotent."""
        if self._closing:
            return
        for request_id in list(self._live):
            self.cancel(request_id)
        self._closing = True
        for member in self._members:
            member.send(pb.JoinResponse(close=pb.Close()))
        await self._end(0 if self._failed else CLOSE_SECONDS)
        self._outputs.end()
        self._tell_keys()

    async def _end(self, grace_seconds: float) -> None:
        self._closing = True
        if self._watching is not None:
            self._watching.cancel()
        await asyncio.gather(
            all_left(self._members, grace_seconds), self._launch.end(grace_seconds)
        )
        await self._server.stop(0)
        for member in self._members:
            if member.channel is not None:
                await member.channel.close()

    # Requests

    def prefill(self, request: Request, hold: Hold, prefix: KvPrefix | None = None) -> None:
        """Queues a prompt at its rank."""
        self._check(request)
        self._leases.note(request.request_id, request.dp_rank)
        self._give(request, wire.prefill_to(request, hold, prefix), len(request.token_ids))

    def decode(
        self, request: Request, source: KvSource | None, prefix: KvPrefix | None = None
    ) -> None:
        """Queues a request to generate for at its rank."""
        self._check(request)
        tokens = 0 if source is not None else len(request.token_ids)
        self._give(request, wire.decode_to(request, source, prefix), tokens)

    def proceed(self, request_id: str, first: FirstTokens) -> None:
        """Gives a request that decode() took with a source its first tokens."""
        given = self._live.get(request_id)
        if given is not None:
            self._members[given.rank].send(wire.proceed_to(request_id, first))

    def cancel(self, request_id: str) -> None:
        """Ends a request, without another output, and frees what it holds, leases included."""
        self._outputs.drop(request_id)
        given = self._forget(request_id)
        rank = self._leases.find(request_id) if given is None else given.rank
        members = self._members if rank is None else (self._members[rank],)
        for member in members:
            member.send(pb.JoinResponse(cancel=pb.Cancel(request_id=request_id)))
        self._leases.end(request_id)

    def _check(self, request: Request) -> None:
        if self._closing or self._failed:
            raise EngineFailedError(self._failed or "the engine has stopped")
        if request.request_id in self._live:
            raise DuplicateRequestError(
                f"request {request.request_id} is already here", request_id=request.request_id
            )
        check_request(request, self._info)
        engine = self._task.engine
        limit = engine.max_running + engine.max_waiting
        if sum(g.rank == request.dp_rank for g in self._live.values()) >= limit:
            raise EngineOverloadedError(
                f"{limit} requests are at rank {request.dp_rank} already", limit=limit
            )
        if request.adapter:
            self._adapters.check(request.adapter)

    def _give(self, request: Request, message: pb.JoinResponse, prompt_tokens: int) -> None:
        member = self._members[request.dp_rank]
        member.given += 1
        self._live[request.request_id] = Given(
            member.given, member.rank, prompt_tokens, request.adapter
        )
        if request.adapter:
            self._adapters.begin(request.adapter)
        member.send(message)

    def _forget(self, request_id: str) -> Given | None:
        """A request has ended, if it is live."""
        given = self._live.pop(request_id, None)
        if given is not None and given.adapter:
            self._adapters.end(given.adapter)
            self._sweep()
        return given

    # What ranks say

    def said(self, member: Member, message: pb.JoinRequest) -> None:
        """See servicer.Group."""
        member.heard = self._clock()
        match message.WhichOneof("message"):
            case "outputs":
                self._take(member, message.outputs)
            case "kv_events":
                self._keys.take(member.rank, wire.events_from(message.kv_events))
                self._tell_keys()
            case "round_wanted":
                self._call_round(message.round_wanted.round)
            case "adapter_loaded":
                self._answered(member, message.adapter_loaded)
            case "failed":
                self._bad_setting = message.failed.reason == SETTINGS
                self._ended(member.rank, message.failed.message)
            case "store":
                for other in self._members[1:]:
                    other.send(pb.JoinResponse(store=message.store))
            case "ready":
                self._is_ready(member, message.ready)
            case other:
                raise InvalidRequestError("message", other, "what a rank says that has joined")

    def _take(self, member: Member, message: pb.Outputs) -> None:
        member.taken = message.taken
        member.stats = wire.stats_from(message.stats, member.stats)
        outputs = []
        for said in message.outputs:
            given = self._live.get(said.request_id)
            if given is None or (given.rank, given.number) != (member.rank, said.number):
                continue  # cancelled meanwhile
            output = wire.output_from(said)
            outputs.append(output)
            if output.finish_reason is not None or output.prefill_done:
                self._forget(output.request_id)
        self._outputs.say(outputs)

    def _call_round(self, number: int) -> None:
        """Once for each: several ranks may want it."""
        if number > self._round:
            self._round = number
            for member in self._members:
                member.send(pb.JoinResponse(round=pb.Round(round=number)))

    def _is_ready(self, member: Member, message: pb.Ready) -> None:
        member.info = wire.info_from(message.info)
        for adapter in message.adapters:
            self._adapters.load(wire.adapter_from(adapter), self._clock())
        member.channel = grpc.aio.insecure_channel(message.address, options=CHANNEL_OPTIONS)
        infos = [m.info for m in self._members if m.info is not None]
        log.info("rank %d is ready; %d of %d are", member.rank, len(infos), len(self._members))
        if len(infos) < len(self._members):
            return
        different = differs(infos)
        if different:
            self._fail(f"ranks must be alike, and differ in {different}")
        self._ready.set()

    # Death

    def lost(self, member: Member, why: str) -> None:
        """See servicer.Group."""
        self._ended(member.rank, why)

    def _ended(self, rank: int, why: str) -> None:
        self._fail(f"rank {rank} of {len(self._members)} is lost: {why}")

    def _fail(self, why: str) -> None:
        """Everything ends, once. Requests go elsewhere with the words."""
        if self._closing or self._failed:
            return
        log.error("the group ends: %s", why)
        self._failed = why
        fault = EngineFault(WorkerLostError.reason, why)
        ends = tuple(
            TokenOutput(request_id, finish_reason=FinishReason.ERROR, error=fault)
            for request_id in self._live
        )
        self._live.clear()
        for member in self._members:
            for answer in member.answers.values():
                answer.set_exception(EngineFailedError(why))
            member.answers.clear()
            member.end()
        self._outputs.say(ends)
        self._outputs.end()
        self._tell_keys()
        self._ready.set()

    # Experts

    def update_experts(self, plan: ExpertMap, moves: Sequence[ExpertMove]) -> None:
        """Gives the plan to all ranks, which carry it out between steps."""
        shape, now = self._info.experts, self.stats().expert_map
        if shape is None or now is None:
            raise InvalidRequestError(
                "expert_plan", plan.plan, "this engine has no experts that can be moved"
            )
        if self._plan is not None and self._plan != now:
            raise InvalidRequestError(
                "expert_plan", plan.plan, f"plan {self._plan.plan} is still being carried out"
            )
        check_plan(shape, now, plan, moves)
        self._plan = plan
        for member in self._members:
            member.send(wire.plan_to(plan, moves))

    # Adapters

    async def load_adapter(self, name: str, path: str) -> Adapter:
        """Has every rank take in a LoRA adapter; if one can't, none has it.

        Once asked for it is loaded, though the caller is cancelled: ranks go on, too.
        """
        if self._failed:
            raise EngineFailedError(self._failed)
        loading = asyncio.create_task(self._load_adapter(name, path))
        self._loading.add(loading)
        loading.add_done_callback(self._loaded)
        return await asyncio.shield(loading)

    def _loaded(self, loading: asyncio.Task[Adapter]) -> None:
        self._loading.discard(loading)
        if not loading.cancelled():
            loading.exception()  # The caller may not be there to be told.

    async def _load_adapter(self, name: str, path: str) -> Adapter:
        question, loop = next(self._questions), asyncio.get_running_loop()
        answers: list[asyncio.Future[Adapter]] = []
        for member in self._members:
            answers.append(loop.create_future())
            member.answers[question] = answers[-1]
            member.send(
                pb.JoinResponse(load_adapter=pb.LoadAdapter(number=question, name=name, path=path))
            )
        found = await asyncio.gather(*answers, return_exceptions=True)
        errors = [f for f in found if isinstance(f, BaseException)]
        if errors and len(errors) < len(found):
            self._send_unload(name)
        if errors:
            raise errors[0]
        adapter = answers[0].result()
        self._adapters.load(adapter, self._clock())
        loop.call_later(LINGER_SECONDS + 0.1, self._sweep)
        return adapter

    def _answered(self, member: Member, message: pb.AdapterLoaded) -> None:
        answer = member.answers.pop(message.number)
        if answer.done():
            return
        if message.HasField("error"):
            e = message.error
            answer.set_exception(by_reason(e.reason, e.message, dict(e.metadata)))
        else:
            answer.set_result(wire.adapter_from(message.adapter))

    def unload_adapter(self, name: str) -> list[AdapterStatus]:
        """Has every rank take no new requests with it."""
        leaving = self._adapters.unload(name)
        self._sweep()
        self._send_unload(name)
        return leaving

    def _send_unload(self, name: str) -> None:
        for member in self._members:
            member.send(pb.JoinResponse(unload_adapter=pb.UnloadAdapter(name=name)))

    def adapters(self) -> list[AdapterStatus]:
        """All that are held, those that leave included."""
        return self._adapters.status()

    def _sweep(self) -> None:
        """Ranks do so too, each for itself."""
        self._adapters.take_gone(self._clock())

    # What others read

    def outputs(self) -> AsyncIterator[StepOutput]:
        """All that comes of requests. One consumer."""
        return self._outputs.read()

    async def kv_events(self) -> AsyncIterator[KvEvents]:
        """Starts with a snapshot; then changes, coalesced. Each call is a reader of its own."""
        reader, changed = self._keys.begin(), asyncio.Event()
        self._keys_changed.add(changed)
        try:
            while not (self._closing or self._failed):
                events = self._keys.read(reader)
                if events is not None:
                    yield events
                await changed.wait()
                changed.clear()
        finally:
            self._keys_changed.discard(changed)
            self._keys.end(reader)

    def _tell_keys(self) -> None:
        for changed in self._keys_changed:
            changed.set()

    def stats(self) -> EngineStats:
        """Now, as far as ranks have said."""
        live: list[list[Given]] = [[] for _ in self._members]
        for given in self._live.values():
            live[given.rank].append(given)
        stats = group_stats([m.load(live[m.rank]) for m in self._members], self._info)
        return replace(stats, adapters=self._adapters.listed)

    def check_integrity(self) -> None:
        """By what ranks have said; each proves its own books when it ends."""
        stats, info = self.stats(), self._info
        assert stats.free_blocks + stats.held_blocks == info.total_blocks, (stats, info)
