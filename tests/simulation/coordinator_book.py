"""The core, and a second book beside it that knows only what was delivered to it.

Everything the core says is checked against the book, as it says it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from services.coordinator.core import messages as m
from services.coordinator.core.core import Core
from services.coordinator.core.rules import Rules

LEASE = 1.5
TICK = 0.25
BLOCK = 16


@dataclass
class Known:
    """What the core has been told of a worker: the second book."""

    stream: int
    info: m.WorkerInfo
    heard: float
    draining: bool = False
    suspect: bool = False


@dataclass
class Asked:
    """A question to the core that has no answer yet."""

    want: m.PlaceRequest
    at: float
    deadline: float | None


class Book:
    """Drives the core. Its subclass says what time it is, and carries what the core says away."""

    now: float
    random: random.Random
    rules: Rules

    def to_worker(self, stream, what, lossy=True):
        """The core tells a worker something."""
        raise NotImplementedError

    def note_placed(self, want, placement):
        """A request was placed."""
        raise NotImplementedError

    def note_refused(self, want, refusal):
        """A request was refused."""
        raise NotImplementedError

    def start_core(self):
        self.awake_since = self.now
        self.core = Core(self.rules, self.now, self.random.random)
        self.core_started = self.now
        self.known: dict[str, Known] = {}
        self.asked: dict[int, Asked] = {}
        self.told = 0

    def learn(self, stream, name, event):
        """A message of a worker reaches the core."""
        known = self.known.get(name)
        if isinstance(event, m.WorkerHello):
            for other, book in list(self.known.items()):
                if book.info.address == event.info.address and other != name:
                    del self.known[other]
            draining = known is not None and known.draining
            self.known[name] = Known(stream, event.info, self.now, draining)
        elif known is not None and known.stream == stream:
            known.heard, known.suspect = self.now, False
            known.draining = known.draining or isinstance(event, m.WorkerDraining)
            if isinstance(event, m.StreamLost):
                del self.known[name]
        self.tell(event)

    def tick(self, slept):
        """Time passes; `slept`: the coordinator was away until now for a noticeable time."""
        if slept:
            self.awake_since = self.now
        self.tell(m.Tick())
        for name, known in self.known.items():
            silent = self.now - max(known.heard, self.awake_since)
            assert silent <= LEASE + TICK, f"{name} outlives its lease"

    def tell(self, event):
        """Hands an event to the core; the book is kept, and what comes of it is checked."""
        before = self.core.desk.placed + sum(self.core.desk.refused.values())
        answers = 0
        for command in self.core.handle(event, self.now):
            match command:
                case m.GrantLease(stream=stream):
                    self.to_worker(stream, "granted")
                case m.AskResync(stream=stream):
                    self.to_worker(stream, "resync")
                case m.DropWorker(stream=stream, worker_id=name, why=why):
                    if name in self.known and self.known[name].stream == stream:
                        self.check_lease(self.known.pop(name), why)
                    self.to_worker(stream, "dropped", lossy=False)
                case m.AnswerPlacement(ticket=ticket, placement=placement):
                    answers += 1
                    asked = self.asked.pop(ticket)
                    self.note_placed(asked.want, placement)
                    self.check_placement(asked, placement)
                case m.RefusePlacement(ticket=ticket, refusal=refusal):
                    answers += 1
                    asked = self.asked.pop(ticket)
                    self.note_refused(asked.want, refusal)
                    self.check_refusal(asked, refusal)
        assert self.core.desk.placed + sum(self.core.desk.refused.values()) == before + answers
        assert len(self.core.desk.queue) == len(self.asked) <= self.rules.queue_limit
        self.told += 1
        if self.told % 8 == 0:
            self.core.check_integrity()

    def usable(self, name, want):
        known = self.known.get(name)
        return (
            known is not None
            and not known.draining
            and name not in want.exclude_workers
            and known.info.model == want.model
            and want.context_tokens < known.info.total_blocks * BLOCK
        )

    def check_lease(self, known, why):
        """Silence ends a membership only if it was the worker's, not the coordinator's own."""
        if why.startswith("silent"):
            assert self.now - max(known.heard, self.awake_since) >= LEASE - 1e-9

    def check_placement(self, asked, placement):
        want, decode, prefill = asked.want, placement.decode, placement.prefill
        for chosen, role in ((decode, m.Role.DECODE), (prefill, m.Role.PREFILL)):
            if chosen is None:
                continue
            known = self.known.get(chosen.worker_id)
            assert known is not None, f"{chosen.worker_id} is known to be gone"
            assert self.usable(chosen.worker_id, want), f"{chosen.worker_id} can't be used"
            assert not known.suspect, f"{chosen.worker_id} is known to be unreachable"
            assert known.info.role is role
            assert chosen.address == known.info.address
            load = self.core.members.get(chosen.worker_id).load
            assert len(load.bookings) <= load.limit, "more is booked than there is room for"
            assert load.requests <= load.limit or load.stats.running >= load.limit
            assert 0 <= chosen.cached_tokens <= want.context_tokens
        if prefill is not None:
            layouts = {self.known[c.worker_id].info.kv_layout for c in (decode, prefill)}
            assert len(layouts) == 1, "KV can't move between layouts"
            uncached = max(1, want.context_tokens - decode.cached_tokens)
            assert uncached > self.rules.local_prefill_tokens
        assert asked.deadline is None or self.now < asked.deadline

    def check_refusal(self, asked, refusal):
        want = asked.want
        hopes = [
            n
            for n, k in self.known.items()
            if k.info.role is m.Role.DECODE and self.usable(n, want)
        ]
        if refusal.reason is m.Reason.NO_WORKERS:
            assert not hopes, f"{hopes} could have served it"
            assert self.now >= self.core_started + LEASE, "they may be about to register"
        elif refusal.reason is m.Reason.OVERLOADED:
            assert len(self.core.desk.queue) == self.rules.queue_limit
            assert 1 <= refusal.retry_seconds <= 30
        elif refusal.reason is m.Reason.DEADLINE:
            assert self.now >= asked.deadline or refusal.metadata["limit"] == "deadline"
        elif refusal.reason is m.Reason.SLO_UNATTAINABLE:
            assert self.now < asked.deadline, "without a limit nothing is out of reach"
        else:
            assert refusal.reason in (m.Reason.INVALID_REQUEST, m.Reason.UNKNOWN_MODEL)
            assert not hopes
