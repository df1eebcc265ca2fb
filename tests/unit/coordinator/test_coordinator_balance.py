"""When pools have workers change roles: by example, and in a fluid model of a pool under load."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.coordinator.core.balance import EASY, PRESSED, Balance, Queued
from services.coordinator.core.feed import KvFeed
from services.coordinator.core.load import Load
from services.coordinator.core.membership import Signal, Worker
from services.coordinator.core.messages import Role, WorkerInfo, WorkerStats
from services.coordinator.core.pools import Pool

P, D, B = Role.PREFILL, Role.DECODE, Role.BOTH
ANY = (P, D, B)
RATE = 1000.0
BATCH = 8
LIMIT = 10  # places: the batch and a quarter more
BLOCKS = 1000
SECONDS = 10.0


class Rig:
    """A pool of workers w0, w1..., and a Balance that is looked at once a second."""

    def __init__(self, *roles: Role, can_be=ANY) -> None:
        self.pool = Pool("m", "l")
        self.balance = Balance(SECONDS)
        self.now = 0.0
        self.queued = Queued()
        self.workers = [self._worker(i, role, can_be) for i, role in enumerate(roles)]

    def _worker(self, number: int, role: Role, can_be) -> Worker:
        info = WorkerInfo(
            f"w{number}", role, f"h:{number}", "m", "l", 16, BLOCKS, BATCH, 10_000, can_be=can_be
        )
        worker = Worker(
            info, number, Load(info, WorkerStats(free_blocks=BLOCKS)), KvFeed(1.0, 0.0),
            1 << number, 0.0, 1e9,
        )  # fmt: skip
        worker.signal(Signal.HELLO)
        self.pool.put(worker)
        return worker

    def report(self, number: int, *, requests=0, used=0, queued=0) -> None:
        stats = WorkerStats(
            running=requests,
            free_blocks=BLOCKS - used,
            queued_tokens=queued,
            prefill_tokens_per_second=RATE,
        )
        self.workers[number].load.report(stats, self.now)
        self.pool.put(self.workers[number])

    def look(self, *, decides=True):
        self.now += 1.0
        return self.balance.review(
            [self.pool], lambda model: self.queued, self.now, decides=decides
        )

    def watch(self, seconds: int, **more):
        """Everything asked in that time."""
        return [ask for _ in range(seconds) for ask in self.look(**more)]

    def become(self, number: int, role: Role) -> None:
        worker = self.workers[number]
        worker.info = replace(worker.info, role=role)
        self.pool.put(worker)
        self.balance.role_changed(worker, self.now)

    def on(self, role: Role) -> int:
        return len(self.pool.side(role).up)


def asked(asks) -> list[tuple[int, Role]]:
    return [(ask.stream, ask.role) for ask in asks]


def test_a_prefill_queue_that_lasts_makes_the_idlest_decode_worker_change():
    rig = Rig(P, D, D, D)
    rig.report(0, requests=20, queued=20_000)
    for number, requests, used in ((1, 9, 10), (2, 8, 30), (3, 8, 20)):
        rig.report(number, requests=requests, used=used)
    assert rig.watch(10) == []
    (ask,) = rig.watch(1)
    assert (ask.stream, ask.role) == (3, P)
    # One worker's time, and a queue of 20 s, to be cleared in 10. Of the 25 requests at decode
    # workers 20 wait for their prompts.
    assert ask.why == (
        "needed: prefill 300%, decode 17%; after the change: prefill 150%, decode 25%"
    )


def test_a_full_batch_makes_a_prefill_worker_change():
    rig = Rig(P, P, D)
    rig.report(2, requests=LIMIT)
    rig.queued = Queued(3, 600)
    assert asked(rig.watch(11)) == [(0, D)]


def test_a_full_kv_pool_does_too():
    rig = Rig(P, P, D)
    rig.report(2, requests=2, used=950)
    assert asked(rig.watch(11)) == [(0, D)]


def test_what_waits_for_its_prompt_at_a_decode_worker_is_no_reason_for_another():
    rig = Rig(P, D, D)
    rig.report(0, requests=19, queued=9_000)
    rig.report(1, requests=LIMIT, used=500)
    rig.report(2, requests=LIMIT, used=500)
    rig.queued = Queued(50, 50_000)
    assert asked(rig.watch(11)) == [(1, P)]


@pytest.mark.parametrize("seconds", [5, 9])
def test_a_burst_moves_nobody(seconds):
    rig = Rig(P, D, D)
    rig.report(0, requests=9, queued=9_000)
    assert rig.watch(seconds) == []
    rig.report(0)
    assert rig.watch(60) == []


def test_a_worker_that_would_be_missed_stays():
    rig = Rig(P, D, D)
    rig.report(0, requests=0, queued=20_000)
    for number in (1, 2):  # 8 of 20 places: with one worker less 80%
        rig.report(number, requests=4)
    assert rig.watch(60) == []


def test_the_last_of_a_side_comes_to_serve_both_and_goes_when_there_is_another():
    rig = Rig(P, D)
    rig.report(0, requests=3, queued=15_000)
    assert asked(rig.watch(11)) == [(1, B)]
    fixed = Rig(P, D, can_be=(P, D))
    fixed.report(0, requests=3, queued=15_000)
    assert fixed.watch(60) == []
    pair = Rig(P, B, D)
    pair.report(0, requests=3, queued=15_000)
    assert asked(pair.watch(11)) == [(1, P)]


def test_a_side_that_has_lost_all_its_workers_gets_one():
    rig = Rig(P, P)
    assert asked(rig.watch(11)) == [(0, D)]
    rig = Rig(D, D)
    assert rig.watch(60) == []  # prompts are short here
    rig.report(1, queued=3_000)
    assert asked(rig.watch(20)) == [(0, P)]


def test_fixed_roles_and_no_seconds_change_nothing():
    fixed = Rig(P, D, D, can_be=())
    fixed.report(0, queued=20_000)
    assert fixed.watch(60) == []
    off = Rig(P, D, D)
    off.balance = Balance(0.0)
    off.report(0, queued=20_000)
    assert off.watch(60) == []


def test_one_of_several_coordinators_decides_and_another_can_take_over():
    rig = Rig(P, D, D)
    rig.report(0, requests=9, queued=20_000)
    assert rig.watch(60, decides=False) == []
    assert len(rig.look()) == 1


def test_a_pool_rests_after_a_change_and_who_did_not_want_to_is_not_asked_again():
    rig = Rig(P, D, D, D)
    rig.report(0, requests=9, queued=90_000)
    asks = rig.watch(61)
    # Nobody changes: one is asked, and 30 s later the next.
    assert asked(asks) == [(1, P), (2, P)]
    rig = Rig(P, D, D, D)
    rig.report(0, requests=9, queued=90_000)
    assert asked(rig.watch(11)) == [(1, P)]
    rig.now += 5.0
    rig.become(1, P)
    assert rig.watch(29) == []
    assert asked(rig.watch(12)) == [(2, P)]


@dataclass
class Fluid:
    """Requests as a fluid: they come, wait for room, are prefilled and generated."""

    rig: Rig
    per_second: float
    prompt: float
    generating_seconds: float
    waiting: float = 0.0
    in_prefill: float = 0.0
    decoding: float = 0.0
    changes: list[tuple[float, Role]] = field(default_factory=list)

    def second(self) -> None:
        rig = self.rig
        prefill, decode = rig.pool.prefill.up, rig.pool.decode.up
        assert prefill
        assert decode
        share = {w.worker_id: 0.5 if w.info.role is B else 1.0 for w in rig.workers}
        places = sum(LIMIT * share[w] for w in decode)
        room = sum(LIMIT * share[w] for w in prefill)
        able = sum(RATE * share[w] for w in prefill) / self.prompt
        self.waiting += self.per_second
        placed = min(
            self.waiting,
            max(0.0, places - self.in_prefill - self.decoding),
            max(0.0, room + able - self.in_prefill),
        )
        self.waiting -= placed
        self.in_prefill += placed
        done = min(self.in_prefill, able)
        self.in_prefill -= done
        self.decoding += done - self.decoding / self.generating_seconds
        busy = done / able
        # A worker reports a queue as often as it is busy.
        turn = (rig.now * 0.618034) % 1.0
        for number, worker in enumerate(rig.workers):
            name = worker.worker_id
            requests = queued = 0.0
            if name in prefill:
                part = share[name] * LIMIT / room
                requests += self.in_prefill * part
                queued = self.in_prefill * self.prompt * part
                queued = max(queued, float(turn < busy))
            if name in decode:
                requests += (self.in_prefill + self.decoding) * share[name] * LIMIT / places
            rig.report(number, requests=round(requests), queued=round(queued))
        rig.queued = Queued(int(self.waiting), int(self.waiting * self.prompt))
        for ask in rig.look():
            self.changes.append((rig.now, ask.role))
            rig.become(ask.stream, ask.role)

    def needs(self, prefill: float, decode: float) -> tuple[float, float]:
        """Part of that many workers' prefill and decode that the load takes in the long run."""
        return (
            self.per_second * self.prompt / (RATE * prefill),
            self.per_second * self.generating_seconds / (LIMIT * decode),
        )


loads = st.builds(
    lambda roles, per_second, prompt, seconds: Fluid(Rig(*roles), per_second, prompt, seconds),
    st.integers(2, 6).flatmap(
        lambda n: st.integers(1, n - 1).map(lambda k: (P,) * k + (D,) * (n - k))
    ),
    st.floats(0.1, 8.0),
    st.floats(50, 4000),
    st.floats(2, 60),
)


@settings(max_examples=25, deadline=None)
@given(loads)
def test_under_constant_load_roles_settle_and_no_side_is_ever_empty(fluid):
    minutes = len(fluid.rig.workers) + 5
    for _ in range(60 * minutes):
        fluid.second()
    # As workers start empty, decode fills later than prefill: the way may turn, once.
    kinds = [P if role is not D else D for _, role in fluid.changes]
    turns = sum(a is not b for a, b in itertools.pairwise(kinds))
    assert turns <= 1, fluid.changes
    assert all(at < 60 * (minutes - 3) for at, _ in fluid.changes), fluid.changes


@settings(max_examples=25, deadline=None)
@given(loads)
def test_if_some_split_carries_the_load_it_is_come_to(fluid):
    count = len(fluid.rig.workers)
    splits = [fluid.needs(k, count - k) for k in range(1, count)]
    if not any(max(split) <= EASY - 0.1 for split in splits):
        return
    for _ in range(60 * (count + 5)):
        fluid.second()
    roles = [w.info.role for w in fluid.rig.workers]
    prefill = roles.count(P) + roles.count(B) / 2
    assert max(fluid.needs(prefill, count - prefill)) < 1.0, (fluid.changes, splits)
    assert fluid.waiting < 20 * fluid.per_second


def test_the_constants_leave_room_between_going_and_coming_back():
    assert EASY + 0.1 < PRESSED < 1.0
