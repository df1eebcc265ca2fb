import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtransfer.errors import OutOfBlocksError
from kvtransfer.pool import BlockPool

KEYS = [bytes([i]) * 16 for i in range(8)]


def cached_chain(pool: BlockPool, keys: list[bytes]) -> list[int]:
    blocks, _ = pool.allocate(len(keys))
    for block, key in zip(blocks, keys, strict=True):
        pool.begin(block, key)
        pool.commit(block)
    pool.release(blocks)
    return blocks


def test_the_end_of_a_sequence_is_evicted_before_its_start():
    pool = BlockPool(4)
    cached_chain(pool, KEYS[:3])
    _, removed = pool.allocate(2)
    assert removed == [KEYS[2]]
    _, removed = pool.allocate(1)
    assert removed == [KEYS[1]]
    assert pool.match(KEYS[:3])
    assert pool.find(KEYS[0]) is not None


def test_least_recently_used_goes_first():
    pool = BlockPool(2)
    cached_chain(pool, KEYS[:1])
    cached_chain(pool, KEYS[1:2])
    pool.release(pool.match(KEYS[:1]))
    _, removed = pool.allocate(1)
    assert removed == [KEYS[1]]


def test_allocate_is_all_or_nothing():
    pool = BlockPool(3)
    cached_chain(pool, KEYS[:1])
    pool.allocate(1)
    with pytest.raises(OutOfBlocksError) as raised:
        pool.allocate(3)
    assert raised.value.metadata == {"wanted": "3", "available": "2"}
    assert (pool.free, pool.cached, pool.held) == (1, 1, 1)


def test_match_stops_at_the_first_gap():
    pool = BlockPool(4)
    cached_chain(pool, [KEYS[0], KEYS[2]])
    assert len(pool.match(KEYS[:3])) == 1


def test_second_block_of_a_key_stays_private():
    pool = BlockPool(2)
    (a, b), _ = pool.allocate(2)
    pool.begin(a, KEYS[0])
    pool.begin(b, KEYS[0])
    assert pool.commit(a)
    assert not pool.commit(b)
    pool.release([b])
    assert (pool.free, pool.held) == (1, 1)


def test_a_block_beginning_anew_leaves_the_index():
    pool = BlockPool(1)
    (block,), _ = pool.allocate(1)
    pool.begin(block, KEYS[0])
    pool.commit(block)
    before = pool.generation(block)
    assert pool.begin(block, KEYS[1]) == KEYS[0]
    assert pool.generation(block) > before
    assert pool.find(KEYS[0]) is None


def test_shared_content_can_not_change():
    pool = BlockPool(1)
    (block,), _ = pool.allocate(1)
    pool.begin(block, KEYS[0])
    pool.retain([block])
    with pytest.raises(ValueError, match="shared"):
        pool.begin(block, KEYS[1])


@pytest.mark.parametrize("blocks", [[1], [0, 0], [7], [-1], [0, 1]])
def test_bad_release_changes_nothing(blocks):
    pool = BlockPool(2)
    pool.allocate(1)
    with pytest.raises(ValueError):
        pool.release(blocks)
    assert pool.held == 1
    assert pool.references(0) == 1
    pool.check_integrity()


class PoolAgainstModel(RuleBasedStateMachine):
    """The pool beside the plainest description of what it should do."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(5)
        self.references: dict[int, int] = {}
        self.begun: dict[int, bytes] = {}
        self.index: dict[bytes, int] = {}
        self.lru: list[int] = []
        self.generations = [0] * 5

    def held(self):
        return sorted(self.references)

    @rule(count=st.integers(0, 6))
    def allocate(self, count):
        room = 5 - len(self.references)
        if count > room:
            with pytest.raises(OutOfBlocksError):
                self.pool.allocate(count)
            return
        free = 5 - len(self.references) - len(self.lru)
        evicted, self.lru = self.lru[: max(0, count - free)], self.lru[max(0, count - free) :]
        expected = [self.begun[b] for b in evicted]
        blocks, removed = self.pool.allocate(count)
        assert removed == expected
        assert len(blocks) == count
        for block in evicted:
            del self.index[self.begun.pop(block)]
        for block in blocks:
            assert block not in self.references
            assert block not in self.lru
            self.references[block] = 1
            self.begun.pop(block, None)
            assert self.pool.generation(block) > self.generations[block]
            self.generations[block] = self.pool.generation(block)

    @precondition(lambda self: self.references)
    @rule(data=st.data())
    def release(self, data):
        blocks = data.draw(st.lists(st.sampled_from(self.held()), max_size=4))
        if any(blocks.count(b) > self.references[b] for b in blocks):
            with pytest.raises(ValueError):
                self.pool.release(blocks)
            return
        before = self.pool.available
        freed = self.pool.release(blocks)
        assert freed == self.pool.available - before
        for block in blocks:
            self.references[block] -= 1
        for block in dict.fromkeys(reversed(blocks)):
            if not self.references[block]:
                del self.references[block]
                if self.index.get(self.begun.get(block)) == block:
                    self.lru.append(block)
                else:
                    self.begun.pop(block, None)

    @precondition(lambda self: self.references)
    @rule(data=st.data())
    def retain(self, data):
        block = data.draw(st.sampled_from(self.held()))
        self.pool.retain([block])
        self.references[block] += 1

    @precondition(lambda self: self.references)
    @rule(data=st.data(), key=st.sampled_from(KEYS))
    def begin(self, data, key):
        block = data.draw(st.sampled_from(self.held()))
        known = self.begun.get(block)
        committed = known is not None and self.index.get(known) == block
        if known == key and (committed or self.references[block] > 1):
            assert self.pool.begin(block, key) is None
            assert self.pool.generation(block) == self.generations[block]
        elif known is not None and self.references[block] > 1:
            with pytest.raises(ValueError):
                self.pool.begin(block, key)
        else:
            assert self.pool.begin(block, key) == (known if committed else None)
            if committed:
                del self.index[known]
            assert (self.pool.generation(block) > self.generations[block]) == (known is not None)
            self.generations[block] = self.pool.generation(block)
            self.begun[block] = key

    @precondition(lambda self: self.references)
    @rule(data=st.data())
    def commit(self, data):
        block = data.draw(st.sampled_from(self.held()))
        if block not in self.begun:
            with pytest.raises(ValueError):
                self.pool.commit(block)
            return
        key = self.begun[block]
        assert self.pool.commit(block) == (key not in self.index)
        self.index.setdefault(key, block)

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=4, unique=True))
    def match(self, keys):
        expected = []
        for key in keys:
            if key not in self.index:
                break
            expected.append(self.index[key])
        assert self.pool.match(keys) == expected
        for block in expected:
            self.references[block] = self.references.get(block, 0) + 1
            if block in self.lru:
                self.lru.remove(block)

    @invariant()
    def agree(self):
        self.pool.check_integrity()
        assert self.pool.held == len(self.references)
        assert self.pool.cached == len(self.lru)
        assert set(self.pool.keys()) == set(self.index)
        for block in range(5):
            assert self.pool.references(block) == self.references.get(block, 0)


PoolAgainstModel.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, derandomize=True
)
TestPoolAgainstModel = PoolAgainstModel.TestCase
