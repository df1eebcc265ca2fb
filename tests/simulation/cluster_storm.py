"""A whole cluster in seeded weather: the pure objects that serve, in processes that fail.

Real: the coordinators' Core, the frontends' Request and patience, the workers' Stepper, Scheduler,
KvStore with its leases and watches, Duty, block keys. Simulated: time, processes, the network, the
model.
"""

from __future__ import annotations

from services.coordinator.core.messages import Role
from services.coordinator.core.rules import Rules
from services.engine.api import Sampling
from services.frontend.coordinator import PATIENCE_SECONDS
from services.frontend.validate import Wishes
from tests.simulation.cluster_client import NEVER, Client
from tests.simulation.cluster_coordinator import Coordinator
from tests.simulation.cluster_frontend import Frontend
from tests.simulation.cluster_net import Net
from tests.simulation.cluster_weather import Weather
from tests.simulation.cluster_worker import Shape, Worker

STORM_SECONDS = 3.0
CALM_SECONDS = 3.5
"""A stream that is cut is given up after 1 s, a new one begun 2 s later, and then accepted."""
LEASE_SECONDS = 1.5
KV_LEASE_SECONDS = 1.0
LONGEST_SECONDS = 60.0
FAMILIES = 3


class World(Net):
    """One cluster and its history."""

    def __init__(self, seed, trace=False):
        super().__init__(seed, trace)
        draw = self.random
        self.weather = Weather(self)
        self.silence_seconds = 0.8
        self.stall_seconds = draw.choice([1.5, 3.0])
        self.max_attempts = 5
        self.role_min_seconds = draw.choice([0.0, 1.0])
        self.step_seconds = draw.choice([0.01, 0.03])
        self.disturbed: dict[str, float] = {}
        self.coordinators: dict[str, Coordinator] = {}
        self.workers: list[Worker] = []
        self._at: dict[str, Worker] = {}
        self.clients: list[Client] = []
        self.waiting: dict[Client, None] = {}
        self.build()

    def build(self):
        """The cluster as it is at first."""
        draw = self.random
        if self.weather.fine:
            self.loss = 0.0
        self.rules = Rules(
            lease_seconds=LEASE_SECONDS,
            queue_limit=draw.choice([2, 50, 50]),
            local_prefill_tokens=draw.choice([0, 24, 64]),
            worker_wait_seconds=draw.choice([0.0, 2.0]),
            rebalance_seconds=draw.choice([0.0, 0.5]),
            queue_patience_seconds=draw.choice([0.5, 30.0]),
            tenant_weights={"gold": 3.0},
            ttft_seconds=draw.choice([0.0, 0.0, 0.3]),
        )
        self.coordinator_places = [f"c{i}" for i in range(draw.choice([1, 2, 2, 3]))]
        for place in self.coordinator_places:
            self.start_coordinator(place)
        for _ in range(draw.randint(0, 2)):
            self.start_worker(draw.choice([Role.PREFILL, Role.PREFILL, Role.BOTH]))
        for _ in range(draw.randint(1, 3)):
            self.start_worker(draw.choice([Role.DECODE, Role.DECODE, Role.BOTH]))
        self.frontends = [Frontend(self, f"f{i}") for i in range(draw.choice([1, 2]))]
        self.tenants = draw.choice([[""], ["gold", "lead"]])
        self.rate = draw.choice([3.0, 5.0, 10.0])
        self.at(draw.uniform(0, 0.5), self.new_client)
        self.weather.begin()

    # Processes

    def start_coordinator(self, place):
        coordinator = self.coordinators[place] = Coordinator(self, place, self.rules)
        # Without a directory, or behind a partition, more than one may think that it decides.
        first = place == self.coordinator_places[0]
        coordinator.core.decides = first or self.random.random() < 0.2

    def start_frontend(self, former):
        self.frontends[self.frontends.index(former)] = Frontend(self, former.name)

    def start_worker(self, role, address=None, shape=None):
        draw, number = self.random, self.number()
        shape = shape or Shape(
            role=role,
            can_be=draw.choice([(), (), tuple(Role)]),
            blocks=draw.choice([24, 48]),
            max_running=draw.choice([1, 2, 4, 8]),
            max_waiting=draw.choice([0, 1, 4]),
            chunk_tokens=draw.choice([32, 128]),
            step_seconds=self.step_seconds,
            tokens_per_second=draw.choice([2000.0, 8000.0]),
            lease_seconds=KV_LEASE_SECONDS,
            recompute_max_tokens=draw.choice([0, 64, 2048]),
            heartbeat_seconds=0.5,
            coalesce_seconds=draw.choice([0.02, 0.2]),
            dp_ranks=draw.choice([1, 1, 2, 4]),
        )
        address = address or f"h{number}"
        worker = Worker(self, f"{role.value}-{number}", address, shape)
        self.workers.append(worker)
        self._at[address] = worker
        self.disturb(worker)
        self.note("starts", worker.name, address)
        return worker

    def replace(self, worker):
        """A supervisor starts what died anew; or it comes back somewhere else."""
        address = worker.address if self.random.random() < 0.6 else None
        self.start_worker(worker.shape.role, address, worker.shape)

    def left(self, worker):
        """A worker that drained has left."""
        if self.random.random() < 0.8:
            self.at(self.random.uniform(0.1, 1.0), self.replace, worker)

    def worker_at(self, address):
        return self._at[address]

    def processes(self):
        every = [*self.coordinators.values(), *self.frontends, *self.workers]
        return [p for p in every if p.alive]

    def disturb(self, process, seconds=0.0):
        """It can't be held to anything until then."""
        until = max(self.disturbed.get(process.name, 0.0), self.now + seconds)
        self.disturbed[process.name] = until

    def sound(self, process, seconds):
        """Whether nothing has befallen it for so long."""
        return process.alive and self.now - self.disturbed.get(process.name, 0.0) >= seconds

    # Clients

    def new_client(self):
        if not self.storm:
            return
        draw = self.random
        self.at(draw.expovariate(self.rate), self.new_client)
        number = len(self.clients)
        family, length = draw.randrange(FAMILIES), draw.choice([3, 20, 40, 70, 100, 150])
        if draw.random() < 0.02:
            length = 1000
        prompt = [family * 1000 + i for i in range(length)]
        if draw.random() < 0.5:
            prompt[-1 - draw.randrange(min(20, length))] = 40_000 + number
        seed, most = number + 1, draw.choice([1, 3, 6, 6, 10, 24])
        client = Client(
            self,
            f"r{number}",
            tuple(prompt),
            Sampling(max_tokens=most, seed=seed, stop_token_ids=()),
            deadline=self.now + draw.choice([0.3, 2.0, 5.0, 10.0]),
            stop_at=draw.randint(1, 12) if draw.random() < 0.2 else 1 << 30,
            wishes=Wishes(
                tenant=draw.choice(self.tenants),
                priority=draw.choice([0, 0, 0, 1, -1]),
                session=draw.choice(["", "", f"s{number % 3}"]),
                ttft_seconds=draw.choice([0.0, 0.0, 0.0, 0.1, 1.0]),
                itl_seconds=draw.choice([0.0, 0.0, 0.0, 0.005, 0.1]),
            ),
            asked=self.now,
        )
        self.admit(client)
        if draw.random() < 0.08:
            self.at(draw.uniform(0, 1.0), client.cancel)

    def admit(self, client):
        """It calls a frontend, if there is any."""
        self.clients.append(client)
        frontends = [f for f in self.frontends if f.alive]
        if not frontends:
            return
        self.waiting[client] = None
        client.frontend = self.random.choice(frontends)
        asked = (len(client.prompt), client.sampling.max_tokens, client.deadline)
        self.note("client", client.id, *asked, client.frontend.name)
        client.frontend.after(0.0, client.frontend.serve, client)

    def ended(self, client):
        """A client's request did."""
        self.waiting.pop(client, None)

    def placed(self, coordinator, asked):
        """A coordinator placed a request."""

    def unjustified(self, client, error, live):
        """Why a request must not have ended so; empty if it may."""
        reason = error.reason
        if reason in NEVER:
            return "nobody should ever see this"
        if reason == "DEADLINE" and error.metadata.get("limit") == "deadline":
            return ""  # It would have passed; checked where it was decided.
        if reason == "DEADLINE":
            return "" if self.now >= client.deadline - 1e-9 else "there is time left"
        if reason == "SLO_UNATTAINABLE" and client.got:
            return "its stream had begun"
        if reason in ("OVERLOADED", "SLO_UNATTAINABLE"):
            return ""  # Checked where it was decided.
        if "attempts" in error.metadata:
            return "in fine weather" if self.weather.fine else ""
        frontend = live.frontend
        if self.loss or not self.sound(frontend, PATIENCE_SECONDS):
            return ""
        if reason == "COORDINATOR_UNAVAILABLE" and client.deadline - self.now > 0.5:
            there = [c for c in self.coordinators.values() if self.sound(c, PATIENCE_SECONDS)]
            return f"{there[0].name} was there all the time" if there else ""
        if reason in ("NO_WORKERS", "INVALID_REQUEST"):
            if not all(self.sound(c, 3 * LEASE_SECONDS) for c in self.coordinators.values()):
                return ""
            return self._there(client, live)
        return "" if reason == "COORDINATOR_UNAVAILABLE" else "this is no way to end"

    def _there(self, client, live):
        """That a worker was there all the time that could have served a request, in words."""
        for worker in self.workers:
            if (
                self.sound(worker, 2 * LEASE_SECONDS)
                and worker.role.decodes
                and not worker.draining
                and worker.name not in live.core.excluded
                and len(client.prompt) + 31 < worker.shape.capacity
            ):
                return f"{worker.name} was there all the time"
        return ""

    # The history

    def play(self):
        """To its end. Raises AssertionError."""
        self.run(STORM_SECONDS)
        self.calm_down()
        while self.waiting and self.now < LONGEST_SECONDS:
            self.run(self.now + 0.5)
        assert not self.waiting, f"{sorted(c.id for c in self.waiting)} never ended"
        awake = max(p.stalled_until for p in self.processes())
        self.run(max(self.now, awake) + CALM_SECONDS)
        self.check_calm()
        self.count["events"] += self.events
        self.count["clusters"] += 1
        return self.count

    def calm_down(self):
        """The storm is over: everything is mended."""
        self.note("CALM")
        self.storm = False
        self._cuts.clear()
        for worker in self.workers:
            worker.engine.frozen_until = 0.0
            worker.engine.slowness = 1.0
            for registration in worker.registrations.values():
                registration.go_on()
        if not any(w.alive and w.role.decodes and not w.draining for w in self.workers):
            self.start_worker(Role.DECODE)

    def check_calm(self):
        """Nothing is left of any request anywhere, and all views agree."""
        for frontend in self.frontends:
            assert not frontend.live, f"{frontend.name} still has requests"
        for worker in self.workers:
            if worker.alive:
                worker.check_calm()
        for coordinator in self.coordinators.values():
            coordinator.check_calm()
        self.count["requests"] += len(self.clients)
