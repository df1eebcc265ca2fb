"""What befalls a cluster: one disaster after the other, until the storm is over."""

from __future__ import annotations

from services.coordinator.core.messages import Role
from tests.simulation.cluster_net import KEEPALIVE_SECONDS

RESTART_SECONDS = (0.1, 1.0)


class Weather:
    """Of one world."""

    def __init__(self, world):
        self.world, self.random = world, world.random
        self.pause = self.random.choice([0.0, 0.3, 0.7, 0.7, 1.5])
        """Seconds between two disasters; 0: fine weather."""
        kinds = [
            *[self.kill_worker] * 3,
            *[self.freeze_engine] * 2,
            *[self.slow_worker] * 2,
            *[self.drain_worker] * 2,
            *[self.cut] * 3,
            *[self.kill_coordinator] * 2,
            *[self.break_stream] * 2,
            self.stall,
            self.kill_frontend,
            self.restart_all_workers,
            self.flap,
            self.change_role,
            self.join,
        ]
        self.kinds = self.random.sample(kinds, self.random.randint(1, 6))

    @property
    def fine(self):
        return not self.pause

    def begin(self):
        if not self.fine:
            self.world.at(self.random.expovariate(1 / self.pause), self.strike)

    def strike(self):
        if self.world.storm:
            self.begin()
            kind = self.random.choice(self.kinds)
            kind()

    def note(self, what, *names):
        self.world.count[what] += 1
        self.world.note("WEATHER:", what, *names)

    def _worker(self):
        living = [w for w in self.world.workers if w.alive]
        return self.random.choice(living) if living else None

    # Workers

    def kill_worker(self, worker=None):
        worker = worker or self._worker()
        if worker is None:
            return
        silently = self.random.random() < 0.3
        self.note("workers killed", worker.name, "silently" * silently)
        self.world.disturb(worker)
        worker.die(silently=silently)
        if self.random.random() < 0.9:
            self.world.at(self.random.uniform(*RESTART_SECONDS), self.world.replace, worker)

    def restart_all_workers(self):
        self.note("all workers restarted")
        for worker in list(self.world.workers):
            if worker.alive:
                self.world.disturb(worker)
                worker.die()
                self.world.at(self.random.uniform(0, 0.3), self.world.replace, worker)

    def freeze_engine(self):
        """It accepts, and nothing comes of it; heartbeats go on."""
        worker = self._worker()
        if worker is not None:
            seconds = self.random.choice([0.5, 3.0, 10.0])
            self.note("engines frozen", worker.name, seconds)
            self.world.disturb(worker, seconds)
            worker.engine.frozen_until = self.world.now + seconds

    def slow_worker(self):
        worker = self._worker()
        if worker is not None:
            self.note("workers slowed", worker.name)
            self.world.disturb(worker, 1e9)
            worker.engine.slowness = self.random.choice([5.0, 30.0])

    def drain_worker(self):
        worker = self._worker()
        if worker is not None and not worker.draining:
            self.note("workers drained", worker.name)
            self.world.disturb(worker)
            worker.drain(self.random.choice([0.3, 2.0]))

    def join(self):
        if len([w for w in self.world.workers if w.alive]) < 8:
            role = self.random.choice([Role.PREFILL, Role.DECODE])
            self.note("workers joined", role)
            self.world.start_worker(role)

    def change_role(self):
        """An operator, or a coordinator that is wrong, wants it."""
        worker = self._worker()
        if worker is not None:
            worker.change_role(self.random.choice([*Role]), "for the sake of it")

    def flap(self):
        """A worker's registration breaks off, several times."""
        worker = self._worker()
        if worker is not None:
            self.note("workers flapping", worker.name)
            self.world.disturb(worker, 3.0)
            for i in range(self.random.randint(1, 5)):
                self.world.at(0.3 * i, self._break_registrations, worker)

    def _break_registrations(self, worker):
        for registration in worker.registrations.values():
            if worker.alive and registration.stream is not None:
                registration.stream.break_off()

    # Others

    def kill_coordinator(self):
        place = self.random.choice(self.world.coordinator_places)
        coordinator = self.world.coordinators[place]
        if coordinator.alive:
            self.note("coordinators killed", place)
            self.world.disturb(coordinator)
            coordinator.die(silently=self.random.random() < 0.3)
            self.world.at(
                self.random.uniform(*RESTART_SECONDS), self.world.start_coordinator, place
            )

    def kill_frontend(self):
        frontend = self.random.choice(self.world.frontends)
        if frontend.alive:
            self.note("frontends killed", frontend.name)
            frontend.die(silently=self.random.random() < 0.5)
            self.world.at(0.2, self.world.start_frontend, frontend)

    def stall(self):
        """A process stands still: stopped, starved, or its clock jumps."""
        processes = self.world.processes()
        process = self.random.choice(processes)
        seconds = self.random.choice([0.3, 1.5, 4.0])
        self.note("processes stalled", process.name, seconds)
        self.world.disturb(process, seconds)
        process.stall(seconds)

    def cut(self):
        processes = self.world.processes()
        if len(processes) < 2:
            return
        some = self.random.sample(processes, 2)
        seconds = self.random.choice([0.3, KEEPALIVE_SECONDS + 0.5, 4.0])
        self.note("partitions", some[0].name, some[1].name, seconds)
        for process in some:
            self.world.disturb(process, seconds)
        self.world.cut(*some, seconds)

    def break_stream(self):
        processes = self.world.processes()
        if not processes:  # all of them are down
            return
        process = self.random.choice(processes)
        if process.streams:
            self.world.disturb(process)
            self.random.choice(list(process.streams)).break_off()
