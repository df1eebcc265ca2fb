"""Books of ranks that share a batch: each request is in those of its rank, and only there."""

from __future__ import annotations

import pytest

from kvtransfer.keys import KeyChain, salt
from services.engine.api import Request, Sampling
from services.engine.scripted.engine import ScriptedEngine
from services.engine.stepped.ranks import rank_stats
from services.engine.stepped.sequence import Role, Sequence
from services.runtime.settings import EngineSettings, KvSettings, ModelSettings

GREEDY = Sampling(temperature=0.0, max_tokens=50, ignore_eos=True)


def sequence(serial, rank, tokens, blocks=0, computed=0):
    request = Request(str(serial), tuple(range(3, 3 + tokens)), GREEDY, dp_rank=rank)
    made = Sequence.of(serial, request, Role.DECODE, KeyChain(salt("m", "l", ""), 4), None)
    made.blocks, made.computed = list(range(blocks)), computed
    return made


def test_each_sequence_counts_for_its_rank():
    admitted = [sequence(1, 0, 40, blocks=10, computed=40), sequence(2, 2, 8, blocks=2, computed=3)]
    waiting = [sequence(3, 2, 20), sequence(4, 1, 5)]
    ranks = rank_stats(3, 31, admitted, waiting, lambda s: s.context - s.computed)
    assert [r.running for r in ranks] == [1, 0, 1]
    assert [r.waiting for r in ranks] == [0, 1, 1]
    assert [r.free_blocks for r in ranks] == [0, 10, 8], "10 of 31 blocks are each one's"
    assert [r.kv_tokens for r in ranks] == [40, 0, 3]
    assert [r.queued_tokens for r in ranks] == [0, 5, 25]


@pytest.fixture
async def engine():
    settings = EngineSettings(
        kind="scripted",
        block_tokens=4,
        kv_blocks=64,
        scripted_dp_ranks=3,
        scripted_experts="2/8/12/4/2/4",
    )
    engine = ScriptedEngine(
        ModelSettings(name="m"), settings, KvSettings(transports=("tcp",)), host="127.0.0.1"
    )
    await engine.start()
    yield engine
    await engine.close()


async def test_a_request_is_in_its_ranks_books_from_the_start(engine):
    assert [r.free_blocks for r in engine.stats().ranks] == [21, 21, 21]
    prompt = tuple(range(3, 20))
    engine.decode(Request("r", prompt, GREEDY, dp_rank=1), None)
    stats = engine.stats()
    assert [r.running + r.waiting for r in stats.ranks] == [0, 1, 0]
    assert sum(r.waiting for r in stats.ranks) == stats.waiting
    async for step in engine.outputs():
        if step.outputs[-1].finish_reason is not None:
            break
    stats = engine.stats()
    assert [r.running + r.waiting + r.queued_tokens for r in stats.ranks] == [0, 0, 0]
    # The last token was not computed upon.
    layers = [sum(stats.expert_tokens[:8]), sum(stats.expert_tokens[8:])]
    assert layers == [len(prompt) + GREEDY.max_tokens - 1] * 2
    assert stats.expert_map.plan == 0
    assert engine.info.experts.physical == 12
