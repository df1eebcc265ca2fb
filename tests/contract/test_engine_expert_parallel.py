"""A group of two whose engines share the experts of one tiny DeepSeek, drafts included."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest

from services.engine.api import ExpertMap, ExpertMove, FirstTokens, Hold, Request
from services.engine.build import build
from services.engine.group.task import Task
from services.runtime.errors import InvalidRequestError
from services.runtime.settings import EngineSettings, KvSettings, ModelSettings
from tests.contract.group_rig import Group
from tests.contract.test_engine import GREEDY, PENALIZED, SAMPLED, Worker, eventually, prompt
from tests.unit.engine_torch import torch_deepseek

RANKS = 2
BLOCK = 16
ENGINE = {"kind": "torch", "block_tokens": BLOCK, "chunk_tokens": 32, "kv_blocks": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = torch_deepseek.write(
        tmp_path_factory.mktemp("deepseek"), eos_token_id=2, bos_token_id=1
    )
    (folder / "tokenizer.json").write_text("{}")
    return ModelSettings(name="tiny", path=str(folder))


@pytest.fixture
async def group(model):
    engine = EngineSettings(**ENGINE, ranks=RANKS, threads=RANKS, redundant_experts=2)
    worker = Worker(Group(Task(model, engine, KvSettings())))
    await worker.start()
    yield worker
    await worker.close()


@pytest.fixture
async def alone(model):
    kv = KvSettings(recompute_max_tokens=0)
    worker = Worker(build(model, EngineSettings(**ENGINE, threads=1), kv, "127.0.0.1"))
    await worker.start()
    yield worker
    await worker.close()


async def test_tokens_are_those_of_one_engine_while_experts_move(group, alone):
    engine = group.engine
    assert engine.info.numerics == alone.engine.info.numerics
    shape = engine.info.experts
    assert (shape.layers, shape.logical, shape.physical, shape.gpus) == (3, 8, 10, RANKS)
    samplings = (GREEDY, SAMPLED, PENALIZED)
    requests = [
        Request(f"r{n}", prompt(5 + 11 * n, n), samplings[n % 3], dp_rank=n // 3) for n in range(6)
    ]
    expected = {
        r.request_id: await alone.generate(r.request_id, r.prompt_token_ids, r.sampling)
        for r in requests
    }
    # One rank alone first: the other steps along without rows.
    found = {}
    for request in (requests[0], requests[3]):
        engine.decode(request, None)
        found[request.request_id] = await group.tokens(request.request_id)
    for request in requests:
        if request.request_id not in found:
            engine.decode(request, None)
    # Every place of every layer gets another expert, while they run.
    before = np.array(engine.stats().expert_map.physical_to_logical).reshape(3, 10)
    after = np.roll(before, 3, axis=1)
    moves = [
        ExpertMove(layer, int(after[layer, to]), (to - 3) % 10, to)
        for layer in range(3)
        for to in range(10)
    ]
    plan = ExpertMap(tuple(after.ravel().tolist()), 4)
    engine.update_experts(plan, moves)
    with pytest.raises(InvalidRequestError, match="plan 4 is still being carried out"):
        engine.update_experts(ExpertMap(plan.physical_to_logical, 5), [])
    for request in requests:
        found[request.request_id] = await group.tokens(request.request_id)
    assert found == expected
    await eventually(lambda: engine.stats().expert_map == plan)
    # Idle ranks are woken for a plan, too; and go on to give the same tokens.
    engine.update_experts(ExpertMap(tuple(before.ravel().tolist()), 5), _back(moves, before))
    await eventually(lambda: engine.stats().expert_map.plan == 5)
    engine.decode(Request("again", requests[5].prompt_token_ids, requests[5].sampling), None)
    assert await group.tokens("again") == expected["r5"]
    await eventually(lambda: sum(engine.stats().expert_tokens) > 0)
    assert engine.stats().draft_tokens > 0
    await group.settled()


def _back(moves: list[ExpertMove], before: np.ndarray) -> list[ExpertMove]:
    return [
        ExpertMove(m.layer, int(before[m.layer, m.from_place]), m.to_place, m.from_place)
        for m in moves
    ]


async def test_prompts_of_another_worker_are_decoded_on_any_rank(group, alone):
    """Its blocks hold the draft layer's KV, too; nothing is computed again."""
    requests = [Request(f"h{n}", prompt(40 + n, n), SAMPLED, dp_rank=n % RANKS) for n in range(4)]
    expected = [
        await alone.generate(f"{r.request_id}x", r.prompt_token_ids, SAMPLED) for r in requests
    ]

    async def hand_off(request: Request) -> list[int]:
        group.engine.decode(request, alone.source(request.request_id))
        alone.engine.prefill(dataclasses.replace(request, dp_rank=0), Hold(600))
        first = await alone.first(request.request_id)
        group.engine.proceed(request.request_id, FirstTokens(first.token_ids, first.handle))
        return [*first.token_ids, *await group.tokens(request.request_id)]

    assert await asyncio.gather(*map(hand_off, requests)) == expected
    reports = [next(o.kv for o in group.outputs[r.request_id] if o.kv) for r in requests]
    assert [(r.blocks, r.computed_tokens) for r in reports] == [(3, 0)] * 4
    await group.settled()
    await alone.settled()


async def test_one_process_tells_how_its_experts_are_used(alone):
    engine, ids = alone.engine, prompt(21)
    shape, placed = engine.info.experts, engine.stats().expert_map
    assert (shape.layers, shape.logical, shape.physical, shape.gpus) == (3, 8, 8, 1)
    assert placed == ExpertMap(tuple(range(8)) * 3)
    assert sum(engine.stats().expert_tokens) == 0
    await alone.generate("r", ids, GREEDY)
    tokens = np.array(engine.stats().expert_tokens).reshape(3, 8)
    rows, choices = len(ids) + 11, torch_deepseek.TINY["num_experts_per_tok"]
    assert (tokens.sum(1)[:2] >= rows * choices).all()
    swapped = (1, 0, *range(2, 8), *range(8), *range(8))
    moves = [ExpertMove(0, 1, 1, 0), ExpertMove(0, 0, 0, 1)]
    with pytest.raises(InvalidRequestError, match="in one process"):
        engine.update_experts(ExpertMap(swapped, 1), moves)
    assert engine.stats().expert_map == placed
