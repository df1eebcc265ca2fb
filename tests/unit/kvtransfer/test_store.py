import threading

import numpy as np
import pytest
import xxhash
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtransfer.errors import BlocksNotHeldError, LeaseLostError, OutOfBlocksError
from kvtransfer.layout import gqa_layout
from kvtransfer.leases import LeaseState
from kvtransfer.store import KvStore

LAYOUT = gqa_layout("m", layers=5, kv_heads=1, head_dim=16, dtype="bfloat16", block_tokens=4)
KEYS = [bytes([i]) * 16 for i in range(12)]


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(clock):
    return KvStore(LAYOUT, 6, layers_per_piece=2, clock=clock)


def filled(store: KvStore, keys: list[bytes]) -> list[int]:
    blocks = store.allocate(len(keys))
    for block, key in zip(blocks, keys, strict=True):
        store.memory[block] = key[0]
        store.seal(block, key)
    return blocks


class Fetch:
    """A watch and how often it was woken."""

    def __init__(self, store: KvStore, lease: str, keys: list[bytes], adopt: float = 1.0):
        self.store, self.woken = store, 0
        self.watch = store.watch(lease, keys, self.wake, adopt)

    def wake(self):
        self.woken += 1

    def take(self):
        return self.store.take(self.watch, 100)


def test_pieces_are_announced_as_they_become_final(store):
    store.open_lease("a", 1)
    (block,) = store.allocate(1)
    store.lease_add("a", [block], KEYS[:1])
    fetch = Fetch(store, "a", KEYS[:1])
    assert fetch.take() == []
    store.begin(block, KEYS[0])
    store.memory[block] = np.arange(store.block_bytes, dtype=np.uint32).astype(np.uint8)
    store.piece_done(block, 0, 2)
    assert fetch.woken == 1
    (piece,) = fetch.take()
    size = 2 * LAYOUT.layer_bytes
    assert (piece.first_layer, piece.layers, piece.length) == (0, 2, size)
    assert piece.offset == block * LAYOUT.block_bytes
    data = store.segment.data[piece.offset : piece.offset + size]
    assert piece.checksum == xxhash.xxh3_64_intdigest(data.tobytes())
    store.piece_done(block, 2, 3)
    pieces = fetch.take()
    assert [(p.first_layer, p.layers) for p in pieces] == [(2, 2), (4, 1)]
    assert fetch.watch.remaining == 0


def test_wakes_once_until_taken_from(store):
    store.open_lease("a", 1)
    blocks = store.allocate(3)
    store.lease_add("a", blocks, KEYS[:3])
    fetch = Fetch(store, "a", KEYS[:3])
    assert fetch.take() == []
    for block, key in zip(blocks, KEYS, strict=False):
        store.begin(block, key)
        store.piece_done(block, 0, 5)
    assert fetch.woken == 1
    assert len(store.take(fetch.watch, 4)) == 4
    assert len(store.take(fetch.watch, 100)) == 5


def test_pieces_come_in_the_order_of_the_blocks(store):
    filled(store, KEYS[:6])
    pieces = Fetch(store, "a", KEYS[:6]).take()
    assert [p.key_index for p in pieces] == sorted(p.key_index for p in pieces)
    assert len(pieces) == 6 * store.grid.count


def test_a_fetch_may_come_before_its_lease(store):
    fetch = Fetch(store, "a", KEYS[:2])
    assert fetch.take() == []
    assert store.lease_state("a") is LeaseState.UNKNOWN
    store.open_lease("a", 1)
    blocks = filled(store, KEYS[:2])
    store.lease_add("a", blocks, KEYS[:2])
    assert fetch.woken == 1
    assert {p.key_index for p in fetch.take()} == {0, 1}


def test_cached_blocks_get_a_lease_of_their_own(store, clock):
    store.release(filled(store, KEYS[:3]))
    fetch = Fetch(store, "a", KEYS[:3], adopt=5.0)
    assert len(fetch.take()) == 9
    assert store.stats().held == 3
    clock.now = 4.9
    assert store.expire() == []
    clock.now = 5.0
    assert store.expire() == ["a"]
    assert store.stats().held == 0
    assert store.stats().expired == 1


def test_one_block_wanting_and_no_lease_means_waiting(store):
    store.release(filled(store, KEYS[:2]))
    fetch = Fetch(store, "a", KEYS[:3])
    assert fetch.take() == []
    assert store.stats().held == 0
    store.check_integrity()


def test_producer_takes_over_a_lease_that_a_fetch_made(store, clock):
    store.release(filled(store, KEYS[:1]))
    fetch = Fetch(store, "a", KEYS[:1])
    assert store.open_lease("a", 2.0)
    clock.now = 100.0
    assert store.expire() == []
    (block,) = store.match(KEYS[:1])
    store.lease_add("a", [block], KEYS[:1])
    store.lease_complete("a")
    assert len(fetch.take()) == 3
    assert store.release_lease("a")
    store.release([block])
    assert store.stats().held == 0


@pytest.mark.parametrize("why", ["released", "cancelled"])
def test_fetch_of_an_ended_lease_is_told_why(store, why):
    store.open_lease("a", 1)
    waiting = Fetch(store, "a", KEYS[:1])
    assert waiting.take() == []
    store.release_lease("a", why)
    late = Fetch(store, "a", KEYS[:1])
    for fetch in (waiting, late):
        with pytest.raises(LeaseLostError) as raised:
            fetch.take()
        assert raised.value.metadata == {"lease_id": "a", "why": why}
    assert waiting.woken == 1


def test_a_complete_lease_without_the_block_says_so(store):
    store.open_lease("a", 1)
    blocks = filled(store, KEYS[:1])
    store.lease_add("a", blocks, KEYS[:1])
    early = Fetch(store, "a", KEYS[:2])
    assert len(early.take()) == 3
    assert early.take() == []
    store.lease_complete("a")
    assert early.woken == 1
    for fetch in (early, Fetch(store, "a", KEYS[:2])):
        with pytest.raises(BlocksNotHeldError):
            fetch.take()


def test_a_lease_keeps_its_blocks_from_being_reused(store):
    store.open_lease("a", 1)
    blocks = filled(store, KEYS[:4])
    store.lease_add("a", blocks, KEYS[:4])
    store.lease_complete("a")
    store.release(blocks)
    with pytest.raises(OutOfBlocksError):
        store.allocate(3)
    assert store.release_lease("a")
    assert not store.release_lease("a")
    assert len(store.allocate(6)) == 6


def test_late_additions_to_an_ended_lease_hold_nothing(store):
    store.open_lease("a", 1)
    store.release_lease("a")
    blocks = filled(store, KEYS[:2])
    store.lease_add("a", blocks, KEYS[:2])
    store.lease_complete("a")
    store.release(blocks)
    assert store.stats().held == 0


def test_lease_is_not_complete_before_its_blocks_are(store):
    store.open_lease("a", 1)
    (block,) = store.allocate(1)
    store.lease_add("a", [block], KEYS[:1])
    store.begin(block, KEYS[0])
    store.piece_done(block, 0, 4)
    with pytest.raises(ValueError, match="not complete"):
        store.lease_complete("a")


def test_half_written_blocks_can_not_be_committed(store):
    (block,) = store.allocate(1)
    store.begin(block, KEYS[0])
    store.piece_done(block, 0, 4)
    with pytest.raises(ValueError, match="not complete"):
        store.commit(block)
    store.release([block])
    (again,) = store.allocate(1)
    assert again == block
    store.begin(block, KEYS[0])
    store.piece_done(block, 4, 1)
    with pytest.raises(ValueError, match="not complete"):
        store.commit(block)


@pytest.mark.parametrize("span", [(0, 1), (1, 2), (2, 1), (4, 2), (0, 6), (0, 0), (-2, 2)])
def test_pieces_are_whole(store, span):
    (block,) = store.allocate(1)
    store.begin(block, KEYS[0])
    with pytest.raises(ValueError, match="not whole pieces"):
        store.piece_done(block, *span)


def test_piece_of_a_block_not_begun(store):
    (block,) = store.allocate(1)
    with pytest.raises(ValueError, match="not begun"):
        store.piece_done(block, 0, 2)


def test_generation_grows_with_reuse(store):
    store.release(filled(store, KEYS[:1]))
    first = Fetch(store, "a", KEYS[:1]).take()[0]
    store.release_lease("a")
    store.release(store.allocate(6))
    store.release(filled(store, KEYS[:6]))
    again = Fetch(store, "b", KEYS[:6]).take()
    same_place = next(p for p in again if p.offset == first.offset)
    assert same_place.generation > first.generation


def test_events_are_net_changes_after_a_snapshot(store):
    store.release(filled(store, KEYS[:2]))
    first = store.events()
    assert first.snapshot
    assert set(first.stored) == set(KEYS[:2])
    store.release(filled(store, KEYS[2:4]))
    assert store.events().stored == tuple(KEYS[2:4])
    store.release(store.allocate(6))
    assert set(store.events().removed) == set(KEYS[:4])
    store.release(filled(store, KEYS[:1]))
    store.release(store.allocate(6))
    quiet = store.events()
    assert not quiet.stored
    assert not quiet.removed
    assert not quiet.snapshot


def test_a_consumer_that_falls_far_behind_costs_no_more_than_the_pool(store):
    store.release(filled(store, KEYS[:6]))
    store.events()
    for round_ in range(100):
        keys = [round_.to_bytes(15, "big") + bytes([i]) for i in range(6)]
        store.release(filled(store, keys))
    late = store.events()
    assert set(late.stored) == set(keys)
    assert set(late.removed) == set(KEYS[:6])


def test_on_change_tells_of_stored_freed_and_ended(store):
    calls = []
    stop = store.on_change(lambda: calls.append(1))
    blocks = filled(store, KEYS[:1])
    assert len(calls) == 1
    store.release(blocks)
    assert len(calls) == 2
    store.open_lease("a", 1)
    store.release_lease("a")
    assert len(calls) == 3
    stop()
    store.release(store.allocate(6))
    assert len(calls) == 3


def test_unwatch_forgets_the_fetch(store):
    store.open_lease("a", 1)
    (block,) = store.allocate(1)
    store.lease_add("a", [block], KEYS[:1])
    fetches = [Fetch(store, "a", KEYS[:1]) for _ in range(2)]
    for fetch in fetches:
        fetch.take()
    store.unwatch(fetches[0].watch)
    store.unwatch(fetches[0].watch)
    store.begin(block, KEYS[0])
    store.piece_done(block, 0, 5)
    assert [f.woken for f in fetches] == [0, 1]
    assert store.stats().watches == 1


def test_threads(store):
    """An engine's thread and fetching threads at once: every piece arrives, once."""
    store.open_lease("a", 1)
    blocks = store.allocate(6)
    store.lease_add("a", blocks, KEYS[:6])
    seen: list[list[tuple[int, int]]] = [[], []]

    def fetch(index: int) -> None:
        news = threading.Event()
        watch = store.watch("a", KEYS[:6], news.set, 1.0)
        while watch.remaining:
            news.clear()
            pieces = store.take(watch, 2)
            seen[index] += [(p.key_index, p.first_layer) for p in pieces]
            if not pieces:
                assert news.wait(10)
        store.unwatch(watch)

    threads = [threading.Thread(target=fetch, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for block, key in zip(blocks, KEYS, strict=False):
        store.begin(block, key)
        for first, layers in ((0, 2), (2, 2), (4, 1)):
            store.piece_done(block, first, layers)
    for thread in threads:
        thread.join(10)
    expected = [(k, first) for k in range(6) for first in (0, 2, 4)]
    assert sorted(seen[0]) == sorted(seen[1]) == expected


class StoreMachine(RuleBasedStateMachine):
    """Engine, sinks and time in any order: books balance, and what a fetch is told is true."""

    def __init__(self):
        super().__init__()
        self.clock = Clock()
        self.store = KvStore(LAYOUT, 5, layers_per_piece=2, clock=self.clock)
        self.mine: list[int] = []
        self.begun: dict[int, bytes] = {}
        self.fetches: list[Fetch] = []

    @rule(count=st.integers(1, 3))
    def allocate(self, count):
        try:
            self.mine += self.store.allocate(count)
        except OutOfBlocksError:
            assert self.store.available() < count

    @rule(count=st.integers(1, 4))
    def match(self, count):
        self.mine += self.store.match(KEYS[:count])

    @precondition(lambda self: self.mine)
    @rule(data=st.data())
    def give_back(self, data):
        block = data.draw(st.sampled_from(self.mine))
        self.mine.remove(block)
        self.store.release([block])

    @precondition(lambda self: self.mine)
    @rule(data=st.data(), key=st.sampled_from(KEYS[:4]), value=st.integers(0, 255))
    def write(self, data, key, value):
        block = data.draw(st.sampled_from(self.mine))
        before = self.store.memory[block].copy()
        try:
            self.store.begin(block, key)
        except ValueError:
            return
        if self.store._ready[block] == 0:
            self.store.memory[block] = value
            self.store.piece_done(block, 0, 5)
            self.store.commit(block)
        else:
            assert np.array_equal(self.store.memory[block], before)

    @rule(lease=st.sampled_from("ab"), seconds=st.integers(1, 3))
    def open(self, lease, seconds):
        self.store.open_lease(lease, seconds)

    @precondition(lambda self: self.mine)
    @rule(lease=st.sampled_from("ab"), data=st.data())
    def add(self, lease, data):
        block = data.draw(st.sampled_from(self.mine))
        key = self.store._pool.key(block)
        if key is not None:
            self.store.lease_add(lease, [block], [key])

    @rule(lease=st.sampled_from("ab"))
    def complete(self, lease):
        self.store.lease_complete(lease)

    @rule(lease=st.sampled_from("ab"))
    def end(self, lease):
        self.store.release_lease(lease)

    @rule(seconds=st.integers(1, 3))
    def pass_time(self, seconds):
        self.clock.now += seconds
        self.store.expire()

    @rule(lease=st.sampled_from("abc"), keys=st.sets(st.sampled_from(KEYS[:4]), min_size=1))
    def fetch(self, lease, keys):
        self.fetches.append(Fetch(self.store, lease, sorted(keys)))

    @precondition(lambda self: self.fetches)
    @rule(data=st.data())
    def take(self, data):
        fetch = data.draw(st.sampled_from(self.fetches))
        try:
            pieces = fetch.take()
        except (LeaseLostError, BlocksNotHeldError):
            self.store.unwatch(fetch.watch)
            self.fetches.remove(fetch)
            return
        for piece in pieces:
            data_ = self.store.segment.data[piece.offset : piece.offset + piece.length]
            assert xxhash.xxh3_64_intdigest(data_.tobytes()) == piece.checksum

    @invariant()
    def books_balance(self):
        self.store.check_integrity()

    def teardown(self):
        for fetch in self.fetches:
            self.store.unwatch(fetch.watch)
        for lease in "abc":
            self.store.release_lease(lease)
        self.store.release(self.mine)
        self.store.check_integrity()
        assert self.store.stats().held == 0
        assert self.store.stats().leases == 0
        assert self.store.stats().watches == 0


StoreMachine.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, derandomize=True
)
TestStoreMachine = StoreMachine.TestCase
