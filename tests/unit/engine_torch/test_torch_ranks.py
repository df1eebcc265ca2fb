"""Experts shared by ranks: the bits of one process, wherever replicas are, and while they move.

Ranks are threads here, each with a model and a mesh of its own, over real connections.
"""

from __future__ import annotations

import concurrent.futures

import numpy as np
import pytest

from services.engine.group.part import Part
from services.engine.torch.model import Batch, TorchModel
from services.engine.torch.parallel.share import ExpertShare, share_of
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
            "127.0.0.1",
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
