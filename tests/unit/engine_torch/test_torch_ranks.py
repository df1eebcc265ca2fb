"""Experts shared by ranks: the bits of one process, wherever replicas are, and while they move.

Ranks are threads here, each with a model, a mesh and an address of its own, as on several hosts.
"""

from __future__ import annotations

import concurrent.futures
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engine.api import ExpertMap, ExpertMove, ExpertShape
from services.engine.experts import check_plan
from services.engine.group.part import Part
from services.engine.stepped.rounds import Round
from services.engine.torch.model import Batch, TorchModel
from services.engine.torch.parallel.exchange import MOST_ROOM, REMEMBERED, Room
from services.engine.torch.parallel.placement import Replicas, by_layer, first_map, places_of
from services.engine.torch.parallel.share import ExpertShare, share_of
from services.runtime.load import SettingsError
from services.runtime.settings import EngineSettings
from tests.unit.engine_torch import torch_deepseek

WAIT = 60
BLOCK = 16


class Rank:
    """One rank: a model with its share of the experts. Runs on the thread that made it."""

    def __init__(self, ranks: Ranks, number: int, folder, settings: EngineSettings) -> None:
        part = Part(
            number,
            ranks.count,
            f"127.0.0.{number + 1}",
            ranks.address.set_result,
            lambda: ranks.address.result(WAIT),
            ranks.call,
        )
        share = share_of(part, folder, settings)
        assert isinstance(share, ExpertShare)
        self.model = TorchModel.load(
            folder,
            dtype=settings.dtype,
            block_tokens=BLOCK,
            threads=1,
            draft=settings.draft_tokens > 0,
            places=share.places,
            compute=share.compute,
        )
        self.experts, self.rounds = share.experts, share.rounds
        self.experts.counts = lambda: self.model.expert_tokens


class Ranks:
    """A group in this process; do() runs something on every rank at once."""

    def __init__(self, count: int, folder, **settings) -> None:
        self.count = count
        self.address: concurrent.futures.Future[str] = concurrent.futures.Future()
        self.calls: list[int] = []
        self._threads = [concurrent.futures.ThreadPoolExecutor(1) for _ in range(count)]
        self._ranks: list[Rank] = []
        engine = EngineSettings(threads=1, **settings)
        self._ranks = self._all(lambda n: Rank(self, n, folder, engine))

    def call(self, number: int) -> None:
        self.calls.append(number)
        for rank in self._ranks:
            rank.rounds.called(number)

    def _all(self, work):
        tasks = [t.submit(work, n) for n, t in enumerate(self._threads)]
        return [t.result(WAIT) for t in tasks]

    def do(self, work):
        """work(rank, number) on each; what they return."""
        return self._all(lambda n: work(self._ranks[n], n))

    def __getitem__(self, number: int) -> Rank:
        return self._ranks[number]

    def close(self) -> None:
        for thread in self._threads:
            thread.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return torch_deepseek.write(tmp_path_factory.mktemp("deepseek"))


@pytest.fixture(scope="module")
def alone(folder):
    return TorchModel.load(folder, block_tokens=BLOCK, threads=1, draft=True)


@pytest.fixture(scope="module")
def group(folder):
    """Makes groups, each once."""
    made = {}

    def get(count: int, redundant: int = 0) -> Ranks:
        if (count, redundant) not in made:
            made[count, redundant] = Ranks(count, folder, redundant_experts=redundant)
        return made[count, redundant]

    yield get
    for ranks in made.values():
        ranks.close()


NOTHING = Batch(
    token_ids=np.zeros(0, np.int32),
    positions=np.zeros(0, np.int32),
    query_starts=np.zeros(1, np.int32),
    block_tables=np.zeros((0, 0), np.int32),
    logit_rows=np.zeros(0, np.int32),
)


def prompt(length: int, seed: int) -> Batch:
    """A prompt's only chunk, all of whose logits are wanted."""
    random = np.random.default_rng(seed)
    places = np.arange(length, dtype=np.int32)
    return Batch(
        token_ids=random.integers(0, 320, length).astype(np.int32),
        positions=places,
        query_starts=np.array([0, length], np.int32),
        block_tables=np.arange(-(-length // BLOCK), dtype=np.int32)[None],
        logit_rows=places,
    )


def run(model: TorchModel, batch: Batch) -> np.ndarray:
    model.bind(np.zeros((16, model.layout.block_bytes), np.uint8))
    return model.forward(batch)


@pytest.mark.parametrize(("ranks", "redundant"), [(1, 0), (2, 0), (2, 2), (4, 0), (4, 8)])
def test_bits_are_those_of_one_process(group, alone, ranks, redundant):
    them = group(ranks, redundant)
    assert {r.model.numerics for r in (them[n] for n in range(ranks))} == {alone.numerics}
    # Uneven lengths: some ranks have no rows, one more than a message has room for.
    lengths = [150, 0, 1, 7][:ranks] if ranks > 1 else [150]
    batches = [prompt(n, seed) if n else NOTHING for seed, n in enumerate(lengths)]
    for _ in range(2):
        found = them.do(lambda rank, n: run(rank.model, batches[n]))
        for batch, logits in zip(batches, found, strict=True):
            if len(batch.token_ids):
                assert np.array_equal(logits, run(alone, batch))
            else:
                assert logits.shape == (0, 320)


def test_one_row_goes_where_its_experts_are(group, alone):
    """Ranks that no row comes to apply experts to none."""
    them = group(4)
    batch = prompt(1, 3)
    found = them.do(lambda rank, n: run(rank.model, batch if n == 2 else NOTHING))
    assert np.array_equal(found[2], run(alone, batch))


def test_tokens_are_counted_once_where_they_come_from(group, alone):
    them = group(2)
    before = [np.array(them[n].experts.tokens()) for n in range(2)]
    was = alone.expert_tokens.copy()
    batch = prompt(20, 5)
    them.do(lambda rank, n: run(rank.model, batch if n else NOTHING))
    run(alone, batch)
    counted = [np.array(them[n].experts.tokens()) - before[n] for n in range(2)]
    assert not counted[0].any()
    assert np.array_equal(counted[1], (alone.expert_tokens - was).ravel())


# Moves


def shuffled(shape: ExpertShape, seed: int, number: int, now: ExpertMap):
    """A plan that puts experts anywhere, each at least once, and the moves that lead there."""
    random = np.random.default_rng(seed)
    before = np.array(now.physical_to_logical).reshape(shape.layers, shape.physical)
    spare = random.integers(0, shape.logical, (shape.layers, shape.physical - shape.logical))
    after = np.concatenate([np.tile(np.arange(shape.logical), (shape.layers, 1)), spare], axis=1)
    after = random.permuted(after, axis=1)
    moves = [
        ExpertMove(layer, int(after[layer, to]), int(random.choice(sources)), to)
        for layer in range(shape.layers)
        for to in range(shape.physical)
        if after[layer, to] != before[layer, to]
        for sources in [np.flatnonzero(before[layer] == after[layer, to])]
    ]
    return ExpertMap(tuple(after.ravel().tolist()), number), moves


def meet(rank, n, **said):
    return rank.rounds.meet(**{"work": False, "draft_calls": 0, "leaving": False} | said)


def test_experts_move_between_rounds_and_change_no_bit(group, alone, monkeypatch):
    them = group(4, 8)
    monkeypatch.setattr("services.engine.torch.parallel.experts.BYTES_BETWEEN_STEPS", 1)
    batch = prompt(90, 1)
    expected = run(alone, batch)
    shape = them[0].experts.shape
    assert (shape.layers, shape.logical, shape.physical, shape.gpus) == (3, 8, 16, 4)
    for number in (1, 2):
        start = them[0].experts.map
        plan, moves = shuffled(shape, number, number, start)
        check_plan(shape, start, plan, moves)
        # Nothing moves before the last rank knows of it.
        for n in range(3):
            them[n].experts.move(plan, moves)
        them.do(meet)
        assert {them[n].experts.map for n in range(4)} == {start}
        them[3].experts.move(plan, moves)
        rounds = 0
        while any(them[n].experts.waiting for n in range(4)):
            rounds += 1
            them.do(meet)
            # A layer at a time, of all ranks at once; each step finds what it looks for.
            assert len({them[n].experts.map for n in range(4)}) == 1
            found = them.do(lambda rank, n: run(rank.model, batch))
            assert all(np.array_equal(logits, expected) for logits in found)
        assert rounds == shape.layers
        assert {them[n].experts.map for n in range(4)} == {plan}


@given(st.integers(0, 99), st.integers(1, 4), st.integers(2, 8), st.integers(0, 6))
def test_a_plan_in_parts_leads_where_the_plan_does(seed, layers, logical, spare):
    shape = ExpertShape(layers, logical, logical + spare, 1, 1, 1, 8)
    now = first_map(shape)
    plan, moves = shuffled(shape, seed, 5, now)
    parts = list(by_layer(shape, now, plan, moves))
    assert [m for _, part in parts for m in part] == moves
    assert parts[-1][0] == plan
    assert all(placed.plan == 0 for placed, _ in parts[:-1])
    held = np.array(now.physical_to_logical).reshape(layers, -1)
    for placed, part in parts:
        after = held.copy()
        for move in part:
            after[move.layer, move.to_place] = held[move.layer, move.from_place]
        held = after
        assert tuple(held.ravel()) == placed.physical_to_logical


@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 5), st.integers(0, 50))
def test_rows_take_replicas_in_turn(seed, ranks, each, turn):
    physical = ranks * max(each, -(-4 // ranks))
    shape = ExpertShape(1, 4, physical, 1, 1, ranks, 8)
    plan, _ = shuffled(shape, seed, 1, first_map(shape))
    placed = plan.physical_to_logical
    assert [p for rank in range(ranks) for p in places_of(shape, plan, rank)[0]] == list(placed)
    replicas = Replicas.of(placed, 4)
    ids = np.arange(4, dtype=np.int32)[None].repeat(12, axis=0)
    found = replicas.choose(ids, turn)
    assert (np.array(placed)[found] == ids).all()
    for expert in range(4):
        uses = np.bincount(found[:, expert], minlength=physical)[np.array(placed) == expert]
        assert uses.max() - uses.min() <= 1


# Rounds


def test_ranks_sleep_and_wake_together(group):
    them = group(2)
    them.calls.clear()
    first = them[0].rounds._next

    def wakes(rank, n):
        if n == 0:
            return meet(rank, n, work=True, draft_calls=2)
        assert called.wait(WAIT)
        return meet(rank, n, draft_calls=1)

    called = threading.Event()
    for n in range(2):
        them[n].rounds._want = lambda number: (them.call(number), called.set())
    rounds = them.do(wakes)
    assert set(rounds) == {Round(work=True, draft_calls=2, over=False)}
    assert them.calls == [first]  # only the one that had work asked
    # While somebody works nobody is called.
    assert set(them.do(lambda rank, n: meet(rank, n, work=n == 1))) == {Round(True, 0, False)}
    assert set(them.do(meet)) == {Round(work=False, draft_calls=0, over=False)}
    assert them.calls == [first]
    assert not them[0].rounds.due
    # Over only when all leave.
    assert {r.over for r in them.do(lambda rank, n: meet(rank, n, leaving=n == 0))} == {False}
    assert {r.over for r in them.do(lambda rank, n: meet(rank, n, leaving=True))} == {True}


@given(st.lists(st.integers(0, 400), min_size=1, max_size=300))
def test_room_follows_what_is_sent(sizes):
    room = Room()
    for i, size in enumerate(sizes):
        room.note(size)
        recent = max(1, *sizes[max(0, i + 1 - REMEMBERED) : i + 1])
        assert room.rows <= MOST_ROOM
        assert room.rows >= min(recent, MOST_ROOM)
        assert room.rows < 2 * recent or room.rows == 1


def test_what_can_not_be_shared_is_refused(folder):
    part = Part(0, 3, "127.0.0.1", print, str, print)
    with pytest.raises(SettingsError, match=r"engine\.redundant_experts: 8 experts .* 3 ranks"):
        share_of(part, folder, EngineSettings(redundant_experts=0))
    assert share_of(part, folder, EngineSettings(redundant_experts=1)) is not None
    with pytest.raises(SettingsError, match="only a model with experts"):
        share_of(None, folder, EngineSettings(redundant_experts=1))
