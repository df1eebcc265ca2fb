"""A coordinator process: the real core, its edge, and checks of all that it says.

The checks know only what was delivered to this coordinator (`told`), as coordinator_book.py does;
what the coordinator can't know is no fault of its decisions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from services.coordinator.core import messages as m
from services.coordinator.core.core import Core
from services.runtime.errors import by_reason
from tests.simulation.cluster_net import Process

TICK_SECONDS = 0.25
INTEGRITY_EVERY = 64
IDLE_SECONDS = 1.5
"""More than it takes a worker to tell that it has nothing to do, and a coordinator to use it."""


@dataclass(slots=True)
class Told:
    """What this coordinator was told of a worker."""

    info: m.WorkerInfo
    stream: int
    draining: bool = False


@dataclass(slots=True)
class Asked:
    """A Place call that has no answer yet."""

    want: m.PlaceRequest
    deadline: float
    call: object
    stream: object
    at: float
    before: int
    """Requests that waited when it came."""
    passed: int = 0
    """Others that were placed since it has waited for as long as patience lasts."""


class Coordinator(Process):
    """One incarnation: a restart is another, with an empty view."""

    def __init__(self, world, place, rules):
        super().__init__(world, place)
        self.world, self.rules = world, rules
        self.core = Core(rules, world.now, world.random.random)
        self.started = world.now
        self.told: dict[str, Told] = {}
        self.asked: dict[int, Asked] = {}
        self._streams: dict[int, object] = {}
        self._numbers: dict[object, int] = {}
        self._handled = 0
        self.after(TICK_SECONDS, self._tick)

    def _tick(self):
        self._handle(m.Tick())
        if self.asked:
            self._check_idle()
        self.after(TICK_SECONDS, self._tick)

    # Workers

    def register(self, stream, registration, info, stats):
        number = self.net.number()
        self._streams[number] = registration
        self._numbers[stream] = number
        registration.stream_of = {**getattr(registration, "stream_of", {}), number: stream}
        stream.lost[1] = lambda: self._gone(stream)
        for name, told in list(self.told.items()):
            if told.info.address == info.address and name != info.worker_id:
                del self.told[name]
        known = self.told.get(info.worker_id)
        draining = known is not None and known.draining
        self.told[info.worker_id] = Told(info, number, draining)
        self._handle(m.WorkerHello(number, info, stats))

    def hear(self, stream, event, *args):
        number = self._numbers.get(stream)
        if number is None:
            return
        for told in self.told.values():
            if told.stream == number:
                if event is m.WorkerDraining:
                    told.draining = True
                elif event is m.WorkerRoleChanged:
                    told.info = replace(told.info, role=args[0])
        self._handle(event(number, *args))

    def _gone(self, stream):
        number = self._numbers.pop(stream)
        del self._streams[number]
        for name, told in list(self.told.items()):
            if told.stream == number:
                del self.told[name]
        self._handle(m.StreamLost(number))

    # Frontends

    def place(self, stream, call, want, timeout):
        ticket = self.net.number()
        deadline = self.net.now + timeout
        self.asked[ticket] = Asked(
            want, deadline, call, stream, self.net.now, len(self.core.desk.queue)
        )
        stream.lost[1] = lambda: self._cancelled(ticket, want)
        self._handle(m.PlaceRequested(ticket, want, deadline))

    def _cancelled(self, ticket, want):
        """The call ended before its answer, or when the answer was on its way."""
        if self.asked.pop(ticket, None) is not None:
            self._handle(m.PlaceCancelled(ticket))
        else:
            self._handle(m.AttemptEnded(want.request_id, want.attempt))

    def report(self, stream, event):
        self._handle(event)
        stream.end(by=1)

    # The core

    def _handle(self, event):
        for command in self.core.handle(event, self.net.now):
            self._act(command)
        self._handled += 1
        if self._handled % INTEGRITY_EVERY == 0:
            self.core.check_integrity()

    def _act(self, command):
        match command:
            case m.AnswerPlacement(ticket=ticket, placement=placement):
                asked = self.asked.pop(ticket)
                self._check_placement(asked, placement)
                self.world.note(
                    self.name,
                    "places",
                    asked.want.request_id,
                    asked.want.attempt,
                    placement.prefill and placement.prefill.worker_id,
                    placement.decode.worker_id,
                )
                self.world.placed(self, asked)
                asked.stream.lost[1] = None
                asked.stream.send(0, asked.call.placed, placement)
            case m.RefusePlacement(ticket=ticket, refusal=refusal):
                asked = self.asked.pop(ticket)
                self._check_refusal(asked, refusal)
                self.world.note(
                    self.name,
                    "refuses",
                    asked.want.request_id,
                    refusal.reason.value,
                    refusal.message,
                )
                asked.stream.lost[1] = None
                error = by_reason(refusal.reason.value, refusal.message, refusal.metadata)
                asked.stream.send(0, asked.call.refused, error)
            case m.GrantLease(stream=number, seconds=seconds):
                self._say(number, "granted", seconds)
            case m.AskResync(stream=number):
                self.net.count["resyncs asked for"] += 1
                self._say(number, "snapshot")
            case m.AskRole(stream=number, role=role, why=why):
                self.net.count["role changes asked for"] += 1
                self._say(number, "change_role", role, why)
            case m.DropWorker(stream=number, worker_id=name, why=why):
                self.world.note(self.name, "drops", name, why)
                told = self.told.get(name)
                if told is not None and told.stream == number:
                    del self.told[name]
                registration = self._streams.get(number)
                if registration is not None:
                    registration.stream_of[number].end(by=1)
            case _:
                raise NotImplementedError(f"{type(command).__name__} is new to the simulation")

    def _say(self, number, what, *args):
        registration = self._streams.get(number)
        if registration is not None:
            stream = registration.stream_of[number]
            stream.send(0, getattr(registration, what), stream, *args)

    # Checks

    def _check_placement(self, asked, placement):
        want = asked.want
        assert self.net.now <= asked.deadline, "placed after its deadline"
        for chosen, decodes in ((placement.decode, True), (placement.prefill, False)):
            if chosen is None:
                continue
            name = chosen.worker_id
            told = self.told.get(name)
            assert told is not None, f"{name} is known to be gone"
            assert not told.draining, f"{name} is known to drain"
            assert name not in want.exclude_workers, f"{name} is excluded"
            role = told.info.role
            assert role.decodes if decodes else role.prefills, f"{name} is {role}"
            assert told.info.model == want.model
            assert want.context_tokens < told.info.total_blocks * told.info.block_tokens
            assert chosen.dp_rank < told.info.dp_ranks, f"{name} has no rank {chosen.dp_rank}"
            load = self.core.members.get(name).load
            assert len(load.bookings) <= load.limit, "more is booked than there is room for"

    def _check_refusal(self, asked, refusal):
        self.net.count[f"refused: {refusal.reason.value}"] += 1
        if refusal.reason is m.Reason.OVERLOADED:
            assert len(self.core.desk.queue) >= self.rules.queue_limit, "there was room to wait"
        if "limit" in refusal.metadata:
            self._check_early(asked, refusal)
        if refusal.reason is m.Reason.NO_WORKERS:
            hopes = [
                name
                for name, told in self.told.items()
                if told.info.role.decodes
                and not told.draining
                and name not in asked.want.exclude_workers
                and asked.want.context_tokens < told.info.total_blocks * told.info.block_tokens
            ]
            assert not hopes, f"{hopes} could have served it"
            assert self.net.now >= self.started + self.rules.lease_seconds, "too early to say"

    def _check_early(self, asked, refusal):
        """What a worker with nothing to do would have done in time must not be refused early.

        A bound that any order of things would have kept: the whole prompt, nothing cached, on one
        worker that is idle, which this coordinator knows.
        """
        want, world = asked.want, self.world
        waited = self.net.now - asked.at
        limit = want.ttft_seconds - waited if want.ttft_seconds else asked.deadline - self.net.now
        early = refusal.metadata.get("limit") in ("ttft_seconds", "deadline")
        if not early or not world.sound(self, 2 * IDLE_SECONDS):
            return
        for worker in world.workers:
            shape = worker.shape
            can = worker.alive and worker.role is m.Role.BOTH and worker.name in self.told
            if (
                can
                and worker.engine.busy_at <= self.net.now - IDLE_SECONDS
                and world.sound(worker, 2 * IDLE_SECONDS)
                and worker.name not in want.exclude_workers
                and want.context_tokens < shape.capacity
            ):
                steps = 1 + want.context_tokens // shape.chunk_tokens
                takes = want.context_tokens / shape.tokens_per_second + steps * shape.step_seconds
                words = f"{worker.name} is idle and would have taken {takes:.3f} of {limit:.3f} s"
                assert takes > limit, words

    def _check_idle(self):
        """Nobody waits for long beside workers that have nothing to do."""
        world, since = self.world, self.net.now - IDLE_SECONDS
        if not world.sound(self, 2 * IDLE_SECONDS):
            return
        up = [w for w in world.workers if w.alive and w.name in self.told]
        if any(w.engine.busy_at > since for w in up if w.role.prefills):
            return  # The prompt may have to wait for that one.
        idle = [
            w
            for w in up
            if w.engine.busy_at <= since and w.role.decodes and world.sound(w, 2 * IDLE_SECONDS)
        ]
        for asked in self.asked.values():
            if asked.at <= since:
                fits = [
                    w.name
                    for w in idle
                    if w.name not in asked.want.exclude_workers
                    and asked.want.context_tokens < w.shape.capacity
                ]
                name = asked.want.request_id
                assert not fits, f"{name} waits at {self.name}, and {fits[0]} is idle"

    def check_calm(self):
        """Nothing waits, nothing is booked, everything known is true."""
        core = self.core
        core.check_integrity()
        assert not self.asked, f"{len(self.asked)} requests wait at {self.name}"
        assert len(core.desk.queue) == 0
        living = {w.name: w for w in self.world.workers if w.alive}
        assert {w.worker_id for w in core.members} == living.keys(), (
            "members differ from the living"
        )
        held = {}
        for member in core.members:
            name, worker = member.worker_id, living[member.worker_id]
            keys = worker.engine.store._pool.keys()
            held.update({key: held.get(key, 0) | member.bit for key in keys})
            assert core.index.known_blocks(name) == len(keys), f"{name} holds something else"
            assert not member.load.bookings, f"{name}: bookings leaked"
            assert member.info.role is worker.role, f"{name}: its role is not the truth"
        everybody = sum(member.bit for member in core.members)
        for key, holders in held.items():
            found = dict(core.index.reach((key,), everybody))
            assert found.get(1, 0) == holders, "the index is not the truth"
