"""A store with tiers: what goes there when, what comes back, what is announced meanwhile."""

import asyncio
import contextlib
import random
import threading

import grpc
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvtransfer.endpoint import KvEndpoint
from kvtransfer.errors import BlocksNotHeldError, OutOfBlocksError, WrongTenantError
from kvtransfer.layout import gqa_layout
from kvtransfer.news import StoreEvents
from kvtransfer.store import KvStore
from kvtransfer.tiers.build import open_tiers, shape_of
from kvtransfer.tiers.disk import disk_tier
from kvtransfer.tiers.host import host_tier
from kvtransfer.tiers.tiers import ANNOUNCED_SHARE, Tiers
from tandem.kvtransfer.v1 import kvtransfer_pb2_grpc

LAYOUT = gqa_layout("m", layers=5, kv_heads=1, head_dim=16, dtype="bfloat16", block_tokens=4)
KEYS = [bytes([i]) * 16 for i in range(24)]


def content(key: bytes) -> np.ndarray:
    return np.random.default_rng(key[0]).integers(0, 256, LAYOUT.block_bytes, np.uint8)


CONTENT = {key: content(key) for key in KEYS}


def store_of(blocks: int) -> KvStore:
    return KvStore(LAYOUT, blocks, layers_per_piece=2, scratch_bytes=4096)


def with_host(store: KvStore, places: int) -> Tiers:
    return open_tiers(store, "n", host_bytes=places * LAYOUT.block_bytes)


def with_both(store: KvStore, host: int, disk: int, folder) -> Tiers:
    shape = shape_of(store, "n")
    upper = host_tier(shape, host * LAYOUT.block_bytes)
    place = -(-LAYOUT.block_bytes // 4096) * 4096 + 512
    return Tiers(store, [upper, disk_tier(shape, folder, 4096 + disk * place)])


def fill(store: KvStore, keys, tenant="") -> list[int]:
    """Held blocks with the content of keys, committed."""
    blocks = store.allocate(len(keys))
    for block, key in zip(blocks, keys, strict=True):
        store.memory[block] = CONTENT[key]
        store.seal(block, key, tenant)
    return blocks


def cache(store: KvStore, keys, tenant="") -> None:
    store.release(fill(store, keys, tenant))


def spill(tiers: Tiers) -> int:
    count = 0
    while tiers.spill():
        count += 1
    return count


def in_tier(tiers: Tiers, level: int = 0) -> set[bytes]:
    return set(tiers._chain.tiers[level].keys())


async def bring_back(store: KvStore, tiers: Tiers, keys) -> int:
    """As an engine does: into held blocks. Checks what it got; frees the blocks."""
    blocks = store.allocate(len(keys))
    done = await tiers.fill(keys, blocks)
    for block, key in zip(blocks[:done], keys, strict=False):
        assert np.array_equal(store.memory[block], CONTENT[key])
    store.release(blocks)
    return done


@pytest.fixture
def store():
    return store_of(8)


# Out


def test_evicted_blocks_are_in_the_tier_and_come_back(store):
    tiers = with_host(store, 32)
    cache(store, KEYS[:6])
    assert spill(tiers) == 6
    store.release(store.allocate(8))
    assert store.match(KEYS[:6]) == []
    assert store.in_tiers(KEYS[:8]) == 6
    assert asyncio.run(bring_back(store, tiers, KEYS[:6])) == 6
    found = store.match(KEYS[:6])
    assert len(found) == 6
    store.release(found)
    # They are in the tier still: nothing is copied twice.
    assert spill(tiers) == 0
    stats = store.stats()
    assert (stats.evicted, stats.lost, stats.restored) == (6, 0, 6)
    assert [(t.name, t.stored, t.hits) for t in stats.tiers] == [("host", 6, 6)]
    store.check_integrity()
    tiers.close()


def test_what_is_evicted_before_it_was_copied_is_counted_as_lost(store):
    tiers = with_host(store, 32)
    cache(store, KEYS[:6])
    tiers.spill()
    store.release(store.allocate(8))
    assert spill(tiers) == 0
    assert store.stats().lost == 5
    # The one that was copied is the one that was coldest: the end of the sequence.
    assert in_tier(tiers) == {KEYS[5]}
    tiers.close()


def test_no_more_is_copied_ahead_than_a_quarter_of_the_tier(store):
    tiers = with_host(store, 12)
    cache(store, KEYS[:8])
    assert spill(tiers) == 3
    assert in_tier(tiers) == set(KEYS[5:8])
    # A free block needs no copy: as some are taken, others are due.
    store.release(store.allocate(2))
    assert spill(tiers) == 0
    held = store.allocate(2)
    assert spill(tiers) == 2
    store.release(held)
    assert spill(tiers) == 0
    tiers.close()


def test_held_blocks_are_copied_when_little_else_is_there(store):
    """In a pool full of running sequences a block is taken again as soon as it is let go."""
    tiers = with_host(store, 32)
    blocks = fill(store, KEYS[:8])
    assert spill(tiers) == 8
    store.release(blocks)
    cache(store, KEYS[8:16])
    assert store.stats().lost == 0
    tiers.close()


def test_a_block_that_changes_while_it_is_copied_is_not_kept(store, monkeypatch):
    tiers = with_host(store, 32)
    cache(store, KEYS[:8])
    real = np.copyto

    def slow(into, data):
        """In the middle of the copy the engine takes every block, and writes."""
        monkeypatch.setattr(np, "copyto", real)
        half = len(into) // 2
        into[:half] = data[:half]
        blocks = fill(store, KEYS[8:16])
        into[half:] = data[half:]
        store.release(blocks)

    monkeypatch.setattr(np, "copyto", slow)
    assert tiers.spill()
    assert in_tier(tiers) == set()
    assert spill(tiers) == 8
    assert in_tier(tiers) == set(KEYS[8:16])
    assert asyncio.run(bring_back(store, tiers, KEYS[8:16])) == 8
    assert store.stats().lost == 8
    tiers.close()


def test_a_block_written_over_by_mistake_is_found_out_on_the_way_back(store):
    tiers = with_host(store, 32)
    cache(store, KEYS[:3])
    (block,) = store.match(KEYS[1:2])
    store.memory[block][7] ^= 1
    store.release([block])
    spill(tiers)
    store.release(store.allocate(8))
    assert asyncio.run(bring_back(store, tiers, KEYS[:3])) == 1
    assert store.stats().tiers[0].corrupt == 1
    held = store.snapshot()
    assert KEYS[1] not in held.stored + held.lower
    store.check_integrity()
    tiers.close()


def test_the_tier_gets_what_it_dropped_once_it_is_used_again():
    store = store_of(4)
    tiers = with_host(store, 4)
    cache(store, KEYS[:4])
    spill(tiers)
    for key in KEYS[:4]:
        tiers._chain.tiers[0].forget(key)
    assert spill(tiers) <= 1, "what the pool has not touched since is not chased after"
    store.release(store.match(KEYS[:4]))
    assert spill(tiers) >= 1
    store.check_integrity()
    tiers.close()


def test_a_key_is_announced_as_long_as_the_pool_or_a_tier_has_it(store):
    tiers = with_host(store, 32)
    tier = tiers._chain.tiers[0]
    cache(store, KEYS[:4])
    assert set(store.events().stored) == set(KEYS[:4])
    spill(tiers)
    assert not store.events(), "a copy below changes nothing for who asks for blocks"
    store.release(store.allocate(8))
    events = store.events()
    assert set(events.lower) == set(KEYS[:4])
    assert not events.removed
    assert not events.stored
    assert asyncio.run(bring_back(store, tiers, KEYS[:4])) == 4
    assert set(store.events().stored) == set(KEYS[:4])
    tier.forget(KEYS[0])
    assert not store.events()
    store.release(store.allocate(8))
    assert store.events() == StoreEvents(removed=(KEYS[0],), lower=tuple(KEYS[3:0:-1]))
    tier.forget(KEYS[1])
    assert store.events() == StoreEvents(removed=(KEYS[1],))
    held = store.snapshot()
    assert (held.stored, set(held.lower)) == ((), {KEYS[2], KEYS[3]})
    # There and back between two questions is nothing to tell of.
    assert asyncio.run(bring_back(store, tiers, KEYS[2:3])) == 1
    store.release(store.allocate(8))
    assert not store.events()
    tiers.close()


def test_of_what_only_a_tier_has_the_latest_is_announced():
    """A disk has more keys than the coordinator wants to know."""
    store = store_of(2)
    tiers = with_host(store, 32)
    for key in KEYS[:12]:
        cache(store, [key])
        spill(tiers)
    most = ANNOUNCED_SHARE * 2
    held = store.snapshot()
    assert set(held.stored) == set(KEYS[10:12])
    assert set(held.lower) == set(KEYS[10 - most : 10])
    # Used again, one is the latest: in the pool, and when it has left that.
    assert asyncio.run(bring_back(store, tiers, KEYS[:1])) == 1
    assert store.events() == StoreEvents(stored=(KEYS[0],), removed=(KEYS[2],), lower=(KEYS[10],))
    for key in KEYS[12:14]:
        cache(store, [key])
        spill(tiers)
    events = store.events()
    assert set(events.stored) == set(KEYS[12:14])
    assert set(events.lower) == {KEYS[0], KEYS[11]}
    assert set(events.removed) == set(KEYS[3:5])
    # All are found nevertheless.
    assert store.in_tiers(KEYS[:14]) == 14
    store.check_integrity()
    tiers.close()


def test_of_a_large_disk_the_latest_is_announced_after_a_start(tmp_path):
    store = store_of(14)
    tiers = open_tiers(store, "n", disk_bytes=2**20, folder=str(tmp_path))
    cache(store, KEYS[:14])
    spill(tiers)
    order = tiers._chain.tiers[0].keys()
    tiers.close()
    store = store_of(1)
    tiers = open_tiers(store, "n", disk_bytes=2**20, folder=str(tmp_path))
    assert store.events() == StoreEvents(lower=tuple(order[-ANNOUNCED_SHARE:]), snapshot=True)
    store.check_integrity()
    tiers.close()


def test_a_block_used_while_it_is_copied_is_not_counted_among_the_cold(store, monkeypatch):
    """Or the copying would stop before what is colder has been copied."""
    tiers = with_host(store, 8)  # two ahead
    cache(store, KEYS[:8])
    real = np.copyto

    def used_meanwhile(into, data):
        monkeypatch.setattr(np, "copyto", real)
        real(into, data)
        store.release(store.match(KEYS[:8]))

    monkeypatch.setattr(np, "copyto", used_meanwhile)
    assert spill(tiers) == 3
    assert in_tier(tiers) == {KEYS[7], KEYS[6], KEYS[5]}
    cold = list(store._pool._cached)[:3]
    assert {store._pool.key(block) for block in cold} == in_tier(tiers)
    tiers.close()


# One below the other


def test_what_host_memory_evicts_goes_to_disk_and_comes_back_up(store, tmp_path):
    tiers = with_both(store, 4, 40, tmp_path)
    cache(store, KEYS[:8])
    spill(tiers)
    assert (len(in_tier(tiers, 0)), len(in_tier(tiers, 1))) == (4, 4)
    store.release(store.allocate(8))
    assert store.stats().lost == 0
    assert asyncio.run(bring_back(store, tiers, KEYS[:8])) == 8
    # From the disk they go to host memory when the pool is about to evict them.
    down = in_tier(tiers, 1)
    assert spill(tiers) == 4
    assert in_tier(tiers, 0) == down
    store.check_integrity()
    tiers.close()


def test_a_disk_that_fails_takes_its_keys_with_it_and_the_rest_goes_on(store, tmp_path, caplog):
    tiers = with_both(store, 4, 40, tmp_path)
    cache(store, KEYS[:8])
    spill(tiers)
    store.release(store.allocate(8))
    store.events()
    below = in_tier(tiers, 1) - in_tier(tiers, 0)

    def fail(*args):
        raise OSError(5, "Input/output error")

    tiers._chain.tiers[1]._medium.read = fail
    assert asyncio.run(bring_back(store, tiers, sorted(below))) == 0
    assert set(store.events().removed) == below
    assert "disk tier: Input/output error" in caplog.text
    cache(store, KEYS[8:16])
    assert spill(tiers) > 0
    assert len(in_tier(tiers, 0)) == 4
    stats = store.stats()
    assert [(t.off, t.errors) for t in stats.tiers] == [("", 0), ("Input/output error", 1)]
    store.check_integrity()
    tiers.close()


def test_nothing_is_copied_for_tiers_that_are_all_off(store, tmp_path, monkeypatch):
    tiers = with_both(store, 4, 40, tmp_path)
    host, disk = tiers._chain.tiers
    cache(store, KEYS[:8])
    host._fail(OSError(5, "Input/output error"))
    assert spill(tiers) == 8, "the disk takes them"
    disk._fail(OSError(5, "Input/output error"))
    cache(store, KEYS[8:16])
    monkeypatch.setattr(store, "unchanged", None)  # would be asked after a copy
    assert spill(tiers) == 0
    tiers.close()


def test_copying_that_died_is_in_the_statistics(store, caplog):
    tiers = with_host(store, 32)

    def broken(label, data):
        raise KeyError("a mistake in the books")

    tiers._chain.put = broken
    cache(store, KEYS[:2])
    tiers.start()
    tiers._thread.join(30)
    assert store.stats().tiers[0].off == "nothing is copied to it any more: KeyError"
    assert "nothing is copied any more" in caplog.text
    tiers.close()


def test_blocks_on_disk_are_announced_after_a_start(tmp_path):
    for round_ in range(2):
        store = store_of(8)
        tiers = open_tiers(store, "n", disk_bytes=2**20, folder=str(tmp_path))
        if round_:
            events = store.events()
            assert events.snapshot
            assert (events.stored, set(events.lower)) == ((), set(KEYS[:5]))
            assert asyncio.run(bring_back(store, tiers, KEYS[:5])) == 5
        else:
            cache(store, KEYS[:5])
            spill(tiers)
        store.check_integrity()
        tiers.close()
    store = store_of(8)
    tiers = open_tiers(store, "other weights", disk_bytes=2**20, folder=str(tmp_path))
    assert store.snapshot() == StoreEvents(snapshot=True)
    tiers.close()


def test_tiers_come_before_blocks(store):
    held = store.allocate(1)
    with pytest.raises(ValueError, match="from its beginning"):
        with_host(store, 4)
    store.release(held)
    with_host(store, 4)
    with pytest.raises(ValueError, match="from its beginning"):
        with_host(store, 4)


def test_no_tiers_asked_for_is_none(store):
    assert open_tiers(store, "n") is None
    assert store.stats().tiers == ()


# For peers


class Watched:
    def __init__(self, store):
        self.store = store

    async def fetch(self, lease, keys, *, held_only=True, tenant=""):
        """What the servicer does; the pieces announced."""
        async with self.store.restored(lease, keys, tenant):
            watch = self.store.watch(
                lease, keys, lambda: None, 5.0, held_only=held_only, tenant=tenant
            )
        try:
            return self.store.take(watch, 1000)
        finally:
            self.store.unwatch(watch)


async def test_a_fetch_of_what_only_a_tier_has(store):
    tiers = with_host(store, 32)
    cache(store, KEYS[:6])
    spill(tiers)
    store.release(store.allocate(8))
    cache(store, KEYS[:2])
    pieces = await Watched(store).fetch("a", KEYS[:4])
    assert len(pieces) == 4 * store.grid.count
    for piece in pieces:
        first = piece.first_layer * LAYOUT.layer_bytes
        data = store.segment.data[piece.offset : piece.offset + piece.length]
        assert np.array_equal(data, CONTENT[KEYS[piece.key_index]][first:][: piece.length])
    assert store.stats().held == 4  # the lease's
    assert store.stats().restored == 2
    store.release_lease("a")
    assert store.stats().held == 0
    store.check_integrity()
    tiers.close()


async def test_what_a_tier_has_counts_as_held(store):
    tiers = with_host(store, 32)
    cache(store, KEYS[:4])
    spill(tiers)
    store.release(store.allocate(8))
    with pytest.raises(BlocksNotHeldError) as raised:
        await Watched(store).fetch("a", KEYS[:6])
    assert raised.value.metadata["held"] == "4"
    assert store.stats().restored == 0
    assert len(await Watched(store).fetch("b", KEYS[:4])) == 4 * store.grid.count
    store.release_lease("b")
    tiers.close()


async def test_a_peer_gets_no_more_than_half_of_what_can_be_had(store):
    tiers = with_host(store, 32)
    cache(store, KEYS[:5])
    spill(tiers)
    held = store.allocate(5)
    with pytest.raises(BlocksNotHeldError) as raised:
        await Watched(store).fetch("a", KEYS[:5])
    assert raised.value.metadata["held"] == "3"  # those that are still in the pool
    assert store.stats().held == 5
    store.release(held)
    store.check_integrity()
    tiers.close()


async def test_another_tenant_gets_nothing_from_a_tier(store):
    tiers = with_host(store, 32)
    cache(store, KEYS[:2], tenant="theirs")
    spill(tiers)
    store.release(store.allocate(8))
    with pytest.raises(WrongTenantError):
        await Watched(store).fetch("a", KEYS[:2], tenant="mine")
    cache(store, KEYS[:1], tenant="theirs")
    with pytest.raises(WrongTenantError):
        await Watched(store).fetch("a", KEYS[:2], tenant="mine")
    stats = store.stats()
    assert (stats.restored, stats.held, stats.tiers[0].hits) == (0, 0, 0), "not even read"
    assert await Watched(store).fetch("b", KEYS[:2], tenant="theirs")
    store.release_lease("b")
    assert store.stats().held == 0
    tiers.close()


async def test_a_fetch_that_waits_for_a_prompt_brings_nothing_back(store):
    tiers = with_host(store, 32)
    cache(store, KEYS[:2])
    spill(tiers)
    store.release(store.allocate(8))
    assert await Watched(store).fetch("a", KEYS[:3], held_only=False) == []
    store.open_lease("b", 5.0)
    assert await Watched(store).fetch("b", KEYS[:2], held_only=False) == []
    assert store.stats().restored == 0
    tiers.close()


async def test_a_fetch_that_is_cancelled_while_blocks_come_back_leaks_none(store):
    tiers = with_host(store, 32)
    cache(store, KEYS[:4])
    spill(tiers)
    store.release(store.allocate(8))
    began, go_on = threading.Event(), threading.Event()
    read = tiers._chain.read

    def slow(key, into):
        began.set()
        assert go_on.wait(30)
        return read(key, into)

    tiers._chain.read = slow
    task = asyncio.create_task(Watched(store).fetch("a", KEYS[:4]))
    await asyncio.to_thread(began.wait, 30)
    task.cancel()
    asyncio.get_running_loop().call_soon(go_on.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert store.stats().held == 0
    assert store.stats().restored <= 1
    store.check_integrity()
    tiers.close()


async def test_a_fill_ends_when_its_time_is_over_and_keeps_what_it_has(store):
    now = 0.0
    shape = shape_of(store, "n")
    tiers = Tiers(store, [host_tier(shape, 32 * LAYOUT.block_bytes)], clock=lambda: now)
    cache(store, KEYS[:6])
    spill(tiers)
    blocks, read = store.allocate(8), tiers._chain.read

    def slow(key, into):
        nonlocal now
        now += 1.0
        return read(key, into)

    tiers._chain.read = slow
    assert await tiers.fill(KEYS[:6], blocks[:6], seconds=2.5) == 3
    store.release(blocks)
    found = store.match(KEYS[:6])
    assert len(found) == 3
    store.release(found)
    store.check_integrity()
    tiers.close()


async def test_fills_side_by_side_are_all_counted(store):
    tiers = with_host(store, 32)
    cache(store, KEYS[:8])
    spill(tiers)
    store.release(store.allocate(8))
    both, read = threading.Barrier(2, timeout=30), tiers._chain.read

    def together(key, into):
        both.wait()
        return read(key, into)

    tiers._chain.read = together
    halves = bring_back(store, tiers, KEYS[:4]), bring_back(store, tiers, KEYS[4:8])
    assert await asyncio.gather(*halves) == [4, 4]
    assert store.stats().restored == 8
    tiers.close()


async def test_a_peer_fetches_from_a_tier(tmp_path):
    source, sink = store_of(8), store_of(8)
    tiers = open_tiers(source, "n", disk_bytes=2**20, folder=str(tmp_path))
    ends = [KvEndpoint(s, transports=["shm", "tcp"]) for s in (source, sink)]
    for end in ends:
        await end.start()
    server = grpc.aio.server()
    kvtransfer_pb2_grpc.add_KvTransferServiceServicer_to_server(ends[0].servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    cache(source, KEYS[:4])
    spill(tiers)
    source.release(source.allocate(8))
    blocks = sink.allocate(4)
    report = await ends[1].fetch(
        f"127.0.0.1:{port}", "lease", KEYS[:4], blocks, partial_last=False, held_only=True
    )
    assert report.complete == (True,) * 4
    for block, key in zip(blocks, KEYS, strict=False):
        assert np.array_equal(sink.memory[block], CONTENT[key])
    sink.release(blocks)
    await ends[1].close()
    await server.stop(0)
    await ends[0].close()
    assert source.stats().held == 0
    source.check_integrity()
    tiers.close()


# Everything at once


class Machine(RuleBasedStateMachine):
    """An engine, the copying, restores and a failing medium in any order."""

    @initialize(
        pool=st.integers(2, 6), places=st.sampled_from([1, 2, 4, 8, 24]), most=st.integers(0, 9)
    )
    def begin(self, pool, places, most):
        self.store = store_of(pool)
        self.tiers = with_host(self.store, places)
        # Fewer than such a pool would have: it is to matter.
        self.most = self.store._books._most_announced = most
        self.full = False
        self.mine: list[int] = []
        self.announced: dict[bytes, str] = {}
        self.loop = asyncio.new_event_loop()

    @rule(count=st.integers(1, 3))
    def allocate(self, count):
        try:
            self.mine += self.store.allocate(count)
        except OutOfBlocksError:
            assert self.store.available() < count

    @rule(first=st.integers(0, 7), count=st.integers(1, 4))
    def match(self, first, count):
        keys = KEYS[first : first + count]
        found = self.store.match(keys)
        for block, key in zip(found, keys, strict=False):
            assert np.array_equal(self.store.memory[block], CONTENT[key])
        self.mine += found

    @precondition(lambda self: self.mine)
    @rule(data=st.data())
    def give_back(self, data):
        block = data.draw(st.sampled_from(self.mine))
        self.mine.remove(block)
        self.store.release([block])

    @precondition(lambda self: self.mine)
    @rule(data=st.data(), key=st.sampled_from(KEYS[:8]))
    def write(self, data, key):
        block = data.draw(st.sampled_from(self.mine))
        if self.store._pool.key(block) is not None and data.draw(st.booleans()):
            return
        try:
            self.store.begin(block, key)
        except ValueError:
            return
        if self.store._ready[block] == 0:
            self.store.memory[block] = CONTENT[key]
            self.store.piece_done(block, 0, 5)
            self.store.commit(block)

    @rule(first=st.integers(0, 7), count=st.integers(1, 4))
    def prompt(self, first, count):
        """A whole one: what is not cached is computed, and then it is all cached."""
        keys = KEYS[first : first + count]
        blocks = self.store.match(keys)
        with contextlib.suppress(OutOfBlocksError):
            blocks += fill(self.store, keys[len(blocks) :])
        self.store.release(blocks)

    @rule()
    def copy_one(self):
        self.tiers.spill()

    @rule()
    def copy_all(self):
        spill(self.tiers)
        pool, books = self.store._pool, self.store._books
        # What the next allocations would evict is in the tier, but for what it has dropped since.
        coming = list(pool._cached)[: max(0, books.ahead - pool.free)]
        waiting = [b for b in coming if b in books._cold]
        assert not waiting

    @rule(first=st.integers(0, 7), count=st.integers(1, 3))
    def bring_back(self, first, count):
        keys = KEYS[first : first + count]
        if self.store.available() < count:
            return
        blocks = self.store.allocate(count)
        done = self.loop.run_until_complete(self.tiers.fill(keys, blocks))
        for block, key in zip(blocks[:done], keys, strict=False):
            assert np.array_equal(self.store.memory[block], CONTENT[key])
        self.mine += blocks

    @rule(key=st.sampled_from(KEYS[:8]))
    def drop(self, key):
        self.tiers._chain.tiers[0].forget(key)

    @rule(key=st.sampled_from(KEYS[:8]), at=st.integers(0, LAYOUT.block_bytes - 1))
    def corrupt(self, key, at):
        tier = self.tiers._chain.tiers[0]
        if tier.find(key) is not None:
            tier._medium._data[tier._index[key].place][at] ^= 1

    @rule()
    def listen(self):
        self.hear(self.store.events())

    @rule()
    def listen_anew(self):
        self.hear(self.store.snapshot())

    def hear(self, events):
        if events.snapshot:
            assert not events.removed
            self.announced = {}
        told = {
            **dict.fromkeys(events.stored, "pool"),
            **dict.fromkeys(events.lower, "lower"),
            **dict.fromkeys(events.removed),
        }
        assert len(told) == len(events.stored) + len(events.lower) + len(events.removed)
        for key, where in told.items():
            assert self.announced.get(key) != where, "told of what was known"
        self.announced = {k: where for k, where in (self.announced | told).items() if where}
        held, below = set(self.store._pool.keys()), in_tier(self.tiers)
        assert {key for key, where in self.announced.items() if where == "pool"} == held
        lower = self.announced.keys() - held
        assert lower <= below
        assert len(lower) <= self.most
        if not self.full:
            assert lower == below - held

    @invariant()
    def books_balance(self):
        self.store.check_integrity()
        assert set(self.store._books.keys()) == in_tier(self.tiers)
        self.full |= len(in_tier(self.tiers)) > self.most

    def teardown(self):
        self.store.release(self.mine)
        self.store.check_integrity()
        assert self.store.stats().held == 0
        self.tiers.close()
        self.loop.close()


Machine.TestCase.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, derandomize=True
)
TestMachine = Machine.TestCase


@pytest.mark.parametrize("pool", [6, 14])
def test_an_engine_and_the_copying_at_once(tmp_path, pool):
    """The copying runs on its thread, blocks are taken and written without regard to it."""
    store = store_of(pool)
    tiers = with_both(store, 8, 60, tmp_path)
    tiers.start()
    chance, loop = random.Random(3), asyncio.new_event_loop()
    for _ in range(600):
        first = chance.randrange(20)
        keys = KEYS[first : first + chance.randint(1, 4)]
        blocks = store.match(keys)
        rest = keys[len(blocks) :]
        fresh = store.allocate(len(rest))
        done = loop.run_until_complete(tiers.fill(rest, fresh)) if chance.random() < 0.5 else 0
        for block, key in zip(fresh[done:], rest[done:], strict=True):
            store.memory[block] = chance.randrange(256)  # what is not committed may be anything
            store.memory[block] = CONTENT[key]
            store.seal(block, key)
        for block, key in zip(blocks + fresh, keys, strict=True):
            assert np.array_equal(store.memory[block], CONTENT[key])
        store.release(blocks + fresh)
    tiers.close()
    store.check_integrity()
    stats = store.stats()
    assert [t.corrupt for t in stats.tiers] == [0, 0]
    assert [t.errors for t in stats.tiers] == [0, 0]
    assert stats.restored > 10
    held, below = store.snapshot(), in_tier(tiers, 0) | in_tier(tiers, 1)
    assert set(held.stored) == set(store._pool.keys())
    assert set(held.lower) == below - set(held.stored)
    loop.close()
