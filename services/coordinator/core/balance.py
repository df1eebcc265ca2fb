"""When a pool is out of balance: which worker should change its role, and why. Pure.

A pool's sides are compared by the part of what they have that is needed, 1 being all of it:

    prefill   the rate that would keep up with the prompts and clear the queue in HORIZON_SECONDS,
              over the rate there is. Keeping up takes the part of their time that workers are busy.
    decode    requests over places, or KV blocks over the pool's, whichever is more. Requests whose
              prompt is still being computed hold a place too, for want of prefill and not of
              decode, so they are not counted.

Requests in the coordinator's queue wait for the side that is needed more. A worker that serves both
counts half on each. The rules:

 1. A side of which PRESSED is needed gets a worker of the other one if that is EASY after it. So
    what was a reason to go is none to come back: where the one that gave is pressed next, it is
    because of more work and not because of the change.
 2. That has to hold on average for as long as the operator says, and at the moment in the end.
 3. No side is left without a worker. The last one of a side may only come to serve both.
 4. Of those that may change, the one with fewest requests to move, and then fewest KV blocks.
 5. Then the pool is left alone for REST times as long, so that the change shows in the figures. Who
    was asked is not asked again within REST_SECONDS: a worker has its own reasons to stay.

A look walks over the pool's workers; there are LOOKS of them in the time of rule 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from services.coordinator.core.membership import Worker
from services.coordinator.core.messages import AskRole, Role
from services.coordinator.core.pools import Pool
from services.coordinator.core.predict import NOMINAL_TOKENS_PER_SECOND

HORIZON_SECONDS = 10.0
PRESSED = 0.9
EASY = 0.75
REST = 3.0
REST_SECONDS = 60.0
LOOKS = 10
WORTH_ONE = 0.25
"""Where no prefill worker is up: that much of one's time has to be needed for one to be wanted."""

_SHARE = {Role.PREFILL: (1.0, 0.0), Role.DECODE: (0.0, 1.0), Role.BOTH: (0.5, 0.5)}
"""What a worker of a role counts on either side: prefill, decode."""


@dataclass(frozen=True, slots=True)
class Queued:
    """Requests of one model in the coordinator's queue, and the tokens of their contexts."""

    requests: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Need:
    """What requests need of a pool."""

    prefill_rate: float = 0.0
    """Prompt tokens a second."""
    requests: float = 0.0
    """Places in decode workers' batches."""
    blocks: float = 0.0
    """KV blocks of decode workers."""

    def towards(self, other: Need, part: float) -> Need:
        """Moved by a part of the way, in [0, 1]."""
        return Need(
            self.prefill_rate + part * (other.prefill_rate - self.prefill_rate),
            self.requests + part * (other.requests - self.requests),
            self.blocks + part * (other.blocks - self.blocks),
        )


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a pool has of it."""

    rate: float = 0.0
    places: float = 0.0
    blocks: float = 0.0

    def plus(self, worker: Worker, rate: float, role: Role, sign: int = 1) -> Capacity:
        """With (or without) a worker in a role; it computes prompts at `rate` tokens a second."""
        prefill, decode = _SHARE[role]
        return Capacity(
            self.rate + sign * prefill * rate,
            self.places + sign * decode * worker.load.limit,
            self.blocks + sign * decode * worker.info.total_blocks,
        )

    def pressure(self, need: Need) -> Pressure:
        """How much of it is needed."""
        return Pressure(
            _over(need.prefill_rate, self.rate),
            max(_over(need.requests, self.places), _over(need.blocks, self.blocks)),
        )


@dataclass(frozen=True, slots=True)
class Pressure:
    """The part of each side that is needed, 1 being all of it."""

    prefill: float
    decode: float

    def on(self, role: Role) -> float:
        """On one side."""
        return self.prefill if role is Role.PREFILL else self.decode

    def __str__(self) -> str:
        return f"prefill {self.prefill:.0%}, decode {self.decode:.0%}"


@dataclass(frozen=True, slots=True)
class Figures:
    """A pool at one moment."""

    need: Need
    capacity: Capacity
    usual_rate: float
    """Of a prefill worker, for one that has not shown its own."""


@dataclass(slots=True)
class _Watch:
    """What is kept about a pool between two looks."""

    need: Need
    looked: float
    wants: Role | None = None
    since: float = 0.0
    rests_until: float = 0.0


class Balance:
    """Watches pools. One out of balance for `seconds` has a worker asked; 0: none ever."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._looked = -math.inf
        self._watches: dict[tuple[str, str], _Watch] = {}
        self._asked: dict[str, float] = {}

    def review(
        self,
        pools: Iterable[Pool],
        queued: Callable[[str], Queued],
        now: float,
        *,
        decides: bool,
    ) -> list[AskRole]:
        """Looks, if it is time to: who should change its role, one worker of a pool at most.

        `queued` tells what waits for a model. Of several coordinators one decides; the others look
        too, so that any may come to.
        """
        if not self._seconds or now - self._looked < self._seconds / LOOKS:
            return []
        self._looked = now
        self._asked = {w: at for w, at in self._asked.items() if now - at < REST_SECONDS}
        before, self._watches = self._watches, {}
        asks: list[AskRole] = []
        for pool in pools:
            key = (pool.model, pool.kv_layout)
            figures = figures_of(pool, queued(pool.model))
            watch = before.get(key) or _Watch(figures.need, now)
            self._watches[key] = watch
            self._look(watch, figures, now)
            if decides:
                asks += self._ask(watch, pool, figures, now)
        return asks

    def role_changed(self, worker: Worker, now: float) -> None:
        """A worker has, whoever asked it: its pool has to settle."""
        watch = self._watches.get((worker.info.model, worker.info.kv_layout))
        if watch is not None:
            watch.wants, watch.rests_until = None, now + REST * self._seconds

    def _look(self, watch: _Watch, figures: Figures, now: float) -> None:
        part = 1 - math.exp(-2 * (now - watch.looked) / self._seconds)
        watch.need, watch.looked = watch.need.towards(figures.need, part), now
        wants = wanted(figures.capacity.pressure(watch.need))
        if wants is not watch.wants:
            watch.wants, watch.since = wants, now

    def _ask(self, watch: _Watch, pool: Pool, figures: Figures, now: float) -> Iterator[AskRole]:
        if watch.wants is None or now < max(watch.since + self._seconds, watch.rests_until):
            return
        if figures.capacity.pressure(figures.need).on(watch.wants) < PRESSED:
            return
        choice = choose(pool, figures, watch.need, watch.wants, self._asked.keys())
        if choice is None:
            return
        worker, role, after = choice
        self._asked[worker.worker_id] = now
        watch.wants, watch.rests_until = None, now + REST * self._seconds
        before = figures.capacity.pressure(watch.need)
        yield AskRole(worker.stream, role, f"needed: {before}; after the change: {after}")


def figures_of(pool: Pool, queued: Queued) -> Figures:
    """What there is and what is needed now."""
    prefill, decode = pool.prefill.up.values(), pool.decode.up.values()
    usual = _usual_rate(prefill) or _usual_rate(decode) or NOMINAL_TOKENS_PER_SECOND
    capacity = Capacity()
    for worker in {**pool.prefill.up, **pool.decode.up}.values():
        capacity = capacity.plus(worker, _rate(worker, usual), worker.info.role)
    # Without prefill workers those of decode compute the prompts.
    computing = prefill or decode
    rate = sum(_rate(w, usual) * _computes(w) for w in computing if w.load.stats.queued_tokens)
    rate += sum(w.load.queued_tokens for w in computing) / HORIZON_SECONDS
    requests = sum(w.load.requests for w in decode)
    prompts = sum(w.load.requests for w in prefill if w.info.role is Role.PREFILL)
    generating = max(0, requests - prompts)
    used = sum(w.info.total_blocks - w.load.free_blocks for w in decode)
    blocks = used * generating / requests if requests else 0.0
    pressure = capacity.pressure(Need(rate, generating, blocks))
    if not decode:  # Whoever comes will need one.
        generating = max(1, queued.requests)
    elif pressure.prefill > pressure.decode:
        rate += queued.tokens / HORIZON_SECONDS
    else:
        generating += queued.requests
        blocks += queued.tokens / next(iter(decode)).info.block_tokens
    if not prefill and rate < WORTH_ONE * usual:
        rate = 0.0
    return Figures(Need(rate, generating, blocks), capacity, usual)


def wanted(pressure: Pressure) -> Role | None:
    """The side that needs another worker; None: neither."""
    if max(pressure.prefill, pressure.decode) < PRESSED:
        return None
    return Role.PREFILL if pressure.prefill > pressure.decode else Role.DECODE


def choose(
    pool: Pool, figures: Figures, need: Need, wants: Role, not_these: Iterable[str]
) -> tuple[Worker, Role, Pressure] | None:
    """Who changes to help a side, to what, and what that will give; None: nobody can."""
    gives = Role.DECODE if wants is Role.PREFILL else Role.PREFILL
    side = pool.side(gives).up
    passed_over = set(not_these)
    before = figures.capacity.pressure(need)
    best: tuple[tuple[int, int, str], Worker, Role, Pressure] | None = None
    for worker in side.values():
        role = wants if len(side) > 1 else Role.BOTH
        if role is worker.info.role or role not in worker.info.can_be:
            continue
        if worker.worker_id in passed_over:
            continue
        rate = _rate(worker, figures.usual_rate)
        left = figures.capacity.plus(worker, rate, worker.info.role, -1)
        after = left.plus(worker, rate, role).pressure(need)
        if after.on(gives) > EASY or after.on(wants) >= before.on(wants):
            continue
        load = worker.load
        to_move = (load.requests, worker.info.total_blocks - load.free_blocks, worker.worker_id)
        if best is None or to_move < best[0]:
            best = (to_move, worker, role, after)
    return None if best is None else best[1:]


def _computes(worker: Worker) -> float:
    """The part of a worker that computes prompts while it has some."""
    return _SHARE[worker.info.role][0] or 1.0


def _rate(worker: Worker, usual: float) -> float:
    """Tokens a second. That of a decode worker is of short prompts between steps of its batch."""
    measured = worker.load.stats.prefill_tokens_per_second
    return measured if measured and worker.info.role is not Role.DECODE else usual


def _usual_rate(workers: Iterable[Worker]) -> float:
    rates = [w.load.stats.prefill_tokens_per_second for w in workers]
    rates = [rate for rate in rates if rate > 0]
    return sum(rates) / len(rates) if rates else 0.0


def _over(need: float, capacity: float) -> float:
    if need <= 0:
        return 0.0
    return need / capacity if capacity > 0 else math.inf
