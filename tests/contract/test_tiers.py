"""What every tier owes, on both that there are: host memory and a folder on disk."""

import random
import threading
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvtransfer.tiers.base import Label, Shape
from kvtransfer.tiers.disk import disk_tier
from kvtransfer.tiers.host import host_tier
from kvtransfer.tiers.policy import LeastRecentlyUsed

SHAPE = Shape("layout", (1000, 1000, 500))
KEYS = [bytes([i]) * 16 for i in range(40)]


def data_of(key: bytes) -> np.ndarray:
    seed = int.from_bytes(key, "little")
    return np.random.default_rng(seed).integers(0, 256, SHAPE.block_bytes, np.uint8)


DATA = {key: data_of(key) for key in KEYS}
LABELS = {
    key: Label(key, f"tenant-{key[0] % 3}", SHAPE.checksums(data)) for key, data in DATA.items()
}


class FirstIn:
    """Another policy: whoever came first goes first, used or not."""

    def __init__(self):
        self.order = OrderedDict()

    def added(self, key):
        self.order[key] = None

    def used(self, key):
        pass

    def removed(self, key):
        del self.order[key]

    def victim(self):
        return next(iter(self.order))

    def __len__(self):
        return len(self.order)


def bytes_for(kind: str, blocks: int) -> int:
    # A disk's place for a block is 4096 bytes, its record 512, and the file's header 4096.
    return blocks * 2500 + 99 if kind == "host" else 4096 + blocks * 4608 + 99


@pytest.fixture(params=["host", "disk"])
def kind(request):
    return request.param


@pytest.fixture
def new(kind, tmp_path):
    made = []

    def make(blocks=4, policy=None):
        size = bytes_for(kind, blocks)
        if kind == "host":
            tier = host_tier(SHAPE, size, policy)
        else:
            tier = disk_tier(SHAPE, tmp_path / str(len(made)), size, policy)
        made.append(tier)
        return tier

    yield make
    for tier in made:
        tier.check_integrity()
        tier.close()
        tier.close()


def put(tier, *keys):
    for key in keys:
        assert tier.put(LABELS[key], DATA[key])


def read(tier, key):
    into = np.full(SHAPE.block_bytes, 7, np.uint8)
    label = tier.read(key, into)
    if label is None:
        return None
    assert np.array_equal(into, DATA[key])
    return label


def test_what_is_put_is_read(new):
    tier = new()
    put(tier, *KEYS[:3])
    for key in KEYS[:3]:
        assert tier.find(key) == read(tier, key) == LABELS[key]
    assert set(tier.keys()) == set(KEYS[:3])
    assert read(tier, KEYS[3]) is None
    assert tier.find(KEYS[3]) is None


def test_the_bytes_are_the_tiers_own(new):
    tier = new()
    mine = DATA[KEYS[0]].copy()
    tier.put(LABELS[KEYS[0]], mine)
    mine[:] = 0
    assert read(tier, KEYS[0])


def test_match_counts_the_leading_ones(new):
    tier = new()
    put(tier, KEYS[0], KEYS[1], KEYS[3])
    assert tier.match(KEYS[:4]) == 2
    assert tier.match([]) == 0
    assert tier.match(KEYS[2:]) == 0


def test_capacity_is_kept_to(new, kind):
    tier = new(blocks=4)
    assert tier.places == 4
    for key in KEYS:
        put(tier, key)
        stats = tier.stats()
        assert stats.used_bytes <= stats.capacity_bytes <= bytes_for(kind, 4)
    assert stats.blocks == len(tier.keys()) == 4
    assert stats.evicted == len(KEYS) - 4


def test_no_room_for_one_block_is_an_error(kind, tmp_path):
    def make():
        return host_tier(SHAPE, 2499) if kind == "host" else disk_tier(SHAPE, tmp_path, 8703)

    with pytest.raises(ValueError, match="hold no block"):
        make()


def test_the_least_recently_used_goes_first(new):
    tier = new(blocks=3)
    put(tier, *KEYS[:3])
    read(tier, KEYS[0])
    put(tier, KEYS[1])  # again: that is a use, not a second copy
    put(tier, KEYS[3])
    assert set(tier.keys()) == {KEYS[0], KEYS[1], KEYS[3]}
    assert tier.find(KEYS[0])  # looking is no use
    put(tier, KEYS[4])
    assert set(tier.keys()) == {KEYS[1], KEYS[3], KEYS[4]}


def test_the_policy_can_be_another(new):
    tier = new(blocks=3, policy=FirstIn())
    put(tier, *KEYS[:3])
    read(tier, KEYS[0])
    put(tier, KEYS[3])
    assert set(tier.keys()) == {KEYS[1], KEYS[2], KEYS[3]}


def test_who_leaves_is_shown_first_and_then_told_of(new):
    tier, seen, left = new(blocks=2), [], []
    tier.on_left(left.extend)
    put(tier, *KEYS[:2])

    def evicting(label, data):
        assert tier.find(label.key) == label  # it can still be found here
        assert np.array_equal(data, DATA[label.key])
        seen.append(label)

    assert tier.put(LABELS[KEYS[2]], DATA[KEYS[2]], evicting)
    assert seen == [LABELS[KEYS[0]]]
    assert left == [KEYS[0]]
    assert tier.forget(KEYS[1])
    assert left == [KEYS[0], KEYS[1]]


def test_forgetting(new):
    tier = new(blocks=2)
    put(tier, KEYS[0])
    assert tier.forget(KEYS[0])
    assert not tier.forget(KEYS[0])
    assert read(tier, KEYS[0]) is None
    put(tier, *KEYS[1:3])
    assert tier.stats().evicted == 0
    put(tier, KEYS[0])
    assert read(tier, KEYS[0])


@pytest.mark.parametrize("at", [0, 999, 1000, 2499])
def test_wrong_bytes_are_dropped_and_counted(new, at):
    tier, left = new(), []
    tier.on_left(left.extend)
    wrong = DATA[KEYS[0]].copy()
    wrong[at] ^= 1
    tier.put(LABELS[KEYS[0]], wrong)
    put(tier, KEYS[1])
    assert read(tier, KEYS[0]) is None
    assert tier.keys() == [KEYS[1]]
    assert left == [KEYS[0]]
    assert tier.stats().corrupt == 1
    assert read(tier, KEYS[1])
    put(tier, KEYS[0])
    assert read(tier, KEYS[0])


def test_a_corrupt_victim_is_not_passed_on(new):
    tier, seen = new(blocks=1), []
    tier.put(LABELS[KEYS[0]], DATA[KEYS[1]])
    assert tier.put(LABELS[KEYS[2]], DATA[KEYS[2]], lambda *victim: seen.append(victim))
    assert seen == []
    assert tier.keys() == [KEYS[2]]
    assert tier.stats().corrupt == 1


@pytest.mark.parametrize("call", ["write", "read", "erase"])
def test_a_medium_that_fails_turns_the_tier_off(new, caplog, call):
    tier, left = new(), []
    tier.on_left(left.extend)
    put(tier, *KEYS[:3])

    def fail(*args):
        raise OSError(28, "No space left on device")

    setattr(tier._medium, call, fail)
    if call == "write":
        assert not tier.put(LABELS[KEYS[3]], DATA[KEYS[3]])
    elif call == "read":
        assert read(tier, KEYS[0]) is None
    else:
        tier.forget(KEYS[0])
    assert sorted(left) == KEYS[:3]
    assert tier.keys() == []
    assert not tier.put(LABELS[KEYS[4]], DATA[KEYS[4]])
    assert read(tier, KEYS[1]) is None
    assert not tier.forget(KEYS[1])
    stats = tier.stats()
    assert (stats.errors, stats.off, stats.blocks) == (1, "No space left on device", 0)
    assert [r.levelname for r in caplog.records] == ["ERROR"]


def test_counts(new):
    tier = new(blocks=2)
    put(tier, *KEYS[:3])
    read(tier, KEYS[2])
    read(tier, KEYS[0])
    stats = tier.stats()
    assert (stats.stored, stats.hits, stats.misses, stats.evicted) == (3, 1, 1, 1)


def test_threads(new):
    """One writes, others read and forget: what is read is right, and nothing is called corrupt."""
    tier, stop, wrong = new(blocks=6), threading.Event(), []

    def reader(seed):
        chance, into = random.Random(seed), np.empty(SHAPE.block_bytes, np.uint8)
        while not stop.is_set():
            key = chance.choice(KEYS[:12])
            if tier.read(key, into) is not None and not np.array_equal(into, DATA[key]):
                wrong.append(key)
            if chance.random() < 0.02:
                tier.forget(key)

    threads = [threading.Thread(target=reader, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    chance = random.Random(9)
    for _ in range(2000):
        put(tier, chance.choice(KEYS[:12]))
    stop.set()
    for thread in threads:
        thread.join(30)
    assert not wrong
    stats = tier.stats()
    assert (stats.corrupt, stats.errors) == (0, 0)


class Machine(RuleBasedStateMachine):
    """Against a model: what is held, and in which order it would go."""

    kind = "host"

    @initialize(blocks=st.integers(1, 5))
    def begin(self, blocks):
        import tempfile
        from pathlib import Path

        self.folder = tempfile.TemporaryDirectory()
        self.blocks = blocks
        self.model = OrderedDict()
        self.known = set()
        size = bytes_for(self.kind, blocks)
        self.open = lambda: (
            host_tier(SHAPE, size, LeastRecentlyUsed())
            if self.kind == "host"
            else disk_tier(SHAPE, Path(self.folder.name), size)
        )
        self.tier = self.open()
        self.tier.on_left(self.left)

    def left(self, keys):
        assert self.known.issuperset(keys)
        self.known.difference_update(keys)

    @rule(key=st.sampled_from(KEYS[:8]))
    def put(self, key):
        self.known.add(key)
        put(self.tier, key)
        self.model[key] = None
        self.model.move_to_end(key)
        while len(self.model) > self.blocks:
            self.model.popitem(last=False)

    @rule(key=st.sampled_from(KEYS[:8]))
    def read(self, key):
        assert (read(self.tier, key) is not None) == (key in self.model)
        if key in self.model:
            self.model.move_to_end(key)

    @rule(key=st.sampled_from(KEYS[:8]))
    def forget(self, key):
        assert self.tier.forget(key) == (key in self.model)
        self.model.pop(key, None)

    @rule(key=st.sampled_from(KEYS[:8]))
    def corrupt(self, key):
        """Put with other bytes than its label says, if it is new; then nobody gets it."""
        if key in self.model:
            return
        self.known.add(key)
        self.tier.put(LABELS[key], DATA[KEYS[20]])
        if len(self.model) == self.blocks:
            self.model.popitem(last=False)
        assert read(self.tier, key) is None

    @invariant()
    def same(self):
        assert set(self.tier.keys()) == set(self.model) == self.known
        self.tier.check_integrity()

    def teardown(self):
        self.tier.close()
        self.folder.cleanup()


class DiskMachine(Machine):
    kind = "disk"

    @rule()
    def start_again(self):
        self.tier.close()
        self.tier = self.open()
        self.tier.on_left(self.left)
        # Uses are not written down: what was put last counts as used last.
        order = self.tier._policy._order
        assert set(order) == set(self.model)
        self.model = OrderedDict.fromkeys(order)


for machine in (Machine, DiskMachine):
    machine.TestCase.settings = settings(
        max_examples=40, stateful_step_count=30, deadline=None, derandomize=True
    )
TestHostModel = Machine.TestCase
TestDiskModel = DiskMachine.TestCase
