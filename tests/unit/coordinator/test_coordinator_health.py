"""Who is avoided, for how long, and that there is always somebody who is not."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.coordinator.core.health import (
    BURST_SECONDS,
    FAILURES,
    FLAPS,
    NAMES_REMEMBERED,
    STRIKES,
    TRIAL,
    BackOff,
    Health,
)
from services.coordinator.core.messages import Role, WorkerInfo
from services.coordinator.core.predict import Measured

POOL = ("m", "l", Role.DECODE)
STALE = 1.5


def info(worker_id, host="h"):
    return WorkerInfo(worker_id, Role.DECODE, f"{host}:{len(worker_id)}", "m", "l", 16, 9, 9, 99)


class World:
    """Some workers that report twice a second."""

    def __init__(self, count):
        self.health, self.now = Health(STALE), 0.0
        self.names = [f"w{n}-0" for n in range(count)]
        self.noise = itertools.count(1)
        for name in self.names:
            self.health.registered(info(name), POOL, self.now)

    def reports(self, count, quiet=(), **slow):
        """Each reports that steps take 1 time what is usual, or as many times as it says."""
        for _ in range(count):
            self.now += 0.5
            for name in self.names:
                if name in quiet:
                    continue
                noise = 1 + 1e-3 * (next(self.noise) % 7 + 1)
                times = slow.get(name.split("-")[0], 1.0)
                self.health.heard(name, POOL, Measured(noise * times, noise), self.now)
            self.health.unheard(self.now)

    def avoided(self):
        words = {n: self.health.avoided(n, self.now) for n in self.names}
        return {n: w for n, w in words.items() if w}


def test_a_slow_worker_is_avoided_and_comes_back_when_it_is_better():
    world = World(6)
    world.reports(3, w1=5.0)
    assert not world.avoided(), "not at once"
    world.reports(STRIKES, w1=5.0)
    [(name, words)] = world.avoided().items()
    assert name == "w1-0"
    assert words.startswith("its steps take 5.0 times as long")
    world.reports(STRIKES, w1=2.5)
    assert world.avoided(), "better, but not well"
    world.reports(STRIKES, w1=1.5)
    assert not world.avoided()


def test_slow_prompts_count_as_well():
    world = World(3)
    for number in range(STRIKES):
        for name in world.names:
            times = 4.0 + number / 100 if name == "w2-0" else 1.0 + number / 100
            world.health.heard(name, POOL, Measured(0.0, times), number / 2)
    assert "prompts" in world.health.avoided("w2-0", 2.0)


def test_a_worker_that_gets_no_work_is_tried_again_and_each_time_later():
    world = World(3)
    lengths = []
    for _ in range(7):
        world.reports(TRIAL + STRIKES, w0=5.0)
        assert world.avoided()
        start = world.now
        frozen = Measured(5.0, 1.0)
        while world.health.avoided("w0-0", world.now):
            world.reports(1, quiet=("w0-0",))
            world.health.heard("w0-0", POOL, frozen, world.now)
        lengths.append(world.now - start)
    assert 0 < lengths[0] <= 10
    assert all(b >= a for a, b in itertools.pairwise(lengths))
    assert 250 < lengths[-1] <= 300


def test_on_trial_it_may_still_look_slow_for_a_while():
    world = World(3)
    world.reports(STRIKES + 1, w0=5.0)
    assert world.avoided()
    world.now += 20.0
    world.reports(TRIAL - 2, w0=4.0)
    assert not world.avoided(), "moving averages take their time"
    world.reports(10, w0=1.0)
    assert not world.avoided()


def test_if_all_become_slow_it_is_the_load():
    world = World(6)
    world.reports(20, **{f"w{n}": 5.0 for n in range(6)})
    assert not world.avoided()
    world.reports(20, w0=50.0, w1=50.0, w2=50.0, w3=50.0)
    assert len(world.avoided()) <= 2


@pytest.mark.parametrize(("count", "most"), [(1, 0), (2, 1), (3, 1), (5, 1), (6, 2), (30, 10)])
def test_at_most_a_third_of_a_pool_is_avoided(count, most):
    world = World(count)
    world.now = 10.0
    for name in world.names:
        for number in range(FAILURES + 1):
            world.health.failed(name, 10.0 + number * 2 * BURST_SECONDS)
    world.now = 10.0 + (FAILURES + 1) * 2 * BURST_SECONDS
    assert len(world.avoided()) == most


def test_when_a_pool_shrinks_some_come_back():
    world = World(9)
    world.reports(3)
    world.reports(3, quiet=("w0-0", "w1-0", "w2-0"))
    assert len(world.avoided()) == 3
    for name in world.names[5:]:
        world.health.forget(name)
    del world.names[5:]
    assert len(world.avoided()) == 1


def test_failures_avoid_a_worker_for_longer_each_time():
    world, lengths = World(4), []
    for _ in range(8):
        while not world.health.avoided("w0-0", world.now):
            world.now += 2 * BURST_SECONDS
            world.health.failed("w0-0", world.now)
        start = world.now
        while world.health.avoided("w0-0", world.now):
            world.now += 0.1
        lengths.append(world.now - start)
    assert lengths[0] == pytest.approx(2.0, abs=0.2)
    assert lengths[1] == pytest.approx(4.0, abs=0.2)
    assert lengths[-1] == pytest.approx(60.0, abs=0.2)


def test_failures_now_and_then_do_not_matter_and_a_blow_counts_once():
    world = World(4)
    for _ in range(100):
        world.now += 15.0
        for _ in range(1000):
            world.health.failed("w0-0", world.now)
        assert not world.avoided()


def test_silence_counts_twice():
    world = World(4)
    for _ in range(-(-FAILURES // 2)):
        world.now += 1.0
        assert not world.avoided()
        world.health.failed("w0-0", world.now, silent=True)
    assert "failures" in world.avoided()["w0-0"]


def test_a_flapping_worker_is_held_down_under_its_next_ids_too():
    world = World(3)
    for start in range(FLAPS + 2):
        world.now += 2.0
        world.health.registered(info(f"bad-{start}"), POOL, world.now)
        last = world.health.avoided(f"bad-{start}", world.now)
        world.health.forget(f"bad-{start}")
    assert last == f"bad on h registered more than {FLAPS} times lately"
    world.health.registered(info("bad-x"), POOL, world.now + 1)
    assert world.health.avoided("bad-x", world.now + 1)
    world.health.registered(info("bad-x", host="other"), POOL, world.now + 1)
    assert not world.health.avoided("bad-x", world.now + 1), "another one of that name"
    world.health.registered(info("bad-y"), POOL, world.now + 1000)
    assert not world.health.avoided("bad-y", world.now + 1000)


def test_a_restart_of_all_workers_is_no_flapping():
    health, now = Health(STALE), 0.0
    for start in range(3):
        now += 5.0
        for number in range(64):
            health.registered(info(f"decode-{number:02}{start}"), POOL, now)
            assert not health.avoided(f"decode-{number:02}{start}", now)
        for number in range(64):
            health.forget(f"decode-{number:02}{start}")


def test_a_worker_not_heard_of_is_avoided_until_it_is():
    world = World(6)
    world.reports(3)
    world.reports(1, quiet=("w2-0",))
    assert not world.avoided()
    world.reports(2, quiet=("w2-0",))
    assert world.avoided() == {"w2-0": f"it did not report for {STALE} s"}
    assert world.health.unheard(world.now) == [], "told once"
    world.reports(1)
    assert not world.avoided()


def test_if_this_process_slept_it_is_not_the_workers():
    world = World(9)
    world.reports(3)
    world.now += 60.0
    world.health.unheard(world.now)
    assert len(world.avoided()) <= 3
    world.reports(1)
    assert not world.avoided()


def test_a_worker_with_another_role_starts_anew():
    world = World(3)
    world.reports(STRIKES + 1, w0=5.0)
    assert world.avoided()
    other = ("m", "l", Role.PREFILL)
    world.health.heard("w0-0", other, Measured(1.0, 1.0), world.now)
    assert not world.health.avoided("w0-0", world.now)
    assert world.health._pools[POOL].members == 2


def test_names_are_remembered_for_a_bounded_number():
    health = Health(STALE)
    for number in range(NAMES_REMEMBERED + 100):
        health.registered(info(f"w{number}-0"), POOL, 1.0)
        health.forget(f"w{number}-0")
    assert len(health._names) == NAMES_REMEMBERED
    assert not health._workers
    assert not health._pools


@given(st.lists(st.floats(0, 400), max_size=30))
def test_a_back_off_keeps_its_bounds(gaps):
    back_off, now, last = BackOff(2.0, 60.0), 0.0, 0.0
    for gap in gaps:
        now = max(now, back_off.until) + gap
        until = back_off.start(now)
        length = until - now
        assert length in (pytest.approx(2.0), pytest.approx(min(60.0, 2 * last)))
        last = length


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["hello", "report", "report", "fail", "forget", "ask"]),
        st.integers(0, 8),
        st.sampled_from([0.0, 0.3, 1.0, 3.5, 9.0]),
        st.sampled_from([0.0, 0.1, 0.6, 20.0]),
        st.sampled_from("pq"),
    ),
    max_size=120,
)


@given(EVENTS)
def test_never_more_than_a_third_whatever_happens_and_nothing_is_kept(events):
    health, there, now = Health(STALE), {}, 0.0
    for what, number, times, passed, pool in events:
        now += passed
        name = f"w{number}-{number}"
        if what == "hello":
            health.registered(info(name), pool, now)
            there[name] = pool
        elif what == "report" and name in there:
            health.heard(name, pool, Measured(times, times), now)
            there[name] = pool
        elif what == "fail":
            health.failed(name, now, silent=times > 1)
        elif what == "forget":
            health.forget(name)
            there.pop(name, None)
        else:
            assert set(health.unheard(now)) <= set(there)
        for key in "pq":
            members = [n for n, p in there.items() if p == key]
            avoided = [n for n in members if health.avoided(n, now)]
            most = max(1, len(members) // 3) if len(members) > 1 else 0
            assert len(avoided) <= most
    for name in list(there):
        assert len(health._workers) == len(there)
        health.forget(name)
        del there[name]
    assert not health._pools
    assert all(n.live == 0 for n in health._names.values())
