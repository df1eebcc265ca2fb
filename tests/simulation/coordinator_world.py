"""The world around the core, in bad weather.

Workers crash, hang, drain and come back, messages are lost, late or doubled, frontends die, the
coordinator stalls or is killed.

A heap of timed events and one random generator, so that a seed replays exactly.
"""

from __future__ import annotations

import heapq
import itertools
import random
from dataclasses import dataclass, field

from services.coordinator.core import messages as m
from services.coordinator.core.rules import Rules
from tests.simulation.coordinator_book import BLOCK, LEASE, TICK, Asked, Book

STORM_SECONDS = 8.0
CALM_SECONDS = 5.0
FAMILIES, LONGEST = 4, 10


def block_key(family, number):
    return bytes([family, number]).rjust(16, b"\0")


@dataclass(eq=False)
class Worker:
    """A model of a worker process."""

    info: m.WorkerInfo
    alive: bool = True
    draining: bool = False
    hung_until: float = 0.0
    stream: int | None = None
    accepted: bool = False
    sequence: int = 0
    depth: dict[int, int] = field(default_factory=dict)
    told: set[bytes] = field(default_factory=set)
    running: dict[tuple[str, int], int] = field(default_factory=dict)

    @property
    def held(self):
        return {block_key(f, i) for f, count in self.depth.items() for i in range(count)}

    def stats(self):
        taken = sum(self.running.values())
        return m.WorkerStats(
            running=len(self.running), free_blocks=max(0, self.info.total_blocks - taken)
        )


class World(Book):
    """One run. `log` collects what happened."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.seed, self.now, self.log = seed, 0.0, []
        self.heap, self.numbers = [], itertools.count(1)
        self.storm = True
        self.loss = self.random.choice([0.0, 0.0, 0.05, 0.3])
        self.delay = self.random.choice([0.001, 0.02, 0.3])
        self.rules = Rules(
            LEASE,
            self.random.choice([0, 1, 4, 50]),
            self.random.choice([0, 32]),
            worker_wait_seconds=self.random.choice([0.0, 0.5, 4.0]),
        )
        self.workers: list[Worker] = []
        self.streams: dict[int, str] = {}
        self.arrives: dict[int, float] = {}
        self.stall_until = 0.0
        self.start_core()
        self.models = ["m", "other"] if self.random.random() < 0.2 else ["m"]
        for role in (m.Role.PREFILL, m.Role.DECODE):
            for _ in range(self.random.randint(0 if role is m.Role.PREFILL else 1, 3)):
                self.start_worker(role)
        self.at(0.0, self.clock)
        self.at(self.random.uniform(0, 0.5), self.new_request)
        self.at(self.random.uniform(0, 2.0), self.disaster)

    # The heap

    def at(self, delay, action, *args):
        self.at_time(self.now + delay, action, *args)

    def at_time(self, time, action, *args):
        """Actions of equal times come in the order they were asked for."""
        heapq.heappush(self.heap, (time, next(self.numbers), action, args))

    def run(self):
        for until in (STORM_SECONDS, STORM_SECONDS + CALM_SECONDS):
            while self.heap[0][0] < until:
                self.now, _, action, args = heapq.heappop(self.heap)
                action(*args)
            self.storm = False
        self.check_calm()

    def note(self, *words):
        self.log.append(f"{self.now:8.4f} " + " ".join(str(w) for w in words))

    # The core

    def deliver(self, stream, event):
        """A worker's message reaches the core, unless that stalls."""
        if self.now < self.stall_until:
            self.at_time(self.stall_until, self.deliver, stream, event)
        else:
            self.learn(stream, self.streams[stream], event)

    def clock(self, before=0.0):
        """The core's ticks; `before` is when the last one was due."""
        if self.now < self.stall_until:
            self.at_time(self.stall_until, self.clock, before)
            return
        self.tick(slept=self.now - before > LEASE / 2)
        self.at(TICK, self.clock, self.now)

    def note_placed(self, want, placement):
        self.note("placed", want.request_id, want.attempt, placement.decode, placement.prefill)
        self.at(self.random.uniform(0, self.delay), self.start_request, want, placement)

    def note_refused(self, want, refusal):
        self.note("refused", want.request_id, want.attempt, refusal.reason.value)

    # Workers

    def start_worker(self, role, address=None):
        number = next(self.numbers)
        info = m.WorkerInfo(
            worker_id=f"{role.value}-{number}",
            role=role,
            address=address or f"h:{number}",
            model=self.random.choice(self.models),
            kv_layout=self.random.choice("aaab"),
            block_tokens=BLOCK,
            total_blocks=self.random.choice([12, 40]),
            max_running=self.random.choice([1, 4]),
            context_tokens=10_000,
            numerics=self.random.choice(["", "x", "x", "y"]),
        )
        worker = Worker(info)
        self.workers.append(worker)
        self.note("start", info.worker_id, info.address)
        self.at(self.random.uniform(0, 0.3), self.connect, worker)
        self.at(self.random.uniform(0, 1.0), self.change_cache, worker)

    def connect(self, worker):
        if not worker.alive or worker.stream is not None:
            return
        worker.stream, worker.accepted, worker.told = next(self.numbers), False, set()
        self.streams[worker.stream] = worker.info.worker_id
        self.note("connect", worker.info.worker_id, worker.stream)
        self.send(worker, m.WorkerHello(worker.stream, worker.info, worker.stats()))
        self.at(1.0, self.give_up_hello, worker, worker.stream)

    def give_up_hello(self, worker, stream):
        if worker.stream == stream and not worker.accepted:
            self.disconnect(worker)

    def disconnect(self, worker):
        """The stream breaks; the core hears of it in its turn."""
        if worker.stream is None:
            return
        self.send(worker, m.StreamLost(worker.stream), lossy=False)
        worker.stream = None
        if worker.alive:
            self.at(self.random.uniform(0.05, 0.5), self.connect, worker)

    def send(self, worker, event, lossy=True):
        """In order on its stream; in a storm some are lost, some come twice.

        Not a snapshot that starts the numbers anew: without it, those that follow could not be
        told from old ones. (Between two ends of a gRPC stream nothing is lost; see feed.py.)
        """
        lossy = lossy and getattr(event, "sequence", 0) != 1
        stream, copies = worker.stream, 1
        if self.storm and lossy:
            if self.random.random() < self.loss:
                return
            copies += self.random.random() < self.loss
        arrival = self.now + self.random.uniform(0, self.delay)
        arrival = self.arrives[stream] = max(arrival, self.arrives.get(stream, 0.0))
        for _ in range(copies):
            self.at_time(arrival, self.deliver, stream, event)

    def to_worker(self, stream, what, lossy=True):
        if lossy and self.storm and self.random.random() < self.loss:
            return
        self.at(self.random.uniform(0, self.delay), self.hear, stream, what)

    def hear(self, stream, what):
        worker = next((w for w in self.workers if w.stream == stream), None)
        if worker is None or not worker.alive:
            return
        if self.now < worker.hung_until:
            self.at(worker.hung_until - self.now, self.hear, stream, what)
        elif what == "dropped":
            self.disconnect(worker)
        elif what == "resync":
            self.snapshot(worker)
        elif not worker.accepted:
            worker.accepted = True
            if worker.draining:
                self.send(worker, m.WorkerDraining(stream))
            self.snapshot(worker)
            self.heartbeat(worker, stream)

    def heartbeat(self, worker, stream):
        if not worker.alive or worker.stream != stream:
            return
        self.at(0.4, self.heartbeat, worker, stream)
        if self.now >= worker.hung_until:
            if worker.draining and self.storm:
                self.send(worker, m.WorkerDraining(stream))
            self.send(worker, m.WorkerHeartbeat(stream, worker.stats()))

    def snapshot(self, worker):
        """All keys; sometimes in two messages, as for a large cache."""
        keys = sorted(worker.held)
        cut = len(keys) // 2 if self.random.random() < 0.3 else len(keys)
        worker.sequence, worker.told = 1, set(keys)
        self.send(worker, m.WorkerKvEvents(worker.stream, 1, True, tuple(keys[:cut])))
        if keys[cut:]:
            worker.sequence = 2
            self.send(worker, m.WorkerKvEvents(worker.stream, 2, False, tuple(keys[cut:])))

    def change_cache(self, worker, again=True):
        if not worker.alive:
            return
        family = self.random.randrange(FAMILIES)
        worker.depth[family] = self.random.randint(0, LONGEST)
        if worker.accepted and worker.stream is not None and self.now >= worker.hung_until:
            held = worker.held
            stored, removed = held - worker.told, worker.told - held
            worker.told, worker.sequence = held, worker.sequence + 1
            snapshot = self.random.random() < 0.1
            event = m.WorkerKvEvents(
                stream=worker.stream,
                sequence=worker.sequence,
                snapshot=snapshot,
                stored=tuple(sorted(held if snapshot else stored)),
                removed=() if snapshot else tuple(sorted(removed)),
            )
            self.send(worker, event)
        if again and self.storm:
            self.at(self.random.uniform(0.1, 2.0), self.change_cache, worker)

    def kill(self, worker):
        self.note("kill", worker.info.worker_id)
        worker.alive = False
        worker.running.clear()
        if self.random.random() < 0.7:
            self.disconnect(worker)
        else:
            worker.stream = None  # the host is gone: nothing tells the core
        if self.random.random() < 0.7:
            address = worker.info.address if self.random.random() < 0.5 else None
            self.start_worker(worker.info.role, address)

    # Frontends

    def new_request(self):
        if not self.storm:
            return
        self.at(self.random.expovariate(4.0), self.new_request)
        self.ask(f"r{next(self.numbers)}", 0, frozenset(), self.random.randrange(FAMILIES))

    def ask(self, request_id, attempt, excluded, family, tokens=0):
        if self.now < self.stall_until:
            return
        tokens = tokens or self.random.choice([5, 20, 80, 100, 160, 300, 700])
        blocks = min(tokens // BLOCK, LONGEST)
        want = m.PlaceRequest(
            request_id=request_id,
            attempt=attempt,
            model=self.random.choice(self.models),
            block_keys=tuple(block_key(family, i) for i in range(blocks)),
            context_tokens=tokens,
            max_tokens=10,
            exclude_workers=excluded,
            kv_layout=self.random.choice("aab"),
        )
        ticket = next(self.numbers)
        deadline = self.now + self.random.uniform(0.0, 3.0) if self.random.random() < 0.5 else None
        self.asked[ticket] = Asked(want, self.now, deadline)
        self.note("ask", ticket, request_id, attempt, tokens, sorted(excluded))
        self.tell(m.PlaceRequested(ticket, want, deadline))
        if self.random.random() < 0.1:
            self.at(self.random.uniform(0, 1.0), self.cancel, ticket)

    def cancel(self, ticket):
        if self.now >= self.stall_until and self.asked.pop(ticket, None):
            self.note("cancel", ticket)
            self.tell(m.PlaceCancelled(ticket))

    def start_request(self, want, placement):
        """The frontend turns to the workers it was given."""
        if self.storm and self.random.random() < 0.05:
            return  # it died
        chosen = [c for c in (placement.decode, placement.prefill) if c is not None]
        attempt = (want.request_id, want.attempt)
        for one in chosen:
            worker = next(w for w in self.workers if w.info.worker_id == one.worker_id)
            if not worker.alive:
                self.failed(want, one.worker_id, "WORKER_LOST", True)
                return
            if worker.draining:
                self.failed(want, one.worker_id, "DRAINING", False)
                return
            if len(worker.running) > 2 * worker.info.max_running + 1:
                self.failed(want, one.worker_id, "ENGINE_OVERLOADED", False)
                return
            worker.running[attempt] = want.context_tokens // BLOCK + 1
        self.at(min(4.0, self.random.expovariate(1.0)), self.finish, want, chosen)

    def finish(self, want, chosen):
        dead = ""
        for one in chosen:
            worker = next(w for w in self.workers if w.info.worker_id == one.worker_id)
            worker.running.pop((want.request_id, want.attempt), None)
            dead = one.worker_id if not worker.alive else dead
        if dead:
            self.failed(want, dead, "WORKER_LOST", True)
        elif self.random.random() < 0.9 or not self.storm:
            self.report(m.AttemptEnded(want.request_id, want.attempt))

    def failed(self, want, name, failure, unreachable):
        for worker in self.workers:
            worker.running.pop((want.request_id, want.attempt), None)
        self.report(m.AttemptEnded(want.request_id, want.attempt, name, failure, unreachable))
        if want.attempt < 4:
            family = want.block_keys[0][14] if want.block_keys else 0
            excluded = want.exclude_workers | {name}
            self.ask(want.request_id, want.attempt + 1, excluded, family, want.context_tokens)

    def report(self, event):
        if self.now < self.stall_until or (self.storm and self.random.random() < self.loss):
            return
        if event.unreachable and event.failed_worker in self.known:
            self.known[event.failed_worker].suspect = True
        self.note("report", event.request_id, event.attempt, event.failed_worker, event.failure)
        self.tell(event)

    # Weather

    def disaster(self):
        if not self.storm:
            return
        self.at(self.random.expovariate(1.0), self.disaster)
        kind = self.random.choice(["kill", "hang", "drain", "flap", "join", "stall", "restart"])
        living = [w for w in self.workers if w.alive]
        if kind == "join" and len(living) < 8:
            self.start_worker(self.random.choice([m.Role.PREFILL, m.Role.DECODE]))
        elif kind == "stall":
            lasts = self.random.choice([0.1, 1.0, 4.0])
            self.stall_until = max(self.stall_until, self.now + lasts)
            self.note("stall until", self.stall_until)
        elif kind == "restart" and self.now >= self.stall_until:
            self.restart_core()
        elif living and kind in ("kill", "hang", "drain", "flap"):
            worker = self.random.choice(living)
            self.note(kind, worker.info.worker_id)
            if kind == "kill":
                self.kill(worker)
            elif kind == "hang":
                worker.hung_until = self.now + self.random.choice([0.3, 2.5])
            elif kind == "flap":
                self.disconnect(worker)
            else:
                worker.draining = True
                self.at(self.random.uniform(0.5, 2.0), self.leave, worker)

    def leave(self, worker):
        if worker.alive:
            self.kill(worker)

    def restart_core(self):
        """kill -9: every stream breaks, every question is lost; frontends ask again."""
        self.note("restart of the coordinator")
        lost = self.asked
        self.start_core()
        for worker in self.workers:
            if worker.stream is not None:
                worker.stream = None
                self.at(self.random.uniform(0.05, 2.0), self.connect, worker)
        for asked in lost.values():
            self.at(0.2, self.ask_again, asked)

    def ask_again(self, asked):
        want = asked.want
        family = want.block_keys[0][14] if want.block_keys else 0
        self.ask(want.request_id, want.attempt, want.exclude_workers, family, want.context_tokens)

    # Calm

    def check_calm(self):
        """Everyone has been heard, everything has ended: the core's view is the truth."""
        for worker in self.workers:
            worker.hung_until = 0.0
            self.change_cache(worker, again=False)
        end = self.now + 2 * LEASE + 2.0
        while self.heap[0][0] < end:
            self.now, _, action, args = heapq.heappop(self.heap)
            action(*args)
        core, living = self.core, {w.info.worker_id: w for w in self.workers if w.alive}
        core.check_integrity()
        connected = {n for n, w in living.items() if w.accepted and w.stream is not None}
        assert connected == living.keys(), "a living worker is not registered"
        assert {w.worker_id for w in core.members} == living.keys()
        assert self.known.keys() == living.keys()
        for name, worker in living.items():
            bit, words = core.index.add(name), f"{name}: the index is not the truth"
            assert core.index.known_blocks(name) == len(worker.held), words
            assert all(next(core.index.reach([k], bit)) == (1, bit) for k in worker.held), words
            assert not core.members.get(name).load.bookings, f"{name}: bookings leaked"
        assert len(core.index) == len(set().union(*(w.held for w in living.values())))
        for name, worker in living.items():
            self.tell(m.WorkerHeartbeat(worker.stream, worker.stats()))
            load = core.members.get(name).load
            assert load.requests == len(worker.running) + len(load.bookings)
        for asked in self.asked.values():  # only what nobody has room for may wait for ever
            assert asked.deadline is None
            sizes = [w.info.total_blocks for w in living.values()]
            assert asked.want.context_tokens // BLOCK + 1 < max(sizes)
