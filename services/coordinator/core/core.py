"""The coordinator's decisions: handle(event, now) -> commands, and nothing else.

All state is soft. A core that starts afresh learns its workers within a lease, since they register
again; until then requests wait instead of being told that nobody is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from services.coordinator.core import messages as m
from services.coordinator.core.balance import Balance
from services.coordinator.core.candidates import View
from services.coordinator.core.desk import Desk
from services.coordinator.core.expert_plans import ExpertPlanner
from services.coordinator.core.feed import KvFeed, Verdict
from services.coordinator.core.health import Health
from services.coordinator.core.index import PrefixIndex
from services.coordinator.core.load import Load
from services.coordinator.core.membership import Members, Signal, Standing, Worker
from services.coordinator.core.outlook import kind_of
from services.coordinator.core.pools import Pools
from services.coordinator.core.predict import Predictor
from services.coordinator.core.regions import Regions
from services.coordinator.core.rules import Rules
from services.coordinator.core.sessions import Sessions

SWEPT_AT_ONCE = 1 << 18
"""Places of the index that a tick looks at for blocks that nobody holds any more."""

WORKER_FULL = frozenset({"ENGINE_OVERLOADED", "DRAINING", "ROLE_CHANGED"})
"""Failures by which a worker says that it takes nothing now."""

WORKER_SILENT = "WORKER_SILENT"
"""It accepted, and then sent nothing."""

NOT_ITS_FAULT = WORKER_FULL | {
    *("DEADLINE", "INVALID_REQUEST", "DUPLICATE_REQUEST", "UNKNOWN_MODEL", "CANCELLED"),
    *("UNKNOWN_ADAPTER", "ADAPTER_NOT_LOADED", "ADAPTER_FAILED", "GUIDE_FAILED"),
    *("LAYOUT_MISMATCH", "NO_TRANSPORT", "KV_REGION_DENIED", "KV_WRONG_TENANT"),
}
"""Failures that say nothing of a worker's health: it is full, it is the request, or it is the two
workers together."""


class Core:
    """See the module's docstring. `draw` gives numbers in [0, 1); `now` never goes back."""

    def __init__(self, rules: Rules, now: float, draw: Callable[[], float]) -> None:
        self.members = Members()
        self.index = PrefixIndex()
        self.pools = Pools()
        self.predictor = Predictor()
        self.experts = ExpertPlanner(rules.experts)
        self.balance = Balance(rules.rebalance_seconds)
        self.decides = True
        """Of several coordinators, the one that has workers change roles."""
        self.started = now
        self.kv_bytes_gone = 0
        """Fetched by workers that have left."""
        view = View(self.index, self.predictor, Regions(rules.region_seconds), Sessions())
        self.desk = Desk(rules, self.members, self.pools, view, now, draw)
        self._out = self.desk.out
        self._rules = rules
        self._health = Health(stale_seconds=rules.lease_seconds / 2)
        self._ticked = now
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            m.WorkerHello: self._hello,
            m.WorkerHeartbeat: self._heartbeat,
            m.WorkerKvEvents: self._kv_events,
            m.WorkerDraining: self._draining,
            m.WorkerRoleChanged: self._role_changed,
            m.StreamLost: self._stream_lost,
            m.PlaceRequested: self.desk.place,
            m.PlaceCancelled: self.desk.cancel,
            m.AttemptEnded: self._attempt_ended,
            m.Tick: self._tick,
        }

    def handle(self, event: m.Event, now: float) -> list[m.Command]:
        """Takes in what happened, and says what is to be done about it, in order."""
        self._handlers[type(event)](event, now)
        return self.decided()

    def decided(self) -> list[m.Command]:
        """What handle() had decided when it raised: once, and not with the next event's."""
        commands = self._out[:]
        self._out.clear()
        return commands

    # Workers

    def _hello(self, event: m.WorkerHello, now: float) -> None:
        info = event.info
        known = self.members.get(info.worker_id)
        standing, load = Standing.GONE, Load(info, event.stats)
        if known is not None:
            standing = Standing.DRAINING if known.standing is Standing.DRAINING else Standing.GONE
            if known.load.fits_shape(info):
                load = known.load
                load.info = info
                load.report(event.stats, now)
        self._make_way(event, now)
        worker = Worker(
            info=info,
            stream=event.stream,
            load=load,
            feed=KvFeed(patience=self._rules.lease_seconds, asked=now),
            bit=self.index.add(info.worker_id),
            heard=now,
            expires=now + self._rules.lease_seconds,
            standing=standing,
        )
        worker.signal(Signal.HELLO)
        self.members.add(worker)
        self._health.registered(info, kind_of(worker), now)
        self._measure(worker, event.stats, now)
        self.pools.put(worker)
        self.desk.serves(info.model)
        self._out.append(m.GrantLease(event.stream, self._rules.lease_seconds))
        self._watch_experts(worker, event.stats, now)
        self.desk.serve(info.model, now)

    def _make_way(self, event: m.WorkerHello, now: float) -> None:
        """Ends the memberships that a new one takes the place of."""
        new = event.info
        former = (self.members.on_stream(event.stream), self.members.get(new.worker_id))
        usurped = self.members.at_address(new.address)
        for worker, why in (
            (former[0], "its stream says Hello for another worker"),
            (former[1], "it registered anew"),
            (usurped, f"{new.worker_id} is at its address now"),
        ):
            if worker is not None and self.members.get(worker.worker_id) is worker:
                self._leave(worker, why, now, tell=worker.stream != event.stream)

    def _heartbeat(self, event: m.WorkerHeartbeat, now: float) -> None:
        worker = self._renew(event.stream, now)
        if worker is None:
            return
        load = worker.load
        room, blocks, fit = load.room, load.free_blocks, load.fit_blocks
        adapters = load.stats.adapters
        load.report(event.stats, now)
        changed = adapters != load.stats.adapters
        if changed:
            # Some may wait for one that is gone.
            self.desk.recheck = True
        self._watch_experts(worker, event.stats, now)
        self._measure(worker, event.stats, now)
        back = worker.signal(Signal.HEARD)
        self.pools.put(worker)
        grown = load.room > room or load.free_blocks > blocks or load.fit_blocks > fit
        if back or changed or grown:
            self.desk.serve(worker.info.model, now, by=worker)

    def _measure(self, worker: Worker, stats: m.WorkerStats, now: float) -> None:
        """Takes note of how fast it is, and whether it is better avoided."""
        kind = kind_of(worker)
        measured = self.predictor.heard(worker.info, kind, stats, now)
        self._health.heard(worker.worker_id, kind, measured, now)
        worker.avoided = self._health.avoided(worker.worker_id, now)

    def _shun(self, worker_id: str, now: float) -> None:
        worker = self.members.get(worker_id)
        if worker is not None:
            worker.avoided = self._health.avoided(worker_id, now)
            self.pools.put(worker)

    def _watch_experts(self, worker: Worker, stats: m.WorkerStats, now: float) -> None:
        """Has the worker's experts placed anew if that is worth it."""
        shape = worker.info.experts
        if shape is None:
            return
        plan = self.experts.observe(worker.worker_id, shape, stats, now)
        if plan is not None:
            self._out.append(m.AskExperts(worker.stream, plan.map, plan.moves, plan.why))

    def _kv_events(self, event: m.WorkerKvEvents, now: float) -> None:
        worker = self._renew(event.stream, now)
        if worker is None:
            return
        verdict = worker.feed.accept(event.sequence, event.snapshot, now)
        if verdict is Verdict.RESYNC:
            self._out.append(m.AskResync(worker.stream))
        elif verdict is Verdict.REPLACE:
            self.index.replace(worker.worker_id, event.stored, event.lower)
        elif verdict is Verdict.APPLY:
            self.index.remove(worker.worker_id, event.removed)
            self.index.lower(worker.worker_id, event.lower)
            self.index.store(worker.worker_id, event.stored)
        if worker.signal(Signal.HEARD):
            self.pools.put(worker)
            self.desk.serve(worker.info.model, now)

    def _draining(self, event: m.WorkerDraining, now: float) -> None:
        worker = self._renew(event.stream, now)
        if worker is not None and worker.signal(Signal.DRAIN):
            self.desk.misses(worker, now)
            self.pools.put(worker)

    def _role_changed(self, event: m.WorkerRoleChanged, now: float) -> None:
        worker = self._renew(event.stream, now)
        if worker is None or worker.info.role is event.role:
            return
        if worker.info.role.decodes and not event.role.decodes:
            self.desk.misses(worker, now)
        worker.take_role(event.role)
        self.balance.role_changed(worker, now)
        self.pools.put(worker)
        self.desk.recheck = True
        self.desk.serve(worker.info.model, now)

    def _stream_lost(self, event: m.StreamLost, now: float) -> None:
        worker = self.members.on_stream(event.stream)
        if worker is not None:
            self._leave(worker, "its stream broke", now, tell=False)

    def _renew(self, stream: int, now: float) -> Worker | None:
        worker = self.members.on_stream(stream)
        if worker is not None:
            worker.heard, worker.expires = now, now + self._rules.lease_seconds
        return worker

    def _leave(self, worker: Worker, why: str, now: float, *, tell: bool = True) -> None:
        worker.signal(Signal.LOST)
        self.kv_bytes_gone += sum(worker.load.stats.kv_bytes.values())
        self.desk.misses(worker, now)
        self.pools.put(worker)
        self.members.remove(worker)
        self.index.forget(worker.worker_id)
        self.experts.forget(worker.worker_id)
        self.predictor.forget(worker.worker_id)
        self._health.forget(worker.worker_id)
        if tell:
            self._out.append(m.DropWorker(worker.stream, worker.worker_id, why))

    def _attempt_ended(self, event: m.AttemptEnded, now: float) -> None:
        failed = self.members.get(event.failed_worker)
        if failed is not None:
            self._note_failure(failed, event, now)
        self.desk.ended(event, now)

    def _note_failure(self, failed: Worker, event: m.AttemptEnded, now: float) -> None:
        if event.unreachable and failed.signal(Signal.UNREACHABLE):
            self.desk.misses(failed, now)
        if event.failure in WORKER_FULL:
            failed.load.refuse()
        elif event.failure not in NOT_ITS_FAULT:
            self._health.failed(failed.worker_id, now, silent=event.failure == WORKER_SILENT)
            failed.avoided = self._health.avoided(failed.worker_id, now)
        self.pools.put(failed)

    # Time

    def _tick(self, event: m.Tick, now: float) -> None:
        self._end_leases(now)
        self.index.sweep(SWEPT_AT_ONCE)
        for worker in self.members:
            if worker.feed.overdue(now):
                self._out.append(m.AskResync(worker.stream))
        for name in self._health.unheard(now):
            self._shun(name, now)
        self.desk.tick(now)
        if self.desk.settled:
            pools = self.pools.all()
            self._out += self.balance.review(pools, self.desk.queued, now, decides=self.decides)

    def _end_leases(self, now: float) -> None:
        if now - self._ticked > self._rules.lease_seconds / 2:
            # It was this process that was away: what workers sent meanwhile is still to be read.
            for worker in self.members:
                worker.expires = now + self._rules.lease_seconds
                worker.feed.asked = now
        self._ticked = now
        for worker in self.members.expired(now):
            self._leave(worker, f"silent for {now - worker.heard:.1f} s", now)

    def check_integrity(self) -> None:
        """Every view of the same fact agrees; raises AssertionError."""
        self.index.check_integrity()
        for worker in self.members:
            worker.load.check_integrity()
            assert worker.standing is not Standing.GONE
        up = [w for w in self.members if w.standing is Standing.UP]
        pools = self.pools.all()
        prefill = sorted(name for pool in pools for name in pool.prefill.up)
        decode = sorted(name for pool in pools for name in pool.decode.up)
        words = "pools differ from the members that are up"
        assert prefill == sorted(w.worker_id for w in up if w.info.role.prefills), words
        assert decode == sorted(w.worker_id for w in up if w.info.role.decodes), words
        assert len(self.desk.queue) <= self.desk.queue.limit
