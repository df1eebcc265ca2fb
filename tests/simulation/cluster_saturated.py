"""A cluster whose queue is never empty: nobody waits for ever, and tenants get their shares.

Fine weather, one coordinator, room for every prompt, so that places in batches are what requests
wait for. Each tenant has several requests waiting all the time, of sizes of its own. Checked are
the bounds that admission.py and fairness.py state, and what tenants really got.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from services.coordinator.core.fairness import OUTPUT_WEIGHT, PROMPT_WEIGHT, Line
from services.coordinator.core.messages import Role
from services.coordinator.core.rules import Rules
from services.engine.api import Sampling
from services.frontend.validate import Wishes
from tests.simulation.cluster_client import Client
from tests.simulation.cluster_frontend import Frontend
from tests.simulation.cluster_storm import LEASE_SECONDS, World
from tests.simulation.cluster_worker import Shape

BUSY_SECONDS = 3.0
WEIGHTS = {"gold": 3.0, "lead": 1.0, "tin": 1.0}


@dataclass(slots=True)
class Run:
    """A placed request: what its tenant was charged, and what it took."""

    tenant: str
    charge: float
    began: float
    ended: float = 0.0
    final: float = 0.0


@dataclass(frozen=True, slots=True)
class Seen:
    """At one moment, by tenant that waited: its counter, and what it had really got."""

    at: float
    counters: dict[str, float]
    got: dict[str, float]


class Saturated(World):
    """One history. `equal`: all have one priority, and endless patience, so that shares hold."""

    def __init__(self, seed, trace=False):
        self.runs: dict[tuple[str, int], Run] = {}
        self.seen: list[Seen] = []
        self.got = dict.fromkeys(WEIGHTS, 0.0)
        super().__init__(seed, trace)

    def build(self):
        draw = self.random
        self.storm, self.loss = False, 0.0
        self.equal = draw.random() < 0.6
        self.tenants = draw.sample([*WEIGHTS], draw.randint(2, 3))
        self.rules = Rules(
            lease_seconds=LEASE_SECONDS,
            queue_limit=1000,
            local_prefill_tokens=10_000,
            queue_patience_seconds=1e9 if self.equal else draw.choice([0.2, 1.0]),
            tenant_weights=WEIGHTS,
        )
        self.coordinator_places = ["c0"]
        self.start_coordinator("c0")
        for _ in range(draw.randint(1, 2)):
            self.start_worker(Role.DECODE, shape=self._shape())
        self.frontends = [Frontend(self, "f0")]
        self.sizes = {t: (draw.choice([20, 60, 150]), draw.choice([2, 8, 20])) for t in WEIGHTS}
        for tenant in self.tenants:
            for _ in range(draw.randint(6, 10)):
                self.at(0.3 + draw.random(), self.ask, tenant)

    def _shape(self):
        return Shape(
            role=Role.DECODE,
            can_be=(),
            blocks=400,
            max_running=self.random.choice([1, 2, 4]),
            max_waiting=8,
            chunk_tokens=64,
            step_seconds=0.02,
            tokens_per_second=4000.0,
            lease_seconds=1.0,
            recompute_max_tokens=0,
            heartbeat_seconds=0.25,
            coalesce_seconds=0.2,
        )

    def ask(self, tenant):
        """One more request, of about the tenant's size."""
        if self.now > BUSY_SECONDS:
            return
        draw, number = self.random, len(self.clients)
        length, most = (max(1, round(n * draw.uniform(0.7, 1.3))) for n in self.sizes[tenant])
        client = Client(
            self,
            f"r{number}",
            (40_000 + number, *range(length)),
            Sampling(max_tokens=most, seed=number + 1),
            deadline=self.now + 1000.0,
            stop_at=draw.randint(1, most) if draw.random() < 0.3 else 1 << 30,
            wishes=Wishes(
                tenant=tenant, priority=0 if self.equal else draw.choice([0, 0, 0, 0, -1])
            ),
            asked=self.now,
        )
        self.admit(client)

    def ended(self, client):
        super().ended(client)
        assert client.ended == "finished", f"{client.id}: {client.ended}"
        tenant = client.wishes.tenant
        self.at(0.0, self.ask, tenant)
        (run,) = (r for (name, _), r in self.runs.items() if name == client.id)
        run.ended = self.now
        run.final = PROMPT_WEIGHT * len(client.prompt) + OUTPUT_WEIGHT * client.got

    def placed(self, coordinator, asked):
        want, core = asked.want, coordinator.core
        attempt = (want.request_id, want.attempt)
        self.runs[attempt] = Run(want.tenant, core.desk.attempts[attempt].charge.tokens, self.now)
        self.got[want.tenant] += self.runs[attempt].charge / WEIGHTS[want.tenant]
        if self.equal:
            self._look(core)
        else:
            self._check_patience(coordinator)

    def _look(self, core):
        """Once the core has given away all the room there was: who still waits?"""
        queue, line = core.desk.queue, Line("m", 0)
        fairness = queue.fairness
        waits = {entry.request.tenant for entry in queue.lane("m")}
        counters = {t: fairness.counter(line, t) for t in sorted(waits)}
        self.seen.append(Seen(self.now, counters, dict(self.got)))

    def _check_patience(self, coordinator):
        """Of n that came before it, and of others every other time, so many may pass one by."""
        for asked in coordinator.asked.values():
            if self.now - asked.at > self.rules.queue_patience_seconds:
                asked.passed += 1
                most = 2 * asked.before + 2
                name = asked.want.request_id
                assert asked.passed <= most, f"{name} was passed by {asked.passed} > {most}"
                self.count["waits beyond patience"] += asked.passed == 1

    def play(self):
        """To its end. Raises AssertionError."""
        self.run(BUSY_SECONDS)
        while self.waiting and self.now < 60.0:
            self.run(self.now + 0.5)
        assert not self.waiting, "some were never served"
        self.run(self.now + 2.0)
        self.check_calm()
        if self.equal:
            self.check_shares()
        self.count["saturated clusters"] += 1
        return self.count

    def check_shares(self):
        """What fairness.py promises, for any two tenants, while both wait."""
        charge = max(run.charge / WEIGHTS[run.tenant] for run in self.runs.values())
        error = max(self._error(tenant) for tenant in self.tenants)
        bound = charge + 2 * error
        for one, other in itertools.combinations(self.tenants, 2):
            together: list[Seen] = []
            for seen in self.seen:
                if one not in seen.counters or other not in seen.counters:
                    together = []
                    continue
                apart = abs(seen.counters[one] - seen.counters[other])
                assert apart <= bound + 1e-6, f"{one} and {other} are {apart:.0f} > {bound:.0f}"
                together.append(seen)
                self._check_got(one, other, together[0], seen, 2 * bound + 2 * error + charge)
                self.count["moments of fairness checked"] += 1

    def _check_got(self, one, other, first, last, bound):
        """The same of what was placed for them, whatever the counters say."""
        a, b = (last.got[t] - first.got[t] for t in (one, other))
        words = f"{one} got {a:.0f} and {other} {b:.0f} in {last.at - first.at:.2f} s"
        assert abs(a - b) <= bound + 1e-6, f"{words}: more than {bound:.0f} apart"

    def _error(self, tenant):
        """The greatest sum of what the charges of requests that run are wrong by."""
        changes = []
        for run in self.runs.values():
            if run.tenant == tenant:
                wrong = abs(run.final - run.charge) / WEIGHTS[tenant]
                changes += [(run.began, wrong), (run.ended, -wrong)]
        return max(itertools.accumulate(wrong for _, wrong in sorted(changes)), default=0.0)
