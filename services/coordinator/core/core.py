"""The coordinator's decisions: handle(event, now) -> commands, and nothing else.

All state is soft. A core that starts afresh learns its workers within a lease, since they register
again; until then requests wait instead of being told that nobody is there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from services.coordinator.core import messages as m
from services.coordinator.core.admission import PATIENCE_SECONDS, PlacementRate, Queue, Waiting
from services.coordinator.core.balance import Balance, Queued
from services.coordinator.core.candidates import View
from services.coordinator.core.expert_plans import ExpertPlanner, ExpertRules
from services.coordinator.core.explain import Explanations
from services.coordinator.core.fairness import Charge
from services.coordinator.core.feed import KvFeed, Verdict
from services.coordinator.core.health import Health
from services.coordinator.core.index import PrefixIndex
from services.coordinator.core.load import AttemptId, Booking, Load
from services.coordinator.core.membership import Members, Signal, Standing, Worker
from services.coordinator.core.outlook import kind_of
from services.coordinator.core.placement import (
    Blocked,
    Decision,
    Limits,
    Outcome,
    Placer,
    refusal,
)
from services.coordinator.core.pools import Pool, Pools
from services.coordinator.core.predict import Forecast, Predictor, unattainable
from services.coordinator.core.regions import Regions
from services.coordinator.core.scoring import Candidate
from services.coordinator.core.sessions import Sessions

ATTEMPTS_REMEMBERED = 1 << 16
"""Placed attempts whose end is still of interest. The oldest is forgotten beyond: its end then
frees capacity with the worker's next report instead of at once."""

SWEPT_AT_ONCE = 1 << 18
"""Places of the index that a tick looks at for blocks that nobody holds any more."""

WORKER_FULL = frozenset({"ENGINE_OVERLOADED", "DRAINING", "ROLE_CHANGED"})
"""Failures by which a worker says that it takes nothing now."""

WORKER_SILENT = "WORKER_SILENT"
"""It accepted, and then sent nothing."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What an operator decides."""

    lease_seconds: float
    queue_limit: int
    local_prefill_tokens: int
    worker_wait_seconds: float = 0.0
    rebalance_seconds: float = 0.0
    experts: ExpertRules = field(default_factory=ExpertRules)
    ttft_seconds: float = 0.0
    """Service level of requests that ask for none; 0: none."""
    itl_seconds: float = 0.0
    """The same."""
    explain_decisions: int = 4096
    region_seconds: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """Round-trip times between regions."""
    queue_patience_seconds: float = PATIENCE_SECONDS
    tenant_weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Attempt:
    """Where an attempt was placed."""

    decode: str
    prefill: str
    blocks: int
    """KV blocks on the decode worker."""
    rank: int
    """Of the decode worker."""
    charge: Charge
    """What its tenant was charged for it."""
    forecast: Forecast
    """Of its first token."""


class Core:
    """See the module's docstring. `draw` gives numbers in [0, 1); `now` never goes back."""

    def __init__(self, rules: Rules, now: float, draw: Callable[[], float]) -> None:
        self.members = Members()
        self.index = PrefixIndex()
        self.pools = Pools()
        self.queue = Queue(rules.queue_limit, rules.queue_patience_seconds, rules.tenant_weights)
        self.experts = ExpertPlanner(rules.experts)
        self.balance = Balance(rules.rebalance_seconds)
        self.decides = True
        """Of several coordinators, the one that has workers change roles."""
        self.started = now
        self.placed = 0
        self.refused: dict[m.Reason, int] = {}
        self._rules = rules
        self.explanations = Explanations(rules.explain_decisions)
        self._sessions = Sessions()
        self.predictor = Predictor()
        self._health = Health(stale_seconds=rules.lease_seconds / 2)
        view = View(self.index, self.predictor, Regions(rules.region_seconds), self._sessions)
        self._placer = Placer(view, rules.local_prefill_tokens, draw)
        self._rate = PlacementRate(now)
        self._attempts: OrderedDict[AttemptId, Attempt] = OrderedDict()
        self._ticked = now
        self._settled = False
        self._models_seen: set[str] = set()
        self._bereft: dict[str, float] = {}
        """Models that lost a decode worker lately, and when: it may come back."""
        self._recheck = False
        self._out: list[m.Command] = []
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            m.WorkerHello: self._hello,
            m.WorkerHeartbeat: self._heartbeat,
            m.WorkerKvEvents: self._kv_events,
            m.WorkerDraining: self._draining,
            m.WorkerRoleChanged: self._role_changed,
            m.StreamLost: self._stream_lost,
            m.PlaceRequested: self._place,
            m.PlaceCancelled: self._cancel,
            m.AttemptEnded: self._attempt_ended,
            m.Tick: self._tick,
        }

    def handle(self, event: m.Event, now: float) -> list[m.Command]:
        """Takes in what happened, and says what is to be done about it, in order."""
        self._handlers[type(event)](event, now)
        commands, self._out = self._out, []
        return commands

    # Workers

    def _hello(self, event: m.WorkerHello, now: float) -> None:
        info = event.info
        known = self.members.get(info.worker_id)
        standing, load = Standing.GONE, Load(info, event.stats)
        if known is not None:
            standing = Standing.DRAINING if known.standing is Standing.DRAINING else Standing.GONE
            load = known.load
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
        self._models_seen.add(info.model)
        self._out.append(m.GrantLease(event.stream, self._rules.lease_seconds))
        self._watch_experts(worker, event.stats, now)
        self._serve_queue(info.model, now)

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
        load.report(event.stats, now)
        self._watch_experts(worker, event.stats, now)
        self._measure(worker, event.stats, now)
        back = worker.signal(Signal.HEARD)
        self.pools.put(worker)
        if back or load.room > room or load.free_blocks > blocks or load.fit_blocks > fit:
            self._serve_queue(worker.info.model, now)

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
            self._serve_queue(worker.info.model, now)

    def _draining(self, event: m.WorkerDraining, now: float) -> None:
        worker = self._renew(event.stream, now)
        if worker is not None and worker.signal(Signal.DRAIN):
            self._miss(worker, now)
            self.pools.put(worker)
            self._recheck = True

    def _role_changed(self, event: m.WorkerRoleChanged, now: float) -> None:
        worker = self._renew(event.stream, now)
        if worker is None or worker.info.role is event.role:
            return
        if worker.info.role.decodes and not event.role.decodes:
            self._miss(worker, now)
        worker.take_role(event.role)
        self.balance.role_changed(worker, now)
        self.pools.put(worker)
        self._recheck = True
        self._serve_queue(worker.info.model, now)

    def _stream_lost(self, event: m.StreamLost, now: float) -> None:
        worker = self.members.on_stream(event.stream)
        if worker is not None:
            self._leave(worker, "its stream broke", now, tell=False)

    def _renew(self, stream: int, now: float) -> Worker | None:
        worker = self.members.on_stream(stream)
        if worker is not None:
            worker.heard, worker.expires = now, now + self._rules.lease_seconds
        return worker

    def _miss(self, worker: Worker, now: float) -> None:
        if worker.info.role.decodes:
            self._bereft[worker.info.model] = now

    def _leave(self, worker: Worker, why: str, now: float, *, tell: bool = True) -> None:
        worker.signal(Signal.LOST)
        self._miss(worker, now)
        self.pools.put(worker)
        self.members.remove(worker)
        self.index.forget(worker.worker_id)
        self.experts.forget(worker.worker_id)
        self.predictor.forget(worker.worker_id)
        self._health.forget(worker.worker_id)
        self._recheck = True
        if tell:
            self._out.append(m.DropWorker(worker.stream, worker.worker_id, why))

    # Requests

    def _place(self, event: m.PlaceRequested, now: float) -> None:
        want = self._with_service_level(event.request)
        entry = Waiting(event.ticket, want, now, _useful_until(want, event.deadline, now))
        self.explanations.asked(want, now, event.deadline)
        if entry.late(now):
            self._refuse(entry, m.Refusal(m.Reason.DEADLINE, "the deadline had passed"), now)
            return
        self.queue.add(entry)
        if self.queue.may_try(entry, now):
            outcome = self._decide(entry, now)
            if not isinstance(outcome, Blocked):
                self._take(entry, outcome, now)
                return
        else:
            self._note_wait(entry, "its turn: others wait for the same model", now)
        hopeless = self._hopeless_wait(entry, now)
        if hopeless is not None:
            self.queue.remove(entry.ticket)
            self._refuse(entry, hopeless, now)
            return
        out = self.queue.push_out(entry)
        if out is None:
            return
        waiting = len(self.queue)
        words = f"no worker has room, and {waiting} of {self.queue.limit} requests wait already"
        if out is not entry:
            words = (
                f"after {now - out.since:.3f} s in the queue, another took its place: it is full"
            )
        retry = self._rate.retry_seconds(waiting, now)
        self._refuse(out, m.Refusal(m.Reason.OVERLOADED, words, retry), now)

    def _hopeless_wait(self, entry: Waiting, now: float) -> m.Refusal | None:
        """A refusal if it is clear that its turn can't come in time."""
        if entry.deadline is None or not self._settled:
            return None
        wait = Forecast(queue_seconds=self.queue.wait_seconds(entry))
        left = entry.deadline - now
        return unattainable(wait, entry.request.ttft_seconds, 0.0, left, 1.0)

    def _with_service_level(self, want: m.PlaceRequest) -> m.PlaceRequest:
        """The cluster's own where the request asks for none."""
        ttft = want.ttft_seconds or self._rules.ttft_seconds
        itl = want.itl_seconds or self._rules.itl_seconds
        if (ttft, itl) == (want.ttft_seconds, want.itl_seconds):
            return want
        return replace(want, ttft_seconds=ttft, itl_seconds=itl)

    def _take(self, entry: Waiting, outcome: Decision | m.Refusal, now: float) -> None:
        """Answers a request that is in the queue."""
        if isinstance(outcome, Decision):
            self.queue.take(entry.ticket, now)
        else:
            self.queue.remove(entry.ticket)
        self._answer(entry, outcome, now)

    def _cancel(self, event: m.PlaceCancelled, now: float) -> None:
        entry = self.queue.remove(event.ticket)
        if entry is not None:
            self.explanations.cancelled(entry.request, now)
            self._serve_queue(entry.request.model, now)

    def _attempt_ended(self, event: m.AttemptEnded, now: float) -> None:
        self.explanations.ended(event)
        failed = self.members.get(event.failed_worker)
        if failed is not None:
            if event.unreachable and failed.signal(Signal.UNREACHABLE):
                self._miss(failed, now)
                self._recheck = True
            if event.failure in WORKER_FULL:
                failed.load.refuse()
            else:
                self._health.failed(failed.worker_id, now, silent=event.failure == WORKER_SILENT)
                failed.avoided = self._health.avoided(failed.worker_id, now)
            self.pools.put(failed)
        attempt_id = (event.request_id, event.attempt)
        if attempt_id in self._attempts:
            attempt, computed = self._attempts[attempt_id], event.computed_tokens
            self.queue.settle(attempt.charge, computed, event.generated_tokens)
            self.predictor.ended(attempt.forecast, event.ttft_seconds, computed, now)
            decode = self._release(attempt_id)
            if decode is not None:
                self._serve_queue(decode.info.model, now)

    def _release(self, attempt_id: AttemptId) -> Worker | None:
        """Frees what an attempt took, so far as last reports count it; its decode worker."""
        attempt = self._attempts.pop(attempt_id)
        prefill = self.members.get(attempt.prefill)
        if prefill is not None:
            prefill.load.drop(attempt_id)
            self.pools.put(prefill)
        decode = self.members.get(attempt.decode)
        if decode is not None:
            if not decode.load.drop(attempt_id):
                decode.load.credit(attempt.blocks, attempt.rank)
            self.pools.put(decode)
        return decode

    def _decide(self, entry: Waiting, now: float) -> Outcome:
        outcome = self._decide_settled(entry, now)
        if isinstance(outcome, m.Refusal) and (not self._settled or self._may_pass(outcome, now)):
            # Those who could serve it may be about to register.
            outcome = Blocked(outcome.message, everyone=False)
        if isinstance(outcome, Blocked):
            self._note_wait(entry, outcome.why, now)
        return outcome

    def _note_wait(self, entry: Waiting, why: str, now: float) -> None:
        want = entry.request
        if self.explanations.waiting(want, why, now):
            pools = self.pools.of(want.model, want.kv_layout)
            self.explanations.considered(want, self._placer.rejected(want, pools))

    def _may_pass(self, refused: m.Refusal, now: float) -> bool:
        """Whether a refusal is for want of a worker that was here a moment ago."""
        if refused.reason is not m.Reason.NO_WORKERS:
            return False
        model = refused.metadata.get("model", "")
        since = [at for name, at in self._bereft.items() if model in ("", name)]
        return any(now - at < self._rules.worker_wait_seconds for at in since)

    def _decide_settled(self, entry: Waiting, now: float) -> Outcome:
        found = self._pools_for(entry.request)
        if isinstance(found, m.Refusal):
            return found
        want, pools = found
        ttft = want.ttft_seconds - (now - entry.since) if want.ttft_seconds else None
        deadline = None if entry.deadline is None else entry.deadline - now
        return self._placer.decide(want, pools, Limits(ttft, deadline))

    def _pools_for(self, want: m.PlaceRequest) -> tuple[m.PlaceRequest, list[Pool]] | m.Refusal:
        """The request with its model named, and that model's pools."""
        models = self.pools.models()
        if not want.model and len(models) == 1:
            want = replace(want, model=models[0])
        pools = self.pools.of(want.model, want.kv_layout)
        if pools:
            return want, pools
        if want.model in self._models_seen or not models:
            words = f"no worker of {want.model or 'any model'} is up"
            return m.Refusal(m.Reason.NO_WORKERS, words, metadata={"model": want.model})
        served = "served: " + ", ".join(models)
        if want.model:
            words = f"{want.model} is not served here; {served}"
            return m.Refusal(m.Reason.UNKNOWN_MODEL, words, metadata={"model": want.model})
        metadata = {"field": "model", "value": "", "allowed": f"name one; {served}"}
        return m.Refusal(m.Reason.INVALID_REQUEST, f"model: name one; {served}", metadata=metadata)

    def _answer(self, entry: Waiting, outcome: Decision | m.Refusal, now: float) -> None:
        if isinstance(outcome, m.Refusal):
            self._refuse(entry, outcome, now)
            return
        want, reasons, waited = entry.request, outcome.reasons, now - entry.since
        if waited > 0:
            reasons = (*reasons, f"waited {waited:.3f} s for room")
        ttft, itl = outcome.ttft_seconds, outcome.itl_seconds
        self.explanations.considered(want, outcome.considered)
        self.explanations.placed(want, reasons, ttft, itl, now)
        self._sessions.note(want.tenant, want.session, outcome.decode.worker.worker_id)
        decode, prefill = self._commit(entry, outcome, now)
        placement = m.Placement(decode, prefill, reasons, outcome.prefix, ttft, itl)
        self._out.append(m.AnswerPlacement(entry.ticket, placement, waited))

    def _commit(
        self, entry: Waiting, decision: Decision, now: float
    ) -> tuple[m.Chosen, m.Chosen | None]:
        """Books what was decided."""
        attempt_id = (entry.request.request_id, entry.request.attempt)
        if attempt_id in self._attempts:
            self.queue.settle(self._attempts[attempt_id].charge, 0, 0)
            self._release(attempt_id)
        self.placed += 1
        self._rate.count(now)
        decode, prefill = decision.decode, decision.prefill
        to_compute = decode.uncached_tokens if prefill is None else 0
        chosen = self._book(attempt_id, decode, to_compute, now)
        source = None
        if prefill is not None:
            source = self._book(attempt_id, prefill, prefill.uncached_tokens, now)
        self._attempts[attempt_id] = Attempt(
            decode=chosen.worker_id,
            prefill=source.worker_id if source else "",
            blocks=decode.blocks,
            rank=chosen.dp_rank,
            forecast=(prefill or decode).forecast,
            charge=self.queue.charge(entry, (prefill or decode).uncached_tokens),
        )
        if len(self._attempts) > ATTEMPTS_REMEMBERED:
            self._attempts.popitem(last=False)
        return chosen, source

    def _book(self, attempt: AttemptId, of: Candidate, tokens: int, now: float) -> m.Chosen:
        worker = of.worker
        worker.load.book(attempt, Booking(now, of.blocks, tokens, of.rank))
        worker.picked = self.placed
        self.pools.put(worker, turn=True)
        return m.Chosen(worker.worker_id, worker.info.address, of.cached_tokens, of.rank)

    def _refuse(self, entry: Waiting, refused: m.Refusal, now: float) -> None:
        self.refused[refused.reason] = self.refused.get(refused.reason, 0) + 1
        self.explanations.refused(entry.request, refused, now)
        self._out.append(m.RefusePlacement(entry.ticket, refused))

    # The queue

    def _serve_queue(self, model: str, now: float) -> None:
        """Room may have appeared."""
        for lane in (model, ""):
            while self._serve_one(lane, now):
                pass

    def _serve_one(self, lane: str, now: float) -> bool:
        """Answers one request of a lane if it can; so the next one may get its turn."""
        for entry in self.queue.head(lane, now):
            if entry.late(now):
                self._refuse_late(entry, now)
                return True
            outcome = self._decide(entry, now)
            if isinstance(outcome, Blocked):
                if outcome.everyone:
                    return False
                continue
            self._take(entry, outcome, now)
            return True
        return False

    def _refuse_late(self, entry: Waiting, now: float) -> None:
        self.queue.remove(entry.ticket)
        want, waited = entry.request, now - entry.since
        if want.ttft_seconds and waited >= want.ttft_seconds:
            words = f"no worker had room in the {waited:.3f} s in which the first token was wanted"
            retry = self._rate.retry_seconds(len(self.queue), now)
            self._refuse(entry, m.Refusal(m.Reason.SLO_UNATTAINABLE, words, retry), now)
            return
        words = f"no worker had room in the {waited:.3f} s until the deadline"
        self._refuse(entry, m.Refusal(m.Reason.DEADLINE, words), now)

    def _refuse_hopeless(self, now: float) -> None:
        """Refuses those that nobody can serve any more, wherever in the queue they stand."""
        for lane in self.queue.lanes():
            for entry in list(self.queue.lane(lane)):
                found = self._pools_for(entry.request)
                refused = found if isinstance(found, m.Refusal) else refusal(*found)
                if refused is not None and not self._may_pass(refused, now):
                    self.queue.remove(entry.ticket)
                    if refused.reason is m.Reason.NO_WORKERS:
                        words = f"{refused.message}; waited {now - entry.since:.1f} s for one"
                        refused = replace(refused, message=words)
                    self._refuse(entry, refused, now)

    # Time

    def _tick(self, event: m.Tick, now: float) -> None:
        self._end_leases(now)
        self.index.sweep(SWEPT_AT_ONCE)
        for worker in self.members:
            if worker.feed.overdue(now):
                self._out.append(m.AskResync(worker.stream))
        for name in self._health.unheard(now):
            self._shun(name, now)
        for entry in self.queue.late(now):
            self._refuse_late(entry, now)
        if not self._settled and now - self.started >= self._rules.lease_seconds:
            self._settled = self._recheck = True
        for model, since in list(self._bereft.items()):
            if now - since >= self._rules.worker_wait_seconds:
                del self._bereft[model]
                self._recheck = True
        if self._recheck and self._settled:
            self._recheck = False
            self._refuse_hopeless(now)
        for lane in self.queue.lanes():
            self._serve_queue(lane, now)
        if self._settled:
            pools = self.pools.all()
            self._out += self.balance.review(pools, self._queued, now, decides=self.decides)

    def _queued(self, model: str) -> Queued:
        """What waits for a model; those that name none may be for it."""
        waiting = [e.request for lane in (model, "") for e in self.queue.lane(lane)]
        return Queued(len(waiting), sum(want.context_tokens for want in waiting))

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
        assert len(self.queue) <= self.queue.limit


def _useful_until(want: m.PlaceRequest, deadline: float | None, now: float) -> float | None:
    """When it is too late to place a request; None: never."""
    if not want.ttft_seconds:
        return deadline
    first = now + want.ttft_seconds
    return first if deadline is None else min(first, deadline)
