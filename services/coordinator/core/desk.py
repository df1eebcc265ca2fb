"""Requests: who waits, what is decided on them, what is booked, and what is remembered of it.

Asks the placer, keeps the queue, and answers every request once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from services.coordinator.core import messages as m
from services.coordinator.core.admission import Open, PlacementRate, Queue, Waiting
from services.coordinator.core.balance import Queued
from services.coordinator.core.candidates import View, fits
from services.coordinator.core.explain import Explanations
from services.coordinator.core.fairness import Charge
from services.coordinator.core.load import AttemptId, Booking
from services.coordinator.core.membership import Members, Worker
from services.coordinator.core.placement import (
    Blocked,
    Decision,
    Limits,
    Outcome,
    Placer,
    refusal,
)
from services.coordinator.core.pools import Pool, Pools
from services.coordinator.core.predict import Forecast, unattainable
from services.coordinator.core.rules import Rules
from services.coordinator.core.scoring import Candidate

ATTEMPTS_REMEMBERED = 1 << 16
"""Placed attempts whose end is still of interest. The oldest is forgotten beyond: its end then
frees capacity with the worker's next report instead of at once."""


_FOR_WANT_OF_A_WORKER = {m.Reason.NO_WORKERS, m.Reason.UNKNOWN_ADAPTER}


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


@dataclass(frozen=True, slots=True)
class _Lost:
    """Decode workers that a model lost: when the last one went, and what the largest could hold."""

    at: float
    capacity: int


class Desk:
    """Where requests are dealt with. Answers gather in `out`, for the core to hand on."""

    def __init__(
        self,
        rules: Rules,
        members: Members,
        pools: Pools,
        view: View,
        now: float,
        draw: Callable[[], float],
    ) -> None:
        self.queue = Queue(rules.queue_limit, rules.queue_patience_seconds, rules.tenant_weights)
        self.explanations = Explanations(rules.explain_decisions)
        self.placed = 0
        self.refused: dict[m.Reason, int] = {}
        self.out: list[m.Command] = []
        self.recheck = False
        """Workers went: some may wait for what nobody can give any more."""
        self.attempts: OrderedDict[AttemptId, Attempt] = OrderedDict()
        self._rules = rules
        self._members = members
        self._pools = pools
        self._view = view
        self._placer = Placer(view, rules.local_prefill_tokens, draw)
        self._rate = PlacementRate(now)
        self._started = now
        self._settled = False
        self._models_seen: set[str] = set()
        self._bereft: dict[str, _Lost] = {}
        """Models that lost decode workers lately, which may come back."""

    @property
    def settled(self) -> bool:
        """Whether all workers have had the time to register."""
        return self._settled

    # Events

    def place(self, event: m.PlaceRequested, now: float) -> None:
        """A request asks."""
        want = self._with_service_level(event.request)
        entry = Waiting(event.ticket, want, now, _useful_until(want, event.deadline, now))
        self.explanations.asked(want, now, event.deadline)
        if entry.late(now):
            self._refuse(entry, m.Refusal(m.Reason.DEADLINE, "the deadline had passed"), now)
            return
        self.queue.add(entry)
        is_open = self._open(want.model)
        if self.queue.may_try(entry, now, is_open):
            outcome = self._decide(entry, now)
            if not isinstance(outcome, Blocked):
                self._take(entry, outcome, now, is_open)
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

    def cancel(self, event: m.PlaceCancelled, now: float) -> None:
        """Nobody waits for the answer any more."""
        entry = self.queue.remove(event.ticket)
        if entry is not None:
            self.explanations.cancelled(entry.request, now)
            self.serve(entry.request.model, now)

    def ended(self, event: m.AttemptEnded, now: float) -> None:
        """An attempt came to its end: what it took is free."""
        self.explanations.ended(event)
        attempt = self.attempts.get((event.request_id, event.attempt))
        if attempt is None:
            return
        computed = event.computed_tokens
        self.queue.settle(attempt.charge, computed, event.generated_tokens)
        self._view.predictor.ended(attempt.forecast, event.ttft_seconds, computed, now)
        decode = self._release((event.request_id, event.attempt))
        if decode is not None:
            self.serve(decode.info.model, now, by=decode)

    def tick(self, now: float) -> None:
        """Time passed."""
        for entry in self.queue.late(now):
            self._refuse_late(entry, now)
        if not self._settled and now - self._started >= self._rules.lease_seconds:
            self._settled = self.recheck = True
        for model, lost in list(self._bereft.items()):
            if now - lost.at >= self._rules.worker_wait_seconds:
                del self._bereft[model]
                self.recheck = True
        if self.recheck and self._settled:
            self.recheck = False
            self._refuse_hopeless(now)
        for lane in self.queue.lanes():
            self.serve(lane, now)

    def serves(self, model: str) -> None:
        """A worker of the model is here."""
        self._models_seen.add(model)

    def misses(self, worker: Worker, now: float) -> None:
        """A worker gets no more requests; another may take its place soon."""
        self.recheck = True
        if worker.info.role.decodes:
            before = self._bereft.get(worker.info.model)
            largest = max(worker.capacity, 0 if before is None else before.capacity)
            self._bereft[worker.info.model] = _Lost(now, largest)

    def serve(self, model: str, now: float, *, by: Worker | None = None) -> None:
        """Room may have appeared; `by`: on this worker alone, so others need not be looked at."""
        for lane in (model, ""):
            while self._serve_one(lane, now, by):
                pass

    def queued(self, model: str) -> Queued:
        """What waits for a model; those that name none may be for it."""
        waiting = [e.request for lane in (model, "") for e in self.queue.lane(lane)]
        return Queued(len(waiting), sum(want.context_tokens for want in waiting))

    # Decisions

    def _decide(self, entry: Waiting, now: float) -> Outcome:
        outcome = self._decide_settled(entry, now)
        if isinstance(outcome, m.Refusal) and (
            not self._settled or self._may_pass(entry.request, outcome, now)
        ):
            # Those who could serve it may be about to register.
            outcome = Blocked(outcome.message, everyone=False)
        if isinstance(outcome, Blocked):
            self._note_wait(entry, outcome.why, now)
        return outcome

    def _decide_settled(self, entry: Waiting, now: float) -> Outcome:
        found = self._pools_for(entry.request)
        if isinstance(found, m.Refusal):
            return found
        want, pools = found
        ttft = want.ttft_seconds - (now - entry.since) if want.ttft_seconds else None
        deadline = None if entry.deadline is None else entry.deadline - now
        return self._placer.decide(want, pools, Limits(ttft, deadline))

    def _note_wait(self, entry: Waiting, why: str, now: float) -> None:
        want = entry.request
        if self.explanations.waiting(want, why, now):
            pools = self._pools.of(want.model, want.kv_layout)
            self.explanations.considered(want, self._placer.rejected(want, pools))

    def _hopeless_wait(self, entry: Waiting, now: float) -> m.Refusal | None:
        """A refusal if it is clear that its turn can't come in time."""
        if entry.deadline is None or not self._settled:
            return None
        wait = Forecast(queue_seconds=self.queue.wait_seconds(entry))
        left = entry.deadline - now
        return unattainable(wait, entry.request.ttft_seconds, 0.0, left, 1.0)

    def _may_pass(self, want: m.PlaceRequest, refused: m.Refusal, now: float) -> bool:
        """Whether a refusal is for want of a worker that was here a moment ago."""
        too_long = refused.metadata.get("field") == "context_tokens"
        if refused.reason not in _FOR_WANT_OF_A_WORKER and not too_long:
            return False
        patience = self._rules.worker_wait_seconds
        lost = [
            lost
            for name, lost in self._bereft.items()
            if want.model in ("", name) and now - lost.at < patience
        ]
        if too_long:
            return any(want.context_tokens < some.capacity for some in lost)
        return bool(lost)

    def _with_service_level(self, want: m.PlaceRequest) -> m.PlaceRequest:
        """The cluster's own where the request asks for none.

        Not for one that is placed again: its stream, which may have begun, is not to end for being
        slow.
        """
        if want.attempt:
            return want
        ttft = want.ttft_seconds or self._rules.ttft_seconds
        itl = want.itl_seconds or self._rules.itl_seconds
        if (ttft, itl) == (want.ttft_seconds, want.itl_seconds):
            return want
        return replace(want, ttft_seconds=ttft, itl_seconds=itl)

    def _pools_for(self, want: m.PlaceRequest) -> tuple[m.PlaceRequest, list[Pool]] | m.Refusal:
        """The request with its model named, and that model's pools."""
        models = self._pools.models()
        if not want.model and len(models) == 1:
            want = replace(want, model=models[0])
        pools = self._pools.of(want.model, want.kv_layout)
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

    # Answers

    def _take(
        self, entry: Waiting, outcome: Decision | m.Refusal, now: float, is_open: Open
    ) -> None:
        """Answers a request that is in the queue."""
        if isinstance(outcome, Decision):
            self.queue.take(entry.ticket, now, is_open)
        else:
            self.queue.remove(entry.ticket)
        self._answer(entry, outcome, now)

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
        self._view.sessions.note(want.tenant, want.session, outcome.decode.worker.worker_id)
        decode, prefill = self._commit(entry, outcome, now)
        placement = m.Placement(decode, prefill, reasons, outcome.prefix, ttft, itl)
        self.out.append(m.AnswerPlacement(entry.ticket, placement, waited))

    def _commit(
        self, entry: Waiting, decision: Decision, now: float
    ) -> tuple[m.Chosen, m.Chosen | None]:
        """Books what was decided."""
        attempt_id = (entry.request.request_id, entry.request.attempt)
        if attempt_id in self.attempts:
            self.queue.settle(self.attempts[attempt_id].charge, 0, 0)
            self._release(attempt_id)
        self.placed += 1
        self._rate.count(now)
        decode, prefill = decision.decode, decision.prefill
        to_compute = decode.uncached_tokens if prefill is None else 0
        chosen = self._book(attempt_id, decode, to_compute, now)
        source = None
        if prefill is not None:
            source = self._book(attempt_id, prefill, prefill.uncached_tokens, now)
        self.attempts[attempt_id] = Attempt(
            decode=chosen.worker_id,
            prefill=source.worker_id if source else "",
            blocks=decode.blocks,
            rank=chosen.dp_rank,
            forecast=(prefill or decode).forecast,
            charge=self.queue.charge(entry, (prefill or decode).uncached_tokens),
        )
        if len(self.attempts) > ATTEMPTS_REMEMBERED:
            self.attempts.popitem(last=False)
        return chosen, source

    def _book(self, attempt: AttemptId, of: Candidate, tokens: int, now: float) -> m.Chosen:
        worker = of.worker
        worker.load.book(attempt, Booking(now, of.blocks, tokens, of.rank))
        worker.picked = self.placed
        self._pools.put(worker, turn=True)
        return m.Chosen(worker.worker_id, worker.info.address, of.cached_tokens, of.rank)

    def _release(self, attempt_id: AttemptId) -> Worker | None:
        """Frees what an attempt took, so far as last reports count it; its decode worker."""
        attempt = self.attempts.pop(attempt_id)
        prefill = self._members.get(attempt.prefill)
        if prefill is not None:
            prefill.load.drop(attempt_id)
            self._pools.put(prefill)
        decode = self._members.get(attempt.decode)
        if decode is not None:
            if not decode.load.drop(attempt_id):
                decode.load.credit(attempt.blocks, attempt.rank)
            self._pools.put(decode)
        return decode

    def _refuse(self, entry: Waiting, refused: m.Refusal, now: float) -> None:
        self.refused[refused.reason] = self.refused.get(refused.reason, 0) + 1
        self.explanations.refused(entry.request, refused, now)
        self.out.append(m.RefusePlacement(entry.ticket, refused))

    def _serve_one(self, lane: str, now: float, by: Worker | None) -> bool:
        """Answers one request of a lane if it can; so the next one may get its turn."""
        is_open = self._open(lane, by)
        for entry in self.queue.head(lane, now, is_open):
            if entry.late(now):
                self._refuse_late(entry, now)
                return True
            if by is not None and not fits(by, entry.request):
                continue
            outcome = self._decide(entry, now)
            if isinstance(outcome, Blocked):
                if outcome.everyone:
                    return False
                continue
            self._take(entry, outcome, now, is_open)
            return True
        return False

    def _open(self, model: str, by: Worker | None = None) -> Open:
        """At this moment, each looked up once. One that nobody has is open: to be refused."""

        def has_room(adapter: str) -> bool:
            if not adapter:
                return True
            if by is not None:
                return adapter in by.load.stats.adapters
            pools = self._pools.of(model)
            those = [w for p in pools for w in p.decode.with_adapter.get(adapter, {}).values()]
            return not those or any(w.load.room for w in those)

        return cache(has_room)

    def _refuse_late(self, entry: Waiting, now: float) -> None:
        self.queue.remove(entry.ticket)
        want, waited = entry.request, now - entry.since
        # Not by `waited`: it may be rounded to less than the limit that has been reached.
        if want.ttft_seconds and now >= entry.since + want.ttft_seconds:
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
                if refused is not None and not self._may_pass(entry.request, refused, now):
                    self.queue.remove(entry.ticket)
                    if refused.reason in (m.Reason.NO_WORKERS, m.Reason.UNKNOWN_ADAPTER):
                        words = f"{refused.message}; waited {now - entry.since:.1f} s for one"
                        refused = replace(refused, message=words)
                    self._refuse(entry, refused, now)


def _useful_until(want: m.PlaceRequest, deadline: float | None, now: float) -> float | None:
    """When it is too late to place a request; None: never."""
    if not want.ttft_seconds:
        return deadline
    first = now + want.ttft_seconds
    return first if deadline is None else min(first, deadline)
