"""The prefix index against the obvious implementation: sets of keys for each worker, walked."""

from __future__ import annotations

import random
from itertools import takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.coordinator.core.index import PrefixIndex
from services.coordinator.core.table import ROW_PLACES

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


def keys_of(seed: int, count: int) -> list[bytes]:
    raw = random.Random(seed).randbytes(16 * count)
    return [raw[i : i + 16] for i in range(0, len(raw), 16)]


def leading(keys, held) -> int:
    return sum(1 for _ in takewhile(held.__contains__, keys))


chains = st.tuples(st.sampled_from(sorted(FORKS)), st.integers(0, LONGEST))
actions = ("store", "demote", "evict", "drop", "replace", "forget", "sweep")
steps = st.lists(
    st.tuples(st.sampled_from(actions), st.sampled_from(WORKERS), chains, chains), max_size=30
)


def descendants(keys: set[bytes], family: int, length: int) -> set[bytes]:
    """Of `keys`, those of any chain that goes through block `length` of a family."""
    cut = chain(family, LONGEST)[length:]
    if not cut:
        return set()
    return {
        key
        for family in FORKS
        if cut[0] in (whole := chain(family, LONGEST))
        for key in whole[whole.index(cut[0]) :]
        if key in keys
    }


class Truth:
    """What one worker holds: in its pool, and only in a tier."""

    def __init__(self) -> None:
        self.pool: set[bytes] = set()
        self.lower: set[bytes] = set()

    @property
    def all(self) -> set[bytes]:
        return self.pool | self.lower


def act(index: PrefixIndex, truth: dict[str, Truth], step) -> None:
    action, name, one, other = step
    mine = truth[name]
    if action == "store":
        index.store(name, chain(*one))
        mine.pool |= set(chain(*one))
        mine.lower -= mine.pool
    elif action == "demote":  # a prefix's last blocks leave the pool first
        gone = descendants(mine.pool, *one)
        index.lower(name, sorted(gone))
        mine.pool -= gone
        mine.lower |= gone
    elif action == "evict":  # and where no tier has them
        gone = descendants(mine.all, *one)
        index.remove(name, sorted(gone))
        mine.pool -= gone
        mine.lower -= gone
    elif action == "drop":  # a tier lets go of its last blocks
        gone = descendants(mine.lower, *one) - mine.pool
        if descendants(mine.all, *one) == gone:
            index.remove(name, sorted(gone))
            mine.lower -= gone
    elif action == "replace":
        stored, all_of_it = chain(*one), chain(one[0], max(one[1], other[1]))
        index.replace(name, stored, all_of_it[one[1] :])
        mine.pool, mine.lower = set(stored), set(all_of_it[one[1] :])
    elif action == "forget":
        index.forget(name)
        assert index.known_blocks(name) == 0
        index.add(name)
        truth[name] = Truth()
    else:
        index.sweep(1 + one[1])
    index.check_integrity()


@given(steps, st.lists(chains, min_size=1, max_size=3))
def test_equals_the_walk(steps, asked):
    index, truth = PrefixIndex(), {name: Truth() for name in WORKERS}
    for name in WORKERS:
        index.add(name)
    for step in steps:
        act(index, truth, step)
        for family, length in asked:
            compare(index, truth, chain(family, length))
    assert len(index) == len(set().union(*(t.all for t in truth.values())))
    while index.sweep(ROW_PLACES):
        pass
    index.check_integrity()
    for family, length in asked:
        compare(index, truth, chain(family, length))


def compare(index: PrefixIndex, truth: dict[str, Truth], keys: list[bytes]) -> None:
    found = {}
    last = len(keys)
    for count, some in index.reach(keys, sum(index.add(name) for name in truth)):
        assert count <= last, "deepest first"
        last = count
        for name in index.names(some):
            assert name not in found
            found[name] = count
    assert found == {name: leading(keys, mine.all) for name, mine in truth.items()}
    pooled = {name: index.in_pool(name, keys, count) for name, count in found.items()}
    assert pooled == {name: leading(keys, mine.pool) for name, mine in truth.items()}
    known = {name: index.known_blocks(name) for name in truth}
    assert known == {name: len(mine.all) for name, mine in truth.items()}


@pytest.mark.parametrize("seed", range(4))
def test_many_blocks_of_workers_that_come_and_go(seed):
    """Batches of all sizes, over many growths of the table, against sets."""
    draw = random.Random(seed)
    keys = keys_of(seed, 6000)
    index, truth = PrefixIndex(), {}
    for _ in range(120):
        name = f"worker-{draw.randrange(12)}"
        index.add(name)
        mine = truth.setdefault(name, Truth())
        start, count = draw.randrange(len(keys)), int(2000 ** draw.random())
        some = keys[start : start + count]
        action = draw.choice(("store", "store", "store", "lower", "remove", "replace", "forget"))
        if action == "store":
            index.store(name, some)
            mine.pool |= set(some)
            mine.lower -= mine.pool
        elif action == "lower":
            index.lower(name, some)
            mine.pool -= set(some)
            mine.lower |= set(some)
        elif action == "remove":
            index.remove(name, some)
            mine.pool -= set(some)
            mine.lower -= set(some)
        elif action == "replace":
            index.replace(name, some[: count // 2], some[count // 2 :])
            mine.pool, mine.lower = set(some[: count // 2]), set(some[count // 2 :])
        else:
            index.forget(name)
            del truth[name]
        index.sweep(draw.randrange(2000))
        assert len(index) == len(set().union(*(t.all for t in truth.values())))
    index.check_integrity()
    bits = {name: index.add(name) for name in truth}
    for key in keys:
        holders = {name for n, some in index.reach([key], sum(bits.values())) if n
                   for name in index.names(some)}  # fmt: skip
        assert holders == {name for name, mine in truth.items() if key in mine.all}
        for name in holders:
            assert index.in_pool(name, [key], 1) == (key in truth[name].pool)


def test_a_key_is_where_its_last_mention_says():
    index, (key,) = PrefixIndex(), chain(0, 1)
    index.add("a")
    for tell, held, pooled in (
        (index.lower, 1, 0),
        (index.store, 1, 1),
        (index.lower, 1, 0),
        (index.lower, 1, 0),
        (index.remove, 0, 0),
        (index.remove, 0, 0),
        (index.store, 1, 1),
        (index.store, 1, 1),
        (index.remove, 0, 0),
    ):
        tell("a", [key, key])
        assert index.known_blocks("a") == held
        if held:
            assert index.in_pool("a", [key], 1) == pooled
        index.check_integrity()
    index.replace("a", [key], [key])
    assert index.in_pool("a", [key], 1) == 1, "what is in both is in the pool"


def test_only_the_workers_asked_for():
    index = PrefixIndex()
    a, b = index.add("a"), index.add("b")
    index.lower("a", chain(0, 5))
    index.store("b", chain(0, 9))
    assert list(index.reach(chain(0, 9), a)) == [(5, a)]
    assert list(index.reach(chain(0, 9), a | b)) == [(9, b), (5, a)]
    assert list(index.reach(chain(0, 9), 0)) == []
    assert list(index.reach([], a | b)) == [(0, a | b)]


def count_lookups(index: PrefixIndex, monkeypatch) -> list[bytes]:
    looked_up, get = [], index._table.get
    monkeypatch.setattr(index._table, "get", lambda key: looked_up.append(key) or get(key))
    return looked_up


def test_lookups_are_logarithmic(monkeypatch):
    index = PrefixIndex()
    bit = index.add("a")
    keys = keys_of(1, 8192)
    index.store("a", keys[:5000])
    looked_up = count_lookups(index, monkeypatch)
    for asked, held, lookups in ((keys, 5000, 16), (keys[6000:], 0, 1), (keys[:5000], 5000, 3)):
        assert list(index.reach(asked, bit)) == [(held, bit)]
        assert len(looked_up) <= lookups
        # A decision asks again, of other workers.
        looked_up.clear()
        assert list(index.reach(asked, bit)) == [(held, bit)]
        assert not looked_up
    assert index.in_pool("a", keys, 5000) == 5000
    assert not looked_up, "a worker without tiers costs nothing"


def test_a_worker_that_lost_the_start_of_a_prefix_is_not_taken_to_hold_it():
    """Its pool breaks the chain rule, and what is left can not be used."""
    index = PrefixIndex()
    bit = index.add("a")
    keys = keys_of(3, 300)
    for start in (0, 1):
        for end in (start + 1, 100):
            index.replace("a", keys)
            index.remove("a", keys[start:end])
            for asked in (keys, keys[:200]):
                assert list(index.reach(asked, bit)) == [(start, bit)]


def test_what_was_found_is_void_once_something_changes():
    index = PrefixIndex()
    bit = index.add("a")
    keys = chain(0, 9)
    for change, held in (
        (lambda: index.store("a", keys[:4]), 4),
        (lambda: index.remove("a", keys[2:]), 2),
        (lambda: index.lower("a", keys[:6]), 6),
        (lambda: index.replace("a", keys[:3]), 3),
        (lambda: index.forget("a"), 0),
    ):
        change()
        assert list(index.reach(keys, bit)) == [(held, bit)]


def test_a_change_in_the_midst_of_an_answer():
    index = PrefixIndex()
    a, b = index.add("a"), index.add("b")
    index.store("a", chain(0, 9))
    index.store("b", chain(0, 5))
    answer = index.reach(chain(0, 9), a | b)
    assert next(answer) == (9, a)
    index.forget("a")
    assert list(answer) == [(5, b)]


def test_a_bit_is_free_once_its_worker_is_gone():
    index = PrefixIndex()
    first = index.add("a")
    index.store("a", chain(0, 4))
    index.lower("a", chain(0, 2))
    index.forget("a")
    assert len(index) == 0
    assert index.add("b") == first
    assert list(index.reach(chain(0, 4), first)) == [(0, first)]
    index.store("b", chain(0, 3))
    assert list(index.reach(chain(0, 4), first)) == [(3, first)]
    assert index.in_pool("b", chain(0, 3), 3) == 3
    index.check_integrity()


def test_room_of_the_forgotten_is_used_again():
    index = PrefixIndex()
    keys = keys_of(2, 20_000)
    index.add("a")
    index.store("a", keys[:10_000])
    places = len(index._table)
    for start in range(10_000, 20_000, 500):
        index.forget("a")
        index.add("a")
        index.store("a", keys[start : start + 500])
    assert len(index._table) == places
    assert len(index) == 500
    swept = 0
    while index.sweep(places // 16):
        swept += 1
    assert swept <= 16
    assert not index.sweep(places)
    index.check_integrity()


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


def test_equal_sets_of_holders_have_one_number():
    index = PrefixIndex()
    for name in WORKERS:
        index.add(name)
        index.store(name, chain(0, LONGEST))
    assert len(set(index._table.numbers.tolist()) - {0}) == 1
    draw = random.Random(7)
    for _ in range(300):
        name = draw.choice(WORKERS)
        index.replace(name, chain(draw.choice(sorted(FORKS)), draw.randint(0, LONGEST)))
        index.check_integrity()
    # Numbers that no block has are used again: there are not more than blocks.
    assert len(index._sets._sets) <= 1 + len(FORKS) * LONGEST
