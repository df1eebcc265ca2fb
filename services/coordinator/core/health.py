"""Workers that are up, and better avoided: slow ones, failing ones, flapping ones, unheard ones.

A worker that is avoided gets only what nobody else can take, so whatever is said here, nobody waits
for want of a healthy worker where an unhealthy one has room. It is avoided

- slow: if its steps or its prompts take more than SLOW times the median of its pool, in STRIKES
  reports in a row that say something new; until they take less than BETTER times it in as many. A
  worker that gets no work has nothing new to report, so after a back-off it is on trial: the next
  TRIAL reports count for nothing, then the rule holds again.
- failing: if frontends reported FAILURES failed attempts, each counting half as much after
  FAILURE_HALF_LIFE, and what comes within BURST_SECONDS as one: a hundred requests lost in one blow
  are one failure. For a back-off.
- flapping: if it registered more than FLAPS times, each counting half as much after
  FLAP_HALF_LIFE. Each process has another id, so this is kept by name and host; where several
  workers share these, it is FLAPS times the most of them that were live at one time. For a
  back-off.
- unheard: if it did not report for `stale_seconds`. Its figures are old, and it may be about to
  lose its lease.

Never more than a third of a pool (but one of two): what is wrong with more is not the worker, it is
the load, the network, or this process having slept. Back-offs double up to a bound, and begin anew
when nothing happened for as long as the last one took, FORGIVEN times.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

from services.coordinator.core.median import Median
from services.coordinator.core.messages import WorkerInfo
from services.coordinator.core.predict import Measured
from services.coordinator.core.ranking import Ranking

SLOW = 3.0
BETTER = 2.0
STRIKES = 4
TRIAL = 20
FAILURES = 5
FAILURE_HALF_LIFE = 30.0
BURST_SECONDS = 0.2
SILENCE = 2.0
"""Failures that count for one of a worker that went silent, since each cost a client seconds."""
FLAPS = 5
FLAP_HALF_LIFE = 60.0
FORGIVEN = 4.0
NAMES_REMEMBERED = 4096


@dataclass(slots=True)
class BackOff:
    """A time that doubles from `first` to `most`, seconds."""

    first: float
    most: float
    until: float = 0.0
    length: float = 0.0

    def start(self, now: float) -> float:
        """Begins one; when it ends."""
        if now - self.until > FORGIVEN * self.length:
            self.length = 0.0
        self.length = min(self.most, 2 * self.length) if self.length else self.first
        self.until = now + self.length
        return self.until


@dataclass(slots=True)
class Decaying:
    """A count, each of which counts half as much after `half_life` seconds."""

    half_life: float
    value: float = 0.0
    at: float = 0.0

    def add(self, by: float, now: float) -> float:
        """What it is with some more."""
        self.value = self.kept(now) * self.value + by
        self.at = now
        return self.value

    def kept(self, now: float) -> float:
        """The part that what was counted at the last time counts now."""
        return float(0.5 ** (max(0.0, now - self.at) / self.half_life))


class Cause(enum.Enum):
    """Why a worker is avoided."""

    SLOW = enum.auto()
    FAILING = enum.auto()
    FLAPPING = enum.auto()
    UNHEARD = enum.auto()


class _Hold(NamedTuple):
    until: float
    words: str


@dataclass(slots=True)
class _Pool:
    steps: Median = field(default_factory=Median)
    prompts: Median = field(default_factory=Median)
    members: int = 0
    avoided: Ranking[str] = field(default_factory=Ranking)
    """By when it ends."""

    @property
    def most(self) -> int:
        """How many may be avoided."""
        return max(1, self.members // 3) if self.members > 1 else 0


@dataclass(slots=True)
class _Name:
    """Workers of one name on one host."""

    starts: Decaying = field(default_factory=lambda: Decaying(FLAP_HALF_LIFE))
    back_off: BackOff = field(default_factory=lambda: BackOff(10.0, 300.0))
    live: int = 0
    peak: float = 0.0
    """Most of them live at one time, lately."""


@dataclass(slots=True)
class _Worker:
    worker_id: str
    key: Hashable
    pool: _Pool
    name: tuple[str, str]
    heard: float
    measured: Measured = field(default_factory=Measured)
    holds: dict[Cause, _Hold] = field(default_factory=dict)
    strikes: int = 0
    """Reports in a row for a change: that it is slow, or better."""
    on_trial: int = 0
    """Reports that still count for nothing."""
    slowness: BackOff = field(default_factory=lambda: BackOff(10.0, 300.0))
    failing: BackOff = field(default_factory=lambda: BackOff(2.0, 60.0))
    failures: Decaying = field(default_factory=lambda: Decaying(FAILURE_HALF_LIFE))
    failed: float = float("-inf")

    def may_be_held(self, now: float) -> bool:
        """Whether it is avoided, or not too many others of its pool are."""
        avoided = self.pool.avoided
        avoided.pop_through(now)
        return self.worker_id in avoided or len(avoided) < self.pool.most

    def hold(self, cause: Cause, until: float, words: str) -> None:
        """Avoids it for a cause."""
        self.holds[cause] = _Hold(until, words)
        self.pool.avoided.put(self.worker_id, max(h.until for h in self.holds.values()))

    def release(self, cause: Cause) -> None:
        """A cause is gone."""
        if self.holds.pop(cause, None) is None or self.worker_id not in self.pool.avoided:
            return
        if self.holds:
            self.pool.avoided.put(self.worker_id, max(h.until for h in self.holds.values()))
        else:
            self.pool.avoided.discard(self.worker_id)


class Health:
    """Who is to be avoided. Every operation costs the same however many workers there are.

    `stale_seconds`: some heartbeats, and well less than a lease.
    """

    def __init__(self, stale_seconds: float) -> None:
        self._stale_seconds = stale_seconds
        self._pools: dict[Hashable, _Pool] = {}
        self._workers: OrderedDict[str, _Worker] = OrderedDict()
        """Those heard of longest ago first."""
        self._names: OrderedDict[tuple[str, str], _Name] = OrderedDict()

    def registered(self, info: WorkerInfo, pool: Hashable, now: float) -> None:
        """A worker said Hello, as one of a pool's: those of its model, KV layout and role."""
        self.forget(info.worker_id)
        key = _name(info)
        name = self._names.pop(key, None) or _Name()
        self._names[key] = name
        name.live += 1
        name.peak = max(float(name.live), name.starts.kept(now) * name.peak)
        worker = _Worker(info.worker_id, pool, self._join(pool), key, now)
        self._workers[info.worker_id] = worker
        if name.starts.add(1.0, now) > FLAPS * name.peak and name.back_off.until <= now:
            name.back_off.start(now)
        if name.back_off.until > now and worker.may_be_held(now):
            words = f"{key[0]} on {key[1]} registered more than {FLAPS} times lately"
            worker.hold(Cause.FLAPPING, name.back_off.until, words)
        if len(self._names) > NAMES_REMEMBERED:
            self._names.popitem(last=False)

    def heard(self, worker_id: str, pool: Hashable, measured: Measured, now: float) -> None:
        """A worker reported; `pool` is another one if its role has changed."""
        worker = self._workers.get(worker_id)
        if worker is None:
            return
        self._workers.move_to_end(worker_id)
        worker.heard = now
        worker.release(Cause.UNHEARD)
        if worker.key != pool:
            self._move(worker, pool, now)
        before, worker.measured = worker.measured, measured
        worker.pool.steps.replace(before.steps, measured.steps)
        worker.pool.prompts.replace(before.prompts, measured.prompts)
        if measured != before:
            self._judge(worker, now)

    def failed(self, worker_id: str, now: float, *, silent: bool = False) -> None:
        """A frontend says that a worker failed an attempt; not that it only had no room.

        `silent`: it accepted, and then sent nothing.
        """
        worker = self._workers.get(worker_id)
        if worker is None or now - worker.failed < BURST_SECONDS:
            return
        worker.failed = now
        count = worker.failures.add(SILENCE if silent else 1.0, now)
        if count >= FAILURES and worker.failing.until <= now and worker.may_be_held(now):
            until = worker.failing.start(now)
            worker.hold(Cause.FAILING, until, f"{count:.0f} failures of it were reported")

    def avoided(self, worker_id: str, now: float) -> str:
        """Why a worker is to be avoided, in words; empty: it is not."""
        worker = self._workers.get(worker_id)
        if worker is None or worker_id not in worker.pool.avoided:
            return ""
        last = max(worker.holds.values(), default=_Hold(now, ""))
        return last.words if last.until > now else ""

    def unheard(self, now: float) -> list[str]:
        """Workers that are avoided from now on because they did not report, until they do.

        To be asked now and then: nothing happens by itself when nothing is heard.
        """
        found = []
        for worker in self._workers.values():
            if now - worker.heard < self._stale_seconds:
                break
            if Cause.UNHEARD not in worker.holds and worker.may_be_held(now):
                words = f"it did not report for {self._stale_seconds:.3g} s"
                worker.hold(Cause.UNHEARD, float("inf"), words)
                found.append(worker.worker_id)
        return found

    def forget(self, worker_id: str) -> None:
        """A worker is gone. How often it registered stays known."""
        worker = self._workers.pop(worker_id, None)
        if worker is None:
            return
        self._leave(worker)
        name = self._names.get(worker.name)
        if name is not None:
            name.live = max(0, name.live - 1)

    def _judge(self, worker: _Worker, now: float) -> None:
        """Sees whether it has become slow, or better, by what it just reported."""
        slow = Cause.SLOW in worker.holds
        if slow and worker.slowness.until <= now:
            worker.release(Cause.SLOW)
            worker.strikes, worker.on_trial, slow = 0, TRIAL, False
        if worker.on_trial:
            worker.on_trial -= 1
            return
        times, what = max(
            (_times(worker.measured.steps, worker.pool.steps), "steps"),
            (_times(worker.measured.prompts, worker.pool.prompts), "prompts"),
        )
        turned = times < BETTER if slow else times > SLOW
        worker.strikes = worker.strikes + 1 if turned else 0
        if worker.strikes < STRIKES:
            return
        worker.strikes = 0
        if slow:
            worker.release(Cause.SLOW)
        elif worker.may_be_held(now):
            words = f"its {what} take {times:.1f} times as long as those of its peers"
            worker.hold(Cause.SLOW, worker.slowness.start(now), words)

    def _join(self, key: Hashable) -> _Pool:
        pool = self._pools.setdefault(key, _Pool())
        pool.members += 1
        return pool

    def _leave(self, worker: _Worker) -> None:
        pool = worker.pool
        pool.steps.replace(worker.measured.steps, 0.0)
        pool.prompts.replace(worker.measured.prompts, 0.0)
        pool.avoided.discard(worker.worker_id)
        pool.members -= 1
        while len(pool.avoided) > pool.most:
            # Those that would come back first.
            pool.avoided.discard(pool.avoided.first()[0])
        if not pool.members:
            del self._pools[worker.key]

    def _move(self, worker: _Worker, key: Hashable, now: float) -> None:
        """It does something else now: how it did what it did before says nothing."""
        self._leave(worker)
        worker.key, worker.pool, worker.measured = key, self._join(key), Measured()
        worker.strikes = 0
        worker.release(Cause.SLOW)
        holds, worker.holds = worker.holds, {}
        for cause, (until, words) in holds.items():
            if until > now and worker.may_be_held(now):
                worker.hold(cause, until, words)


def _times(figure: float, peers: Median) -> float:
    median = peers.value()
    return figure / median if median else 0.0


def _name(info: WorkerInfo) -> tuple[str, str]:
    """What stays the same when a worker starts anew: its name, and the host of its address."""
    name = info.worker_id.rpartition("-")[0] or info.worker_id
    return name, info.address.rpartition(":")[0]
