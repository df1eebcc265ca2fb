"""The scheduler against a model of what it promises, driven by a state machine of requests.

Blocks come from the real BlockPool; the machine plays the step thread and the network.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtransfer.errors import OutOfBlocksError
from kvtransfer.keys import KeyChain
from kvtransfer.pool import BlockPool
from services.engine.api import KvPrefix, KvSource, Request, Sampling
from services.engine.stepped.phases import Event, Phase, after
from services.engine.stepped.scheduler import Scheduler
from services.engine.stepped.sequence import Role, Sequence

BLOCK_TOKENS = 4
SOURCE = KvSource("w", "address", "lease")


class Pool:
    """The scheduler's view of a BlockPool, and what a KvStore would let the step thread do."""

    def __init__(self, blocks: int) -> None:
        self.books = BlockPool(blocks)
        self.leased: list[list[int]] = []

    def match(self, keys):
        return self.books.match(keys)

    def allocate(self, n):
        return self.books.allocate(n)[0]

    def release(self, blocks):
        self.books.release(blocks)

    def available(self):
        return self.books.available

    def seal(self, block, key):
        self.books.begin(block, key)
        self.books.commit(block)

    def lease(self, blocks):
        self.books.retain(blocks)
        self.leased.append(list(blocks))


class Engine:
    """The least that makes a scheduler go: computes by saying so, samples by hashing."""

    def __init__(
        self, blocks: int, chunk: int, running: int, draft_tokens: int | None = None
    ) -> None:
        self.draft_tokens = draft_tokens
        self.pool = Pool(blocks)
        self.chunk, self.running = chunk, running
        self.scheduler = Scheduler(
            self.pool,
            block_tokens=BLOCK_TOKENS,
            chunk_tokens=chunk,
            max_running=running,
            judge=lambda sequence, prefix, tokens: self.patience,
            draft_tokens=draft_tokens,
        )
        self.patience: float | None = 1.0
        """What the judge says of every prefix."""
        self.leased: set[int] = set()
        self.serial = 0
        self.live: dict[int, Sequence] = {}
        self.ended: list[int] = []
        self.fetching: dict[int, Sequence] = {}
        self.steps = 0

    def submit(self, prompt, max_tokens, role=Role.DECODE, source=None, held=0) -> Sequence:
        self.serial += 1
        request = Request(str(self.serial), tuple(prompt), Sampling(max_tokens=max_tokens))
        prefix = KvPrefix("p", "peer", held) if held else None
        sequence = Sequence.of(
            self.serial, request, role, KeyChain(b"salt" * 4, BLOCK_TOKENS), source, prefix
        )
        self.live[self.serial] = sequence
        self.scheduler.submit(sequence)
        return sequence

    def end(self, sequence) -> None:
        self.scheduler.end(sequence)
        self.ended.append(sequence.serial)
        del self.live[sequence.serial]

    def step(self):
        before = {s.serial for s in self.scheduler.admitted}
        starving = [s for s in self.scheduler.admitted if s.phase is Phase.RUNNING]
        plan = self.scheduler.plan()
        self.check_plan(plan, before, starving)
        for fetch in plan.fetches:
            if fetch.keys:
                self.fetching[fetch.sequence.serial] = fetch.sequence
        for work in plan.work:
            s = work.sequence
            if s.role is Role.PREFILL and s.serial not in self.leased:
                # From now on they are promised to a sink: they must be all there is to come.
                assert len(s.blocks) * BLOCK_TOKENS >= s.context
                self.leased.add(s.serial)
                self.pool.lease(s.blocks)
            first, last = work.start // BLOCK_TOKENS, work.end // BLOCK_TOKENS
            for i in range(first, last):
                assert self.pool.books.references(s.blocks[i]) == 1 or s.role is Role.PREFILL
                assert not self.pool.books.committed(s.blocks[i]), "a cached block is written"
                self.pool.seal(s.blocks[i], s.chain.keys[i])
        self.scheduler.advance(plan)
        for work in plan.work:
            s = work.sequence
            if not work.sample:
                continue
            self.sample(work)
            if s.role is Role.PREFILL or s.outputs >= s.request.sampling.max_tokens:
                self.end(s)
        if self.draft_tokens is not None:
            for work in plan.work:
                self.draft(work)
        self.steps += 1
        return plan

    def sample(self, work):
        """A token, and one after each draft that is right."""
        s = work.sequence
        s.append([next_token(s.tokens)])
        for draft in work.drafts:
            if draft != s.tokens[-1] or s.outputs >= s.request.sampling.max_tokens:
                break
            s.computed += 1
            s.append([next_token(s.tokens)])
        for i in range(work.end // BLOCK_TOKENS, s.computed // BLOCK_TOKENS):
            assert self.pool.books.references(s.blocks[i]) == 1
            self.pool.seal(s.blocks[i], s.chain.keys[i])

    def draft(self, work):
        """The draft layer's slots, as far as there are hidden states and blocks; then drafts."""
        s = work.sequence
        if not s.blocks:
            return
        assert s.drafted > work.first or s.drafted == 0, "a hidden state is missing"
        room = len(s.blocks) * BLOCK_TOKENS
        s.drafted = min(s.computed + 1, len(s.tokens), room)
        assert s.drafted >= s.computed, "a slot was left out"
        if work.sample and s.drafted == len(s.tokens):
            tokens = list(s.tokens)
            for _ in range(self.draft_tokens):
                wrong = hash((*tokens, "draft")) % 4 == 0
                tokens.append(next_token(tokens) + wrong)
                if len(tokens) > room:
                    break
            s.drafts = tuple(tokens[len(s.tokens) :])

    def check_plan(self, plan, before, starving):
        ones = [w for w in plan.work if w.count == 1]
        chunks = [w for w in plan.work if w.count > 1]
        assert sum(w.count for w in chunks) <= self.chunk
        assert sum(w.count for w in plan.work) <= max(
            self.chunk, len(ones) + max(1, self.chunk // 4)
        )
        # A hidden state may have to be computed beside the least share.
        rows = sum(w.rows for w in ones) + max(1, self.chunk // 4)
        assert sum(w.rows for w in plan.work) <= max(self.chunk, rows) + len(plan.work)
        assert len({w.sequence.serial for w in plan.work}) == len(plan.work)
        for w in plan.work:
            assert w.sequence.phase is Phase.RUNNING
            assert w.start == w.sequence.computed
            room = len(w.sequence.blocks) * BLOCK_TOKENS
            assert w.end <= len(w.sequence.tokens) <= len(w.sequence.tokens) + len(w.drafts) <= room
            assert w.drafts == w.sequence.drafts[: len(w.drafts)]
            assert not w.drafts or w.sample
            missing = 0 < w.start >= w.sequence.drafted
            assert w.refresh == (self.draft_tokens is not None and missing)
            assert w.sample == (w.end == len(w.sequence.tokens) and not w.sequence.held_back)
        # Who can decode and was not preempted or starved does: with no preemption and blocks
        # left over, everybody.
        served = {w.sequence.serial for w in plan.work}
        if not plan.preempted and self.pool.available() > 0:
            for s in starving:
                if s.remaining == 1 and len(s.blocks) * BLOCK_TOKENS >= len(s.tokens):
                    assert s.serial in served
        for s in plan.preempted:
            assert s.role is Role.DECODE
            assert s.phase in (Phase.WAITING, Phase.RETURNING)
            older = [o for o in self.scheduler.admitted if o.serial < s.serial]
            assert older, "the oldest was preempted"
        # Strictly in order of arrival.
        if plan.admitted and self.scheduler.waiting:
            assert max(s.serial for s in plan.admitted) < self.scheduler.waiting[0].serial

    def check(self):
        self.pool.books.check_integrity()
        scheduler = self.scheduler
        assert len(scheduler.admitted) <= self.running
        queued = [s.serial for s in scheduler.waiting]
        assert queued == sorted(queued)
        admitted = [s.serial for s in scheduler.admitted]
        assert admitted == sorted(admitted)
        references: dict[int, int] = {}
        for s in scheduler.admitted:
            assert s.phase not in (Phase.WAITING, Phase.ENDED)
            assert len(set(s.blocks)) == len(s.blocks)
            for b in s.blocks:
                references[b] = references.get(b, 0) + 1
        for s in scheduler.waiting:
            assert s.phase is Phase.WAITING
            assert not s.blocks
            assert s.computed == 0
        for blocks in self.pool.leased:
            for b in blocks:
                references[b] = references.get(b, 0) + 1
        for b in range(self.pool.books.total):
            assert self.pool.books.references(b) == references.get(b, 0), "leaked or lost"
        # No block that some sequence has yet to write is anybody else's.
        for s in scheduler.admitted:
            written = s.blocks[s.computed // BLOCK_TOKENS :]
            for other in scheduler.admitted:
                assert other is s or not set(written) & set(other.blocks), "shared and writable"


def next_token(tokens):
    return hash(tuple(tokens)) % 3


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        blocks=st.integers(6, 14),
        chunk=st.integers(1, 20),
        running=st.integers(1, 6),
        drafts=st.sampled_from([None, 0, 1, 5]),
    )
    def begin(self, blocks, chunk, running, drafts):
        self.engine = Engine(blocks, chunk, running, drafts)
        self.capacity = blocks * BLOCK_TOKENS

    def fitting(self, prompt, tokens):
        prompt = prompt[: self.capacity - 1]
        return prompt, max(1, min(tokens, self.capacity - len(prompt)))

    # Few distinct tokens, so that prefixes are shared; long ones, so that blocks are.
    prompts = st.one_of(
        st.integers(1, 24).map(lambda n: [7] * n),
        st.lists(st.integers(0, 1), min_size=1, max_size=20),
    )

    @rule(prompt=prompts, tokens=st.integers(1, 30))
    def submit(self, prompt, tokens):
        self.engine.submit(*self.fitting(prompt, tokens))

    @rule(prompt=prompts, tokens=st.integers(2, 10), early=st.booleans())
    def submit_with_source(self, prompt, tokens, early):
        prompt, tokens = self.fitting(prompt, tokens)
        sequence = self.engine.submit(prompt, tokens + 1, source=SOURCE)
        if early:
            self.engine.scheduler.proceed(sequence, [1])

    @rule(prompt=prompts, held=st.integers(0, 30))
    def submit_prefill(self, prompt, held):
        self.engine.submit(prompt[: self.capacity // 2], 1, role=Role.PREFILL, held=held)

    @rule(prompt=prompts, tokens=st.integers(1, 30), held=st.integers(1, 30))
    def submit_with_prefix(self, prompt, tokens, held):
        self.engine.submit(*self.fitting(prompt, tokens), held=held)

    @rule(patience=st.sampled_from([1.0, None]))
    def judge(self, patience):
        self.engine.patience = patience

    @rule()
    def step(self):
        self.engine.step()

    @rule()
    def steps(self):
        for _ in range(5):
            self.engine.step()

    @rule(data=st.data())
    @precondition(lambda self: any(s.held_back for s in self.engine.live.values()))
    def proceed(self, data):
        held = [s for s in self.engine.live.values() if s.held_back]
        sequence = data.draw(st.sampled_from(held))
        self.engine.scheduler.proceed(sequence, [1])

    @rule(data=st.data())
    @precondition(lambda self: self.engine.fetching)
    def fetch_stops(self, data):
        serial = data.draw(st.sampled_from(sorted(self.engine.fetching)))
        sequence = self.engine.fetching.pop(serial)
        asked = sequence.fetch_until - sequence.computed // BLOCK_TOKENS
        arrived = data.draw(st.integers(0, asked))
        if sequence.phase is Phase.FETCHING:  # the endpoint has committed what is complete
            first = sequence.computed // BLOCK_TOKENS
            good = set(range(arrived)) | data.draw(st.sets(st.integers(0, asked - 1)))
            for i in sorted(good - {arrived}):
                if first + i < len(sequence.chain.keys):
                    key, block = sequence.context_keys[first + i], sequence.blocks[first + i]
                    if key == sequence.chain.keys[first + i]:
                        self.engine.pool.seal(block, key)
        self.engine.scheduler.fetch_stopped(sequence, arrived)

    @rule(data=st.data())
    @precondition(lambda self: self.engine.live)
    def cancel(self, data):
        serial = data.draw(st.sampled_from(sorted(self.engine.live)))
        self.engine.end(self.engine.live[serial])

    @rule(data=st.data())
    @precondition(lambda self: self.engine.pool.leased)
    def lease_ends(self, data):
        at = data.draw(st.integers(0, len(self.engine.pool.leased) - 1))
        self.engine.pool.release(self.engine.pool.leased.pop(at))

    @invariant()
    def holds(self):
        if hasattr(self, "engine"):
            self.engine.check()

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        # Whatever happened, everything ends if the network does its part.
        engine = self.engine
        budget = 100 + 40 * sum(
            len(s.tokens) + s.request.sampling.max_tokens for s in engine.live.values()
        )
        while engine.live or engine.fetching:
            for serial in list(engine.fetching):
                sequence = engine.fetching.pop(serial)
                engine.scheduler.fetch_stopped(sequence, 0)
            while engine.pool.leased:
                engine.pool.release(engine.pool.leased.pop())
            for s in list(engine.live.values()):
                if s.held_back:
                    engine.scheduler.proceed(s, [1])
            oldest = min(engine.live.values(), key=lambda s: s.serial, default=None)
            progress = None if oldest is None else (oldest.computed, len(oldest.tokens))
            others = [s for s in engine.scheduler.admitted if s is not oldest]
            engine.step()
            engine.check()
            if oldest is not None and oldest.serial in engine.live and not engine.fetching:
                # It may have to wait for a fetch to stop and for prompts under way, no more.
                others += [s for s in engine.scheduler.admitted if s is not oldest]
                held_up = engine.pool.leased or any(
                    s.phase is Phase.RETURNING or s.role is Role.PREFILL for s in others
                )
                assert held_up or (oldest.computed, len(oldest.tokens)) != progress, "stuck"
            budget -= 1
            assert budget > 0, "livelock"
        assert sorted(engine.ended) == list(range(1, engine.serial + 1)), "each ends exactly once"
        while engine.pool.leased:
            engine.pool.release(engine.pool.leased.pop())
        assert engine.pool.books.held == 0


SchedulerMachine.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestScheduler = SchedulerMachine.TestCase


def drain(engine: Engine, limit: int = 500) -> None:
    for _ in range(limit):
        if not engine.live:
            return
        engine.step()
        engine.check()
    raise AssertionError("it does not end")


def test_decodes_are_not_starved_by_prompts_nor_prompts_by_decodes():
    engine = Engine(blocks=100, chunk=8, running=20)
    decoding = [engine.submit([i], 40) for i in range(10)]
    engine.step()
    engine.step()  # the budget took eight of them, then two
    long = engine.submit([99] * 60, 4)
    while long.remaining > 1:
        before = {s.serial: len(s.tokens) for s in decoding}
        computed = long.computed
        engine.step()
        assert all(len(s.tokens) == before[s.serial] + 1 for s in decoding)
        assert long.computed >= computed + 2  # a quarter of the budget
    drain(engine)


def test_the_youngest_that_decodes_gives_way_and_comes_back_first():
    engine = Engine(blocks=6, chunk=16, running=4)
    first, second = engine.submit([1] * 7, 12), engine.submit([2] * 7, 12)
    engine.step()
    third = engine.submit([3] * 7, 2)
    while not second.preemptions:
        engine.step()
    assert first.preemptions == 0
    assert [s.serial for s in engine.scheduler.waiting] == [second.serial, third.serial]
    drain(engine)
    assert engine.ended.index(second.serial) < engine.ended.index(third.serial)
    # It found its own blocks again; that is not what "cached tokens" tells a client.
    assert second.cached_tokens == 0


def test_prefill_sequences_are_never_preempted():
    engine = Engine(blocks=6, chunk=1, running=4)
    old = engine.submit([1] * 4, 12)
    while old.remaining > 1:
        engine.step()
    prompt = engine.submit([2] * 12, 1, role=Role.PREFILL)
    stood_still = False
    while prompt.serial in engine.live:
        plan = engine.step()
        assert not plan.preempted
        stood_still = stood_still or old not in [w.sequence for w in plan.work]
    assert stood_still  # there was something to preempt it for
    for blocks in engine.pool.leased:
        engine.pool.release(blocks)
    engine.pool.leased.clear()
    drain(engine)
    assert old.preemptions == 0


def test_a_cached_prefix_is_not_computed_again_but_for_its_last_token():
    engine = Engine(blocks=20, chunk=100, running=4)
    engine.submit([5] * 12, 1)
    engine.step()
    again = engine.submit([5] * 12, 1)
    plan = engine.step()
    assert again.cached_tokens == 8
    assert [(w.start, w.count) for w in plan.work] == [(8, 4)]


def test_a_fetch_asks_for_what_is_not_cached_and_needs_all_of_it():
    engine = Engine(blocks=20, chunk=100, running=4)
    engine.submit([5] * 8, 1)
    engine.step()
    sequence = engine.submit([5] * 14, 3, source=SOURCE)
    plan = engine.step()
    (fetch,) = plan.fetches
    assert fetch.keys == sequence.context_keys[2:]
    assert len(fetch.keys) == 2  # a full one and the incomplete last
    assert fetch.blocks == tuple(sequence.blocks[2:])
    engine.scheduler.fetch_stopped(engine.fetching.pop(sequence.serial), 2)
    assert (sequence.computed, sequence.fetched_tokens, sequence.phase) == (14, 6, Phase.PARKED)
    engine.scheduler.proceed(sequence, [1])
    assert [(w.start, w.count, w.sample) for w in engine.step().work] == [(14, 1, True)]


def test_a_fully_cached_prompt_only_releases_its_source():
    engine = Engine(blocks=20, chunk=100, running=4)
    engine.submit([5] * 8, 1)
    engine.step()
    sequence = engine.submit([5] * 8, 3, source=SOURCE)
    (fetch,) = engine.step().fetches
    assert fetch.keys == ()
    assert sequence.phase is Phase.PARKED


def test_blocks_after_a_hole_are_computed_into_fresh_ones():
    engine = Engine(blocks=20, chunk=100, running=4)
    sequence = engine.submit([5] * 13, 3, source=SOURCE)
    engine.step()
    blocks = list(sequence.blocks)
    for i in (0, 2):  # the endpoint committed what was good
        engine.pool.seal(blocks[i], sequence.chain.keys[i])
    engine.scheduler.fetch_stopped(engine.fetching.pop(sequence.serial), 1)
    assert sequence.computed == 4
    assert sequence.blocks == blocks[:1]
    engine.step()
    engine.check()
    assert blocks[2] not in sequence.blocks
    assert sequence.phase is Phase.PARKED


def test_a_prefix_is_fetched_where_that_is_judged_better_and_the_rest_computed():
    engine = Engine(blocks=20, chunk=100, running=4)
    engine.submit([5] * 8, 1)
    engine.step()
    sequence = engine.submit([5] * 22, 1, role=Role.PREFILL, held=18)
    plan = engine.step()
    (fetch,) = plan.fetches
    assert (fetch.held_only, fetch.timeout, fetch.source.address) == (True, 1.0, "peer")
    assert fetch.keys == tuple(sequence.chain.keys[2:4])  # 16 tokens of 18 are whole blocks
    assert fetch.blocks == tuple(sequence.blocks[2:4])
    assert not plan.work
    assert engine.scheduler.queued_tokens == 6
    blocks = list(sequence.blocks)
    engine.scheduler.fetch_stopped(engine.fetching.pop(sequence.serial), 2)
    assert sequence.blocks == blocks
    assert (sequence.computed, sequence.cached_tokens, sequence.fetched_tokens) == (16, 8, 8)
    assert [(w.start, w.count, w.sample) for w in engine.step().work] == [(16, 6, True)]


def test_a_prefix_of_the_whole_prompt_leaves_a_token_to_compute():
    engine = Engine(blocks=20, chunk=100, running=4)
    sequence = engine.submit([5] * 8, 1, role=Role.PREFILL, held=8)
    (fetch,) = engine.step().fetches
    assert len(fetch.keys) == 1
    engine.scheduler.fetch_stopped(engine.fetching.pop(sequence.serial), 1)
    assert [(w.start, w.count) for w in engine.step().work] == [(4, 4)]


def test_a_prefix_is_asked_for_once_and_what_does_not_come_is_computed():
    engine = Engine(blocks=20, chunk=100, running=4)
    sequence = engine.submit([5] * 22, 1, role=Role.PREFILL, held=20)
    assert engine.step().fetches
    engine.pool.seal(sequence.blocks[2], sequence.chain.keys[2])  # one after the hole
    engine.scheduler.fetch_stopped(engine.fetching.pop(sequence.serial), 1)
    plan = engine.step()
    assert not plan.fetches
    assert [(w.start, w.end) for w in plan.work] == [(4, 22)]
    engine.check()


@pytest.mark.parametrize(("held", "patience"), [(8, 1.0), (11, 1.0), (20, None)])
def test_a_prefix_that_is_here_or_not_worth_it_is_not_fetched(held, patience):
    engine = Engine(blocks=20, chunk=100, running=4)
    engine.submit([5] * 8, 1)
    engine.step()
    engine.patience = patience
    engine.submit([5] * 22, 1, role=Role.PREFILL, held=held)
    plan = engine.step()
    assert not plan.fetches
    assert [(w.start, w.end) for w in plan.work] == [(8, 22)]


def test_what_the_table_does_not_have_is_refused():
    with pytest.raises(ValueError, match="admit makes no sense"):
        after(Phase.ENDED, Event.ADMIT)
    with pytest.raises(OutOfBlocksError):
        Pool(2).allocate(3)
