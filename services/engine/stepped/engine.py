"""The Engine protocol over a model that is stepped: the event loop's side.

Requests go through an inbox to the step thread, which owns them; results come back by one
call_soon_threadsafe a step. Fetches run here, between the two, while the thread computes others.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from kvtransfer.bandwidth import Bandwidth
from kvtransfer.endpoint import KvEndpoint
from kvtransfer.keys import KeyChain, salt
from kvtransfer.policy import ExportPolicy
from kvtransfer.store import KvStore
from services.engine.adapters import Adapter, AdapterStatus
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
    RankStats,
    Request,
    StepOutput,
    TokenOutput,
)
from services.engine.experts import check_plan
from services.engine.guides.compiling import Guides
from services.engine.stepped.adapters import EngineAdapters
from services.engine.stepped.batch import LoadedModel
from services.engine.stepped.fetching import Fetching
from services.engine.stepped.guiding import Guiding
from services.engine.stepped.inbox import (
    Cancel,
    Close,
    Command,
    Inbox,
    Proceed,
    Submit,
)
from services.engine.stepped.opening import MEBIBYTE, context_window, open_tiers_of
from services.engine.stepped.sequence import Limits, Role, Sequence
from services.engine.stepped.step import Load, Stepper, StepResult
from services.engine.stepped.thread import StepThread
from services.engine.unread import Unread
from services.runtime import milestones
from services.runtime.errors import (
    DuplicateRequestError,
    EngineFailedError,
    EngineOverloadedError,
    InvalidRequestError,
    WorkerLostError,
)
from services.runtime.settings import EngineSettings, KvSettings

log = logging.getLogger(__name__)

PEERS_REPORTED = 8
"""Peers that most KV came from; the report goes out several times a second."""


@dataclass(slots=True)
class _Request:
    """A live request as the event loop knows it."""

    serial: int
    prompt_tokens: int
    """Still to be computed here, as far as is known."""
    dp_rank: int = 0
    adapter: str = ""
    order: int | None = None
    """Of requests put into the inbox; None: its guide is being compiled."""
    proceeded: float | None = None
    """When its first tokens came from prefill: since then it waits for its KV alone."""


class SteppedEngine:
    """See api.Engine; `load` is called once, off the event loop."""

    kv: KvEndpoint
    """After start(): the hand-off's end of this engine; its servicer belongs on a gRPC server."""

    def __init__(
        self,
        load: Callable[[], LoadedModel],
        engine: EngineSettings,
        kv: KvSettings,
        *,
        host: str,
        policy: ExportPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._load = load
        self._settings = engine
        self._kv_settings = kv
        self._host = host
        self._policy = policy or ExportPolicy()
        self._bandwidth = Bandwidth()
        self._clock = clock
        self._inbox = Inbox()
        self._serials = itertools.count(1)
        self._orders = itertools.count(1)
        self._live: dict[str, _Request] = {}
        self._outputs = Unread()
        self._kv_readers: set[asyncio.Event] = set()
        self._kv_told = False
        self._started = self._stopped = False

    @property
    def info(self) -> EngineInfo:
        """Valid after start()."""
        return self._info

    async def start(self) -> None:
        """Loads the model, opens the pool and its endpoint, starts to step.

        If that fails nothing of it is left.
        """
        self._loop = asyncio.get_running_loop()
        loaded, self._store, window = await asyncio.to_thread(self._open)
        async with contextlib.AsyncExitStack() as begun:
            begun.push_async_callback(self._close_store)
            await self._begin(loaded, window, begun)
            begun.pop_all()

    async def _begin(
        self, loaded: LoadedModel, window: int, begun: contextlib.AsyncExitStack
    ) -> None:
        store, self._name = self._store, loaded.name
        settings, kv = self._settings, self._kv_settings
        self.kv = KvEndpoint(
            store,
            transports=kv.transports,
            tcp_host=kv.tcp_host or self._host,
            tcp_port=kv.tcp_port,
            lease_seconds=kv.lease_seconds,
            fetch_timeout_seconds=kv.fetch_timeout_seconds,
            stall_seconds=kv.stall_seconds,
            policy=self._policy,
            clock=self._clock,
        )
        begun.push_async_callback(self.kv.close)
        await self.kv.start()
        self._info = EngineInfo(
            model=loaded.name,
            layout=store.layout,
            context_tokens=window,
            total_blocks=store.total_blocks,
            max_running=settings.max_running,
            vocabulary=loaded.vocabulary,
            eos_token_ids=loaded.eos_token_ids,
            numerics=loaded.model.numerics,
            kv_transports=self.kv.offered,
            kv_not_offered=self.kv.not_offered,
            dp_ranks=loaded.dp_ranks,
            experts=None if loaded.experts is None else loaded.experts.shape,
        )
        self._experts = loaded.experts
        self._adapters.begin(self._inbox)
        self._stepper = Stepper(
            loaded.model,
            store,
            settings,
            Limits(window, frozenset(loaded.eos_token_ids)),
            recompute_max_tokens=kv.recompute_max_tokens,
            bandwidth=self._bandwidth,
            clock=self._clock,
            dp_ranks=loaded.dp_ranks,
            adapters=loaded.adapters,
            drafter=loaded.drafter,
            rounds=loaded.rounds,
        )
        self._fetching = Fetching(
            self.kv,
            store,
            kv,
            self._bandwidth,
            self._clock,
            rate=lambda: self._stepper.load.prefill_tokens_per_second,
            proceeded=self._proceeded,
            put=self._inbox.put,
        )
        guides = Guides(loaded.tokens, loaded.vocabulary, loaded.eos_token_ids)
        self._guiding = Guiding(guides, self._put, self._refused)
        self._thread = StepThread(self._stepper, self._inbox, self._post, self._died)
        store.on_change(self._store_changed)
        self._thread.start()
        self._started = True

    async def close(self) -> None:
        """Cancels what runs, frees everything, ends outputs(). Idempotent."""
        started, self._started = self._started, False
        self._stopped = True
        if not started:
            return
        for request_id in list(self._live):
            self.cancel(request_id)
        self._guiding.guides.close()
        # The thread ends when it holds nothing; what is being fetched stops by its asking.
        self._inbox.put(Close())
        await asyncio.to_thread(self._thread.join)
        await self._fetching.close()
        await self.kv.close()
        await self._close_store()
        self._wake_kv_readers()
        self._outputs.end()

    async def _close_store(self) -> None:
        if self._store.tiers is not None:
            await asyncio.to_thread(self._store.tiers.close)
        self._store.close()

    def prefill(self, request: Request, hold: Hold, prefix: KvPrefix | None = None) -> None:
        """Queues a prompt; its lease exists from now on."""
        self._check(request)
        self._store.open_lease(request.request_id, hold.seconds, request.tenant)
        self._submit(request, Role.PREFILL, None, prefix)

    def decode(
        self, request: Request, source: KvSource | None, prefix: KvPrefix | None = None
    ) -> None:
        """Queues a request to generate for."""
        self._check(request)
        self._submit(request, Role.DECODE, source, prefix)

    def proceed(self, request_id: str, first: FirstTokens) -> None:
        """Gives a request that decode() took with a source its first tokens."""
        live = self._live.get(request_id)
        if live is not None:
            live.proceeded = self._clock()
            self._guiding.proceed(Proceed(live.serial, first.token_ids, live.proceeded))

    def cancel(self, request_id: str) -> None:
        """Ends a request, without another output, and frees what it holds, leases included."""
        self._outputs.drop(request_id)
        live = self._live.pop(request_id, None)
        if live is None:
            self._store.release_lease(request_id)
            return
        held = self._guiding.cancel(live.serial)
        if held is None:
            self._inbox.put(Cancel(live.serial, request_id))
        else:
            self._release(held)
        self._adapters.end(live.adapter)  # Which may drop its weights: after the last step with it.

    def update_experts(self, plan: ExpertMap, moves: Seq[ExpertMove]) -> None:
        """Copies experts until they are where the plan says, between two steps."""
        experts = self._experts
        if experts is None:
            raise InvalidRequestError(
                "expert_plan", plan.plan, "this engine has no experts that can be moved"
            )
        check_plan(experts.shape, experts.map, plan, moves)
        experts.move(plan, moves)
        self._inbox.nudge()

    def call_round(self, number: int) -> None:
        """Another rank waits for this round: see rounds.py."""
        self._stepper.rounds.called(number)
        self._inbox.nudge()

    async def load_adapter(self, name: str, path: str) -> Adapter:
        """Takes in a LoRA adapter from below engine.adapter_folder; requests may have it then."""
        return await self._adapters.load(name, path)

    def unload_adapter(self, name: str) -> list[AdapterStatus]:
        """Takes no new requests with it; it is gone when those that have it have ended."""
        return self._adapters.unload(name)

    def adapters(self) -> list[AdapterStatus]:
        """All that are held, those that leave included."""
        return self._adapters.status()

    def outputs(self) -> AsyncIterator[StepOutput]:
        """All that comes of requests. One consumer."""
        return self._outputs.read()

    async def kv_events(self) -> AsyncIterator[KvEvents]:
        """Starts with a snapshot; then changes, coalesced. Each call is a reader of its own."""
        log, changed = self._store.begin_log(), asyncio.Event()
        self._kv_readers.add(changed)
        try:
            while not self._stopped:
                self._kv_told = False
                events = self._store.events(log)
                if events:
                    yield KvEvents(events.stored, events.removed, events.snapshot, events.lower)
                await changed.wait()
                changed.clear()
        finally:
            self._kv_readers.discard(changed)
            self._store.end_log(log)

    def _wake_kv_readers(self) -> None:
        for changed in self._kv_readers:
            changed.set()

    def stats(self) -> EngineStats:
        """Now."""
        load, store = self._stepper.load, self._store.stats()
        counters, fetched = self.kv.counters, self.kv.stats
        unseen = sum(request.prompt_tokens for request in self._unseen(load))
        return EngineStats(
            running=load.running,
            waiting=max(0, len(self._live) - load.running),
            free_blocks=store.free + store.cached,
            held_blocks=store.held,
            cached_blocks=store.cached,
            queued_tokens=load.queued_tokens + unseen,
            prefill_tokens_per_second=load.prefill_tokens_per_second,
            step_seconds=load.step_seconds,
            finished=load.finished,
            preempted=load.preempted,
            corrupt_blocks=counters.corrupt,
            leases=store.leases,
            kv_bytes=counters.bytes,
            kv_traffic=(*fetched.transports, *fetched.peers(PEERS_REPORTED)),
            kv_refused=counters.refused,
            leases_expired=store.expired,
            kv_tiers=store.tiers,
            ranks=self._ranks(load),
            adapters=self._adapters.listed,
            draft_tokens=load.draft_tokens,
            accepted_tokens=load.accepted_tokens,
            decode_steps=load.decode_steps,
            expert_tokens=() if self._experts is None else self._experts.tokens(),
            expert_map=None if self._experts is None else self._experts.map,
        )

    def _ranks(self, load: Load) -> tuple[RankStats, ...]:
        """The step thread's figures, and what is on its way to it."""
        ranks = list(load.ranks)
        if not ranks:
            return ()
        for request in self._unseen(load):
            of = ranks[request.dp_rank]
            ranks[request.dp_rank] = replace(
                of,
                waiting=of.waiting + 1,
                queued_tokens=of.queued_tokens + request.prompt_tokens,
            )
        return tuple(ranks)

    def _unseen(self, load: Load) -> Iterator[_Request]:
        """Those that the step thread has not taken in yet, or that wait for their guides."""
        for request in self._live.values():
            if request.order is None or request.order > load.taken:
                yield request

    def check_integrity(self) -> None:
        """Proves the pool's books (free + cached + held = total); raises AssertionError."""
        self._store.check_integrity()

    # Requests

    def _check(self, request: Request) -> None:
        if self._stopped:
            raise EngineFailedError("the engine has stopped")
        if request.request_id in self._live:
            raise DuplicateRequestError(
                f"request {request.request_id} is already here", request_id=request.request_id
            )
        limit = self._settings.max_running + self._settings.max_waiting
        if len(self._live) >= limit:
            raise EngineOverloadedError(f"{limit} requests are here already", limit=limit)
        check_request(request, self._info)
        self._adapters.check(request.adapter)
        self._guiding.guides.check(request)

    def _submit(
        self, request: Request, role: Role, source: KvSource | None, prefix: KvPrefix | None
    ) -> None:
        layout = self._store.layout
        salted = salt(self._name, layout.fingerprint, request.tenant, request.adapter)
        chain = KeyChain(salted, layout.block_tokens)
        serial = next(self._serials)
        prefix = prefix if self._kv_settings.prefix_fetch else None
        sequence = Sequence.of(serial, request, role, chain, source, prefix)
        if request.deadline_seconds is not None:
            sequence.deadline = self._clock() + request.deadline_seconds
        self._live[request.request_id] = _Request(
            serial, 0 if source else sequence.context, request.dp_rank, request.adapter
        )
        self._adapters.use(request.adapter)
        self._guiding.submit(sequence)

    def _put(self, command: Command) -> None:
        if isinstance(command, Submit):
            self._live[command.sequence.request.request_id].order = next(self._orders)
        self._inbox.put(command)

    def _refused(self, sequence: Sequence, fault: EngineFault) -> None:
        """A request whose guide is of no use ends before the step thread has heard of it."""
        output = TokenOutput(
            sequence.request.request_id, finish_reason=FinishReason.ERROR, error=fault
        )
        self._release(sequence)
        self._take(StepResult(outputs=[(sequence.serial, output)]))

    def _release(self, sequence: Sequence) -> None:
        """Gives back what a sequence holds that never got to the step thread."""
        if sequence.role is Role.PREFILL:
            self._store.release_lease(sequence.request.request_id)
        if sequence.source is not None:
            self.kv.release(sequence.source.address, sequence.source.lease_id)

    # Results

    def _post(self, result: StepResult) -> None:
        self._soon(self._take, result)

    def _soon(self, callback: Callable[..., None], *arguments: object) -> None:
        """From any thread. The loop may be gone by then, if the process is going down."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *arguments)

    def _take(self, result: StepResult) -> None:
        for fetch in result.fetches:
            self._fetching.begin(fetch)
        for serial in result.stop_fetches:
            self._fetching.stop(serial)
        outputs = []
        for serial, output in result.outputs:
            live = self._live.get(output.request_id)
            if live is None or live.serial != serial:
                continue  # cancelled while it was computed
            outputs.append(output)
            if output.finish_reason is not None or output.prefill_done:
                del self._live[output.request_id]
                self._adapters.end(live.adapter)
        self._outputs.say(outputs)

    def _died(self, error: Exception) -> None:
        self._soon(self._give_up, error)

    def _give_up(self, error: Exception) -> None:
        """The step thread is dead: everything fails, and outputs() ends. Once."""
        if self._stopped:
            return
        why = error.message if isinstance(error, WorkerLostError) else type(error).__name__
        fault = EngineFault(WorkerLostError.reason, f"the engine stopped: {why}")
        ends = [
            TokenOutput(request_id, finish_reason=FinishReason.ERROR, error=fault)
            for request_id in self._live
        ]
        self._live.clear()
        self._stopped = True
        self._outputs.say(ends)
        self._outputs.end()

    def _proceeded(self, request_id: str) -> float | None:
        live = self._live.get(request_id)
        return None if live is None else live.proceeded

    # The KV plane

    def _store_changed(self) -> None:
        """Any thread, often: tells whoever can have use for it, once."""
        if not self._thread.current:
            self._inbox.nudge()
        if not self._kv_told:
            self._kv_told = True
            self._soon(self._wake_kv_readers)

    def _open(self) -> tuple[LoadedModel, KvStore, int]:
        """Everything slow about a start, not on the event loop: model, pool, context window."""
        loaded = self._load()
        self._adapters = EngineAdapters(loaded.adapters, self._settings, self._clock)
        layout = loaded.model.layout
        blocks = self._settings.kv_blocks
        blocks = blocks or self._settings.kv_memory_mib * MEBIBYTE // layout.block_bytes
        pieces = min(self._kv_settings.layers_per_piece, layout.layers)
        store = KvStore(layout, blocks, layers_per_piece=pieces, clock=self._clock)
        window = context_window(loaded.context_tokens, self._settings, store)
        loaded.model.bind(store.memory)
        loaded.model.warm_up()
        milestones.reached(milestones.WARM)
        self._adapters.load_first()
        open_tiers_of(store, loaded.model.numerics, self._kv_settings, self._clock)
        return loaded, store, window
