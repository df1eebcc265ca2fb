"""The prefix index against the obvious implementation: a set of keys for each worker, walked."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.coordinator.core import index as index_module
from services.coordinator.core.index import PrefixIndex

# Chains share prefixes as prompts do: a chain is (family, length), and key i of family f is (f, i),
# where families 1 and 2 part from 0 after some blocks.
FORKS = {0: 0, 1: 3, 2: 7, 3: 0}
LONGEST = 24
WORKERS = ("a", "b", "c", "d")


def chain(family: int, length: int) -> list[bytes]:
    parent = 0 if family in (1, 2) else family
    return [
        bytes([parent if i < FORKS[family] else family, i]).rjust(16, b"\0") for i in range(length)
    ]


chains = st.tuples(st.sampled_from(sorted(FORKS)), st.integers(0, LONGEST))
workers = st.sampled_from(WORKERS)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("store"), workers, chains),
        st.tuples(st.just("shorten"), workers, chains),
        st.tuples(st.just("replace"), workers, chains),
        st.tuples(st.just("forget"), workers, chains),
    ),
    max_size=30,
)


def descendants(keys: set[bytes], cut: list[bytes]) -> set[bytes]:
    """Of `keys`, those of any chain that goes through the first key of `cut`."""
    if not cut:
        return set()
    return {
        key
        for family in FORKS
        if cut[0] in (whole := chain(family, LONGEST))
        for key in whole[whole.index(cut[0]) :]
        if key in keys
    }


@given(steps, chains)
def test_equals_the_walk(steps, asked):
    index, truth = PrefixIndex(), {name: set() for name in WORKERS}
    bits = {name: index.add(name) for name in WORKERS}
    for action, name, (family, length) in steps:
        keys = chain(family, length)
        if action == "store":
            index.store(name, keys)
            truth[name] |= set(keys)
        elif action == "shorten":  # evict from the end, as pools do
            gone = descendants(truth[name], chain(family, LONGEST)[length:])
            index.remove(name, sorted(gone))
            truth[name] -= gone
        elif action == "replace":
            index.replace(name, keys)
            truth[name] = set(keys)
        else:
            index.forget(name)
            bits[name] = index.add(name)
            truth[name] = set()
        index.check_integrity()
    keys = chain(*asked)
    found = {}
    last = len(keys)
    for count, some in index.reach(keys, sum(bits.values())):
        assert count <= last, "deepest first"
        last = count
        for name in index.names(some):
            assert name not in found
            found[name] = count
    walked = {
        name: next((i for i, k in enumerate(keys) if k not in truth[name]), len(keys))
        for name in WORKERS
    }
    assert found == walked
    assert len(index) == len(set().union(*truth.values()))
    assert {n: index.known_blocks(n) for n in WORKERS} == {n: len(truth[n]) for n in WORKERS}


def test_only_the_workers_asked_for():
    index = PrefixIndex()
    a, b = index.add("a"), index.add("b")
    index.store("a", chain(0, 5))
    index.store("b", chain(0, 9))
    assert list(index.reach(chain(0, 9), a)) == [(5, a)]
    assert list(index.reach(chain(0, 9), a | b)) == [(9, b), (5, a)]
    assert list(index.reach(chain(0, 9), 0)) == []
    assert list(index.reach([], a | b)) == [(0, a | b)]


def test_lookups_are_logarithmic():
    class Counting(dict):
        gets = 0

        def get(self, *args):
            self.gets += 1
            return super().get(*args)

    index = PrefixIndex()
    bit = index.add("a")
    keys = [i.to_bytes(16, "big") for i in range(8192)]
    index.store("a", keys[:5000])
    index._holders = Counting(index._holders)
    assert list(index.reach(keys, bit)) == [(5000, bit)]
    assert index._holders.gets <= 14
    index._holders.gets = 0
    assert list(index.reach(keys[6000:], bit)) == [(0, bit)]
    assert index._holders.gets == 1, "a miss is seen at the first key"


def test_a_bit_is_used_again_after_its_worker_is_gone():
    index = PrefixIndex()
    first = index.add("a")
    index.store("a", chain(0, 4))
    index.forget("a")
    assert len(index) == 0
    assert index.add("b") == first
    assert list(index.reach(chain(0, 4), first)) == [(0, first)]


def test_adding_twice_keeps_what_is_known_and_forgetting_a_stranger_is_nothing():
    index = PrefixIndex()
    bit = index.add("a")
    index.store("a", chain(0, 4))
    assert index.add("a") == bit
    assert index.known_blocks("a") == 4
    index.forget("nobody")
    index.check_integrity()


def test_telling_of_an_unknown_worker_is_an_error():
    with pytest.raises(KeyError):
        PrefixIndex().store("a", chain(0, 1))


def test_equal_sets_of_holders_are_one_object(monkeypatch):
    index = PrefixIndex()
    for name in WORKERS:
        index.add(name)
        index.store(name, chain(0, LONGEST))
    assert len({id(s) for s in index._holders.values()}) == 1
    monkeypatch.setattr(index_module, "_SHARED_SETS", 2)
    draw = random.Random(7)
    for _ in range(200):
        name = draw.choice(WORKERS)
        index.replace(name, chain(draw.choice(sorted(FORKS)), draw.randint(0, LONGEST)))
        index.check_integrity()
        assert len(index._shared) <= 2
