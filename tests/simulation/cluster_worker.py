"""A worker process: its engine, the services of its role, its registrations."""

from __future__ import annotations

from dataclasses import dataclass

from services.coordinator.core import messages as m
from services.runtime.errors import DrainingError, RoleChangedError
from services.worker.duty import SERVES, Duty
from tests.simulation.cluster_engine import BLOCK, Engine
from tests.simulation.cluster_net import Process, Stream
from tests.simulation.cluster_services import DecodeService, PrefillService

HELLO_SECONDS = 2.0
POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Shape:
    """How a worker is built."""

    role: m.Role
    can_be: tuple[m.Role, ...]
    blocks: int
    max_running: int
    max_waiting: int
    chunk_tokens: int
    step_seconds: float
    tokens_per_second: float
    lease_seconds: float
    recompute_max_tokens: int
    heartbeat_seconds: float
    coalesce_seconds: float
    dp_ranks: int = 1
    model: str = "m"
    kv_layout: str = "a"
    numerics: str = "x"
    region: str = ""

    @property
    def capacity(self):
        """Most tokens of one request: what a rank holds."""
        return self.blocks // self.dp_ranks * BLOCK


class Worker(Process):
    """See the module's docstring. The `address` outlives the process."""

    def __init__(self, world, name, address, shape):
        super().__init__(world, name)
        self.world, self.shape, self.address = world, shape, address
        can_be = frozenset(role.value for role in shape.can_be)
        self.duty = Duty(shape.role.value, can_be, world.role_min_seconds)
        self.engine = Engine(self, shape, self._deliver)
        self.prefill, self.decode = PrefillService(self), DecodeService(self)
        self._services = {"prefill": self.prefill, "decode": self.decode}
        self._serve()
        self.registrations: dict[str, Registration] = {}
        for place in world.coordinator_places:
            registration = self.registrations[place] = Registration(self, place)
            self.after(world.random.uniform(0, 0.1), registration.start)
        self.engine.store.on_change(self._store_changed)

    @property
    def role(self):
        return m.Role(self.duty.role)

    @property
    def draining(self):
        return self.duty.leaving

    @property
    def live(self):
        return self.prefill.live + self.decode.live

    def info(self):
        shape = self.shape
        return m.WorkerInfo(
            worker_id=self.name,
            role=self.role,
            address=self.address,
            model=shape.model,
            kv_layout=shape.kv_layout,
            block_tokens=BLOCK,
            total_blocks=shape.blocks,
            max_running=shape.max_running,
            context_tokens=shape.blocks * BLOCK,
            dp_ranks=shape.dp_ranks,
            region=shape.region,
            numerics=shape.numerics,
            can_be=shape.can_be,
        )

    def stats(self):
        load = self.engine.stats()
        return m.WorkerStats(
            running=load.running,
            waiting=load.waiting,
            free_blocks=load.free_blocks,
            queued_tokens=load.queued_tokens,
            prefill_tokens_per_second=load.prefill_tokens_per_second,
            step_seconds=load.step_seconds,
            held_blocks=load.held_blocks,
            cached_blocks=load.cached_blocks,
            finished=load.finished,
            preempted=load.preempted,
            leases=load.leases,
            ranks=tuple(
                m.RankStats(r.running, r.waiting, r.free_blocks, r.kv_tokens, r.queued_tokens)
                for r in load.ranks
            ),
        )

    def release(self, lease_id):
        self.engine.release(lease_id)

    def serve_fetch(self, stream, fetch):
        self.engine.serve(stream, fetch)

    def _deliver(self, outputs):
        self.prefill.deliver(outputs)
        self.decode.deliver(outputs)

    def _store_changed(self):
        for registration in self.registrations.values():
            registration.changed()

    # Its role, and its end

    def change_role(self, role, why):
        before = self.duty.role
        if self.duty.take(role.value, self.net.now):
            return
        if self.duty.role != before:
            self.net.count["roles changed"] += 1
            self.world.note(self.name, "becomes", role, why)
            self.world.disturb(self)
            self._serve()
        for registration in self.registrations.values():
            registration.report()

    def _serve(self):
        closed = RoleChangedError(f"this worker's role is {self.duty.role} now")
        for name in SERVES[self.duty.role]:
            self._services[name].open()
        for name in self._services.keys() - SERVES[self.duty.role]:
            self._services[name].drain(closed)

    def drain(self, seconds):
        """SIGTERM."""
        self.duty.leaving = True
        why = DrainingError("this worker is shutting down")
        for service in self._services.values():
            service.drain(why)
        for registration in self.registrations.values():
            registration.report()
        self.after(POLL_SECONDS, self._drained, self.net.now + seconds, why)

    def _drained(self, deadline, why):
        busy = self.live or len(self.engine.store._leases)
        if busy and self.net.now < deadline:
            self.after(POLL_SECONDS, self._drained, deadline, why)
            return
        self.net.count["requests handed back"] += self.live
        for service in self._services.values():
            service.hand_back(why)
        self.after(0.5, self._leave)

    def _leave(self):
        self.world.note("leaves", self.name)
        self.die()
        self.world.left(self)

    def check_calm(self):
        """It runs nothing and holds nothing, and every coordinator knows of it."""
        pool, name = self.engine.store._pool, self.name
        self.engine.store.check_integrity()
        assert not self.live, f"{name} still has {[*self.decode.owner, *self.prefill.waiting]}"
        assert not self.engine.live, f"{name}'s engine still has {[*self.engine.live]}"
        assert not len(self.engine.store._leases), f"{name} still has leases"
        assert pool.held == 0, f"{name} still holds {pool.held} blocks"
        for registration in self.registrations.values():
            assert registration.accepted, f"{name} is not registered with {registration.place}"


class Registration:
    """The worker's Register stream to one coordinator, as registration.py keeps it."""

    def __init__(self, worker, place):
        self.worker, self.place = worker, place
        self.stream: Stream | None = None
        self.accepted = False
        self._log = worker.engine.store.begin_log()
        self._sequence = 0
        self._pause = 0.1
        self._interval = worker.shape.heartbeat_seconds
        self._told_role: m.Role | None = None
        self._told_draining = False
        self._telling = False

    def start(self):
        worker = self.worker
        coordinator = worker.world.coordinators[self.place]
        self.accepted = self._told_draining = False
        self._told_role = worker.role
        stream = self.stream = Stream(worker, coordinator, self.ended)
        stream.send(1, coordinator.register, stream, self, worker.info(), worker.stats())
        worker.after(HELLO_SECONDS, self._check_hello, stream)

    def _check_hello(self, stream):
        if self.stream is stream and not self.accepted:
            stream.end(by=0)
            self.ended()

    def ended(self):
        """However it ended: again, after a pause."""
        self.stream, self.accepted = None, False
        draw = self.worker.net.random.random()
        self.worker.after(self._pause * (0.5 + draw / 2), self.start)
        self._pause = min(2.0, self._pause * 2)

    # What the coordinator says

    def granted(self, stream, seconds):
        if stream is self.stream:
            self.accepted, self._pause = True, 0.1
            self._interval = min(self._interval, seconds / 3)
            self.snapshot(stream)
            self._heartbeat(stream)

    def snapshot(self, stream):
        if stream is self.stream and self.accepted:
            self._sequence = 0
            self._log.restart()
            self._tell()

    def change_role(self, stream, role, why):
        if stream is self.stream:
            self.worker.change_role(role, why)

    # What it says

    def _say(self, event, *args):
        """Some of it is lost, or comes twice, by a worker's own fault: gRPC does neither."""
        net, coordinator = self.worker.net, self.stream.ends[1]
        copies = 1
        # Without a snapshot that starts the numbers anew, later ones could not be told from old.
        again = event is m.WorkerHeartbeat or (event is m.WorkerKvEvents and args[0] > 1)
        if again and net.storm and net.random.random() < net.loss:
            copies = net.random.choice([0, 2])
            net.count["messages lost" if not copies else "messages doubled"] += 1
        for _ in range(copies):
            self.stream.send(1, coordinator.hear, self.stream, event, *args)

    def report(self):
        """Load, behind what is to be told before it."""
        if not self.accepted:
            return
        if self.worker.role is not self._told_role:
            self._told_role = self.worker.role
            self._say(m.WorkerRoleChanged, self._told_role)
        if self.worker.draining and not self._told_draining:
            self._told_draining = True
            self._say(m.WorkerDraining)
        self._say(m.WorkerHeartbeat, self.worker.stats())

    def _heartbeat(self, stream):
        if stream is self.stream and self.accepted:
            self.report()
            self.worker.after(self._interval, self._heartbeat, stream)

    def changed(self):
        """The prefix cache did; what comes within a while goes as one message."""
        if self.accepted and not self._telling and self._log._changes:
            self._telling = True
            self.worker.after(self.worker.shape.coalesce_seconds, self._tell)

    def go_on(self):
        """One more change, by which a coordinator sees that it lacks some before."""
        if self.accepted:
            self._sequence += 1
            self._say(m.WorkerKvEvents, self._sequence, False, (), ())

    def _tell(self):
        self._telling = False
        if not self.accepted:
            return
        news = self.worker.engine.store.events(self._log)
        if news.snapshot or news.stored or news.removed:
            self._sequence += 1
            self._say(m.WorkerKvEvents, self._sequence, news.snapshot, news.stored, news.removed)
