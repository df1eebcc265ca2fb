"""Followers never read a byte of KV that rank 0 does not have: whatever happens to its blocks.

An engine is played by hand on a real KvStore: sequences find cached blocks, get some from a peer
or a tier, compute the rest in chunks, with drafts, and give all back. Bytes are random, so a block
that was not sent, or is that of another time, is seen.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.errors import OutOfBlocksError
from kvtransfer.keys import KeyChain, salt
from kvtransfer.layout import gqa_layout
from kvtransfer.store import KvStore
from services.engine.torch.kernels.batch import Batch, DraftRows
from services.engine.torch.parallel.tensor_mirror import Mirror
from services.engine.torch.parallel.tensor_orders import (
    FIRST_BYTES,
    LENGTH_BYTES,
    Order,
    OrderLine,
    What,
    batch_of,
    draft_of,
    order_of,
    packed,
    unpacked,
)

SIZE = 4
LAYOUT = gqa_layout("m", layers=1, kv_heads=1, head_dim=32, dtype="bfloat16", block_tokens=SIZE)


class Sequence:
    def __init__(self, tokens: list[int]) -> None:
        self.chain = KeyChain(salt("m", LAYOUT.fingerprint, "", ""), SIZE)
        self.chain.extend(tokens)
        self.tokens = tokens
        self.blocks: list[int] = []
        self.done = 0


class Play:
    """An engine's pool, and what a follower has of it."""

    def __init__(self, seed: int, blocks: int = 12, make=Mirror) -> None:
        self.random = np.random.default_rng(seed)
        self.store = KvStore(LAYOUT, blocks, layers_per_piece=1, scratch_bytes=0)
        self.mirror = make(self.store.generations, SIZE)
        self.theirs = self.random.integers(0, 256, self.store.memory.shape, np.uint8)
        self.live: list[Sequence] = []
        self.sent = 0

    def close(self) -> None:
        self.store.close()

    def rubbish(self, count: int) -> np.ndarray:
        return self.random.integers(0, 256, (count, LAYOUT.block_bytes), np.uint8)

    def admit(self, tokens: list[int], fetched: int = 0) -> Sequence | None:
        """With what is cached, and up to so many blocks that came from elsewhere."""
        store, sequence = self.store, Sequence(tokens)
        cached = store.match(sequence.chain.keys[: (len(tokens) - 1) // SIZE])
        try:
            fresh = store.allocate(-(-len(tokens) // SIZE) - len(cached))
        except OutOfBlocksError:
            store.release(cached)
            return None
        sequence.blocks = [*cached, *fresh]
        sequence.done = len(cached) * SIZE
        for i in range(len(cached), min(len(cached) + fetched, len(sequence.chain.keys))):
            block = sequence.blocks[i]
            store.begin(block, sequence.chain.keys[i])
            store.memory[block] = self.rubbish(1)
            store.piece_done(block, 0, 1)
            store.commit(block)
            sequence.done = min((i + 1) * SIZE, len(tokens) - 1)
        self.live.append(sequence)
        return sequence

    def step(self, works: list[tuple[Sequence, int]], refresh: bool, drafts: int) -> None:
        """So many tokens of each, and drafts that are forgotten; bytes are checked, and written."""
        works = [(s, min(n, len(s.tokens) - s.done)) for s, n in works]
        works = [(s, n) for s, n in works if n > 0]
        if not works:
            return
        for sequence, count in works:
            end = sequence.done + count
            for i in range(sequence.done // SIZE, end // SIZE):
                self.store.begin(sequence.blocks[i], sequence.chain.keys[i])
            if end == len(sequence.tokens) and end % SIZE:
                # As a prompt's last block, which has a key of its own.
                self.store.begin(sequence.blocks[end // SIZE], sequence.chain.partial_key())
        batch, spans = self.batch(works, refresh, drafts)
        sent = self.mirror.step(batch)
        self.sent += len(sent)
        self.theirs[sent] = self.store.memory[sent]
        mine, theirs = self.by_token(self.store.memory), self.by_token(self.theirs)
        for (sequence, _), (start, end) in zip(works, spans, strict=True):
            for at in range(start):
                place = sequence.blocks[at // SIZE], at % SIZE
                assert np.array_equal(mine[place], theirs[place]), (at, place)
            for at in range(start, end):
                place = sequence.blocks[at // SIZE], at % SIZE
                mine[place] = theirs[place] = self.random.integers(0, 256, mine.shape[2:])
        for sequence, count in works:
            before, sequence.done = sequence.done, sequence.done + count
            for i in range(before // SIZE, sequence.done // SIZE):
                self.store.piece_done(sequence.blocks[i], 0, 1)
                self.store.commit(sequence.blocks[i])

    def by_token(self, pool: np.ndarray) -> np.ndarray:
        """A view [blocks, tokens, bytes], whatever is a token's."""
        return pool.reshape(len(pool), -1)[:, : SIZE * 64].reshape(len(pool), SIZE, -1)

    def batch(self, works, refresh: bool, drafts: int):
        rows, starts, spans = [], [0], []
        for sequence, count in works:
            start, end = sequence.done, sequence.done + count
            room = len(sequence.blocks) * SIZE
            if end == len(sequence.tokens):
                end = min(end + drafts, room)
            first = start - (refresh and start > 0)
            rows += range(first, end)
            starts.append(len(rows))
            spans.append((start, end))
        width = max(len(s.blocks) for s, _ in works)
        tables = np.full((len(works), width), -1, np.int32)
        for row, (sequence, _) in zip(tables, works, strict=True):
            row[: len(sequence.blocks)] = sequence.blocks
        found = Batch(
            token_ids=np.zeros(len(rows), np.int32),
            positions=np.array(rows, np.int32),
            query_starts=np.array(starts, np.int32),
            block_tables=tables,
            logit_rows=np.zeros(0, np.int32),
            fresh=np.array([s for s, _ in spans], np.int32) if refresh else None,
        )
        return found, spans

    def grow(self, sequence: Sequence) -> None:
        """Another token, and perhaps a block for it."""
        if len(sequence.tokens) % SIZE == 0:
            try:
                sequence.blocks += self.store.allocate(1)
            except OutOfBlocksError:
                return
        token = int(self.random.integers(0, 3))
        sequence.tokens.append(token)
        sequence.chain.extend([token])

    def leave(self, sequence: Sequence) -> None:
        self.live.remove(sequence)
        self.store.release(sequence.blocks)


def play(seed: int, actions: int, make=Mirror) -> Play:
    """Random ones. Few different prompts, so that blocks are found again; few blocks."""
    game = Play(seed, make=make)
    random = game.random
    try:
        for _ in range(actions):
            action = random.integers(0, 10)
            if action < 3 or not game.live:
                kind, length = int(random.integers(0, 3)), int(random.integers(2, 22))
                game.admit([kind] * length, int(random.integers(0, 4)))
            elif action < 7:
                some = [s for s in game.live if random.integers(0, 2)]
                counts = random.integers(1, 9, len(some)).tolist()
                works = list(zip(some, counts, strict=True))
                game.step(works, bool(random.integers(0, 2)), int(random.integers(0, 4)))
            elif action < 8:
                game.grow(game.live[int(random.integers(0, len(game.live)))])
            else:
                game.leave(game.live[int(random.integers(0, len(game.live)))])
        game.store.check_integrity()
    finally:
        game.close()
    return game


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32))
def test_what_is_read_is_what_rank_0_has(seed):
    play(seed, 120)


class Forgetful(Mirror):
    """Does not see that a block's memory went to other content."""

    def __init__(self, generations, size) -> None:
        super().__init__(np.zeros_like(generations), size)


class Hasty(Mirror):
    """Takes for known what a step reads, not what it writes."""

    def step(self, batch):
        super().step(batch)
        return np.zeros(0, np.int64)


@pytest.mark.parametrize("make", [Forgetful, Hasty])
def test_a_mirror_that_is_wrong_would_be_seen(make):
    def seeds() -> None:
        for seed in range(50):
            play(seed, 120, make)

    with pytest.raises(AssertionError):
        seeds()


def test_what_steps_write_is_never_sent():
    game = Play(1)
    first = game.admit([1] * 11)
    game.step([(first, 4)], False, 0)
    game.step([(first, 7)], True, 0)
    game.leave(first)
    assert game.admit([1] * 15).done == 8  # Cached, and known.
    game.step([(game.live[0], 7)], True, 2)
    assert game.sent == 0
    game.leave(game.live[0])
    game.close()


def test_what_came_from_elsewhere_is_sent_once():
    game = Play(1)
    sequence = game.admit([1] * 15, fetched=3)
    game.step([(sequence, 1)], False, 0)
    game.step([(sequence, 2)], True, 0)
    assert game.sent == 3
    game.close()


# Orders

ROWS = {
    "token_ids": np.array([5, 6, 7], np.int32),
    "positions": np.array([3, 4, 0], np.int32),
    "query_starts": np.array([0, 2, 3], np.int32),
    "block_tables": np.array([[1, 2], [7, -1]], np.int32),
    "logit_rows": np.zeros(0, np.int32),
}


@pytest.mark.parametrize("fresh", [None, np.array([4, 0], np.int32)])
@pytest.mark.parametrize("adapters", [(), ("a@1", "")])
def test_a_step_is_told_as_it_is(fresh, adapters):
    step = Batch(**ROWS, fresh=fresh, adapters=adapters, hidden=bool(adapters))
    told = unpacked(packed(order_of(What.FORWARD, step, np.array([3, 9]))))
    assert (told.what, told.arrays["blocks"].tolist()) == (What.FORWARD, [3, 9])
    same(batch_of(told), step)
    rows = DraftRows(**ROWS, hidden_rows=np.array([-1, 0, 2], np.int32), deeper=True)
    same(draft_of(unpacked(packed(order_of(What.DRAFT, rows, np.zeros(0, np.int64))))), rows)


def same(found, expected) -> None:
    for name in type(expected).__dataclass_fields__:
        ours, theirs = getattr(found, name), getattr(expected, name)
        if isinstance(theirs, np.ndarray):
            assert ours.shape == theirs.shape
            assert np.array_equal(ours, theirs)
        else:
            assert ours == theirs


class Pipe:
    """A mesh of two of which one speaks first."""

    def __init__(self) -> None:
        self.said: list = []
        self.speaks = True

    def spread(self, data) -> None:
        if self.speaks:
            self.said.append(data.clone())
        else:
            data.copy_(self.said.pop(0))


@pytest.mark.parametrize("size", [0, 1, 3000, FIRST_BYTES - LENGTH_BYTES, FIRST_BYTES, 100_000])
def test_orders_of_any_size_arrive(size):
    pipe = Pipe()
    line = OrderLine(pipe)
    order = Order(What.PUT_ADAPTER, words={"id": "a@1"}, data=(b"x" * size, b"yz"))
    line.send(order)
    line.send(Order(What.END))
    pipe.speaks = False
    assert line.take() == order
    assert line.take() == Order(What.END)
    assert not pipe.said
