"""A worker whose model is shared by processes: the tokens of one process, in every way they come.

The processes are threads here, except where one of them is killed; what is between them is real.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import threading

import psutil
import pytest

from services.engine.api import FirstTokens, Hold, KvPrefix, Request
from services.engine.build import build
from services.engine.group.followers import Followers
from services.engine.group.task import Task
from services.engine.torch.engine import TorchEngine
from services.engine.torch.parallel import tensor_lead
from services.engine.torch.parallel.tensor_gather import TensorGather
from services.runtime.errors import WorkerLostError
from services.runtime.load import SettingsError
from services.runtime.settings import EngineSettings, KvSettings, ModelSettings, ServerSettings
from tests.contract.group_rig import Group, Tasks
from tests.contract.test_engine import GREEDY, SAMPLED, Worker, prompt
from tests.contract.test_engine_prefix import fetching  # noqa: F401 - a fixture
from tests.unit.engine_torch import torch_adapters, torch_deepseek, torch_models

KINDS = {"greedy": GREEDY, "sampled": dataclasses.replace(SAMPLED, logprobs=2)}
BLOCK = 16
WAIT = 60


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    torch_deepseek.write(root / "deepseek")
    torch_models.write(root / "llama")
    for name in ("deepseek", "llama"):
        (root / name / "tokenizer.json").write_text("{}")
    return root


@pytest.fixture
async def new(root):
    """new(family, ranks, **engine settings) -> a Worker that is up, of as many sharers."""
    workers = []

    async def make(family: str, ranks: int, kv: dict | None = None, **settings) -> Worker:
        values = {"block_tokens": BLOCK, "kv_blocks": 64, "threads": ranks, "draft_tokens": 2}
        model = ModelSettings(name="tiny", path=str(root / family))
        engine = EngineSettings(**(values | settings), tensor_parallel=ranks)
        given = KvSettings(**({"recompute_max_tokens": 0, "layers_per_piece": 2} | (kv or {})))
        if ranks == 1:
            made = build(model, engine, given, "127.0.0.1")
        else:
            task = Task(model, engine, given)
            followers = Followers(task, Tasks(), ServerSettings())
            own = task.of_rank(0).engine
            made = TorchEngine(model, own, given, host="127.0.0.1", followers=followers)
        workers.append(Worker(made))
        await workers[-1].start()
        return workers[-1]

    yield make
    for worker in workers:
        await worker.close()


async def handed_over(prefill: Worker, decode: Worker, request: Request, blocks: int) -> list[int]:
    name = request.request_id
    decode.engine.decode(request, prefill.source(name))
    prefill.engine.prefill(dataclasses.replace(request, dp_rank=0), Hold(600))
    first = await prefill.first(name)
    decode.engine.proceed(name, FirstTokens(first.token_ids, first.handle))
    tokens = [*first.token_ids, *await decode.tokens(name)]
    report = next(o.kv for o in decode.outputs[name] if o.kv)
    assert (report.blocks, report.computed_tokens) == (blocks, 0)
    return tokens


def mirrored(worker: Worker) -> int:
    """Bytes that followers were sent."""
    return worker.engine._lead.told_bytes


@pytest.mark.parametrize(
    ("family", "ranks", "kv_dtype"),
    [("deepseek", 2, "fp8_e4m3"), ("llama", 2, "bfloat16")],
)
async def test_same_tokens(new, family, ranks, kv_dtype):
    alone = await new(family, 1, kv_dtype=kv_dtype)
    shared = await new(family, ranks, kv_dtype=kv_dtype, chunk_tokens=7)
    assert shared.engine.info.numerics == alone.engine.info.numerics != ""
    assert shared.engine.info.layout == alone.engine.info.layout
    for number, (kind, sampling) in enumerate(KINDS.items()):
        ids = prompt(45, 2 * number)
        expected = await alone.generate(f"{kind}-alone", ids, sampling)
        assert await shared.generate(f"{kind}-whole", ids, sampling) == expected
        assert await shared.generate(f"{kind}-cached", ids, sampling) == expected
        logprobs = [
            [x for o in worker.outputs[name] for x in o.logprobs]
            for worker, name in (
                (alone, f"{kind}-alone"),
                (shared, f"{kind}-whole"),
                (shared, f"{kind}-cached"),
            )
        ]
        assert logprobs[0] == logprobs[1] == logprobs[2]
        # Prompts that nobody has: prefill there and decode here, and the other way round.
        other, third = prompt(45, 2 * number + 1), prompt(40, 9 + number)
        found = await handed_over(shared, alone, Request(f"{kind}-out", other, sampling), 3)
        assert await alone.generate(f"{kind}-other", other, sampling) == found
        back = await handed_over(alone, shared, Request(f"{kind}-in", third, sampling), 3)
        assert await shared.generate(f"{kind}-third", third, sampling) == back
        for cut in (1, len(found) // 2):
            rest = await shared.generate(f"{kind}-{cut}", other, sampling, found[:cut])
            assert found[:cut] + rest == found
    assert all(
        o.kv.cached_tokens == 32 for o in shared.outputs["greedy-cached"] if o.kv is not None
    )
    if family == "deepseek":
        assert shared.engine.stats().draft_tokens > 0
    for worker in (alone, shared):
        await worker.settled()


async def generate(worker: Worker, name: str, ids, prefix: KvPrefix | None = None) -> list[int]:
    worker.engine.decode(Request(name, tuple(ids), GREEDY), None, prefix)
    return await worker.tokens(name)


async def refilled(new, **settings) -> list[list[int]]:
    """Blocks of a small pool that hold one thing, then another that a peer had; as tokens."""
    peer = await new("deepseek", 1)
    shared = await new("deepseek", 2, kv_blocks=8, **settings)
    found = []
    for turn in range(4):
        ids = prompt(75, turn)
        expected = await generate(peer, f"peer-{turn}", ids)
        # What the pool held is evicted, and its blocks are filled with what a peer has.
        assert await generate(shared, f"fills-{turn}", prompt(90, 50 + turn))
        before = mirrored(shared)
        prefix = KvPrefix("peer", peer.address, 64)
        tokens = await generate(shared, f"fetched-{turn}", ids, prefix)
        report = next(o.kv for o in shared.outputs[f"fetched-{turn}"] if o.kv)
        assert report.prefix is not None
        assert report.prefix.tokens == 64, report.prefix.reason
        assert mirrored(shared) - before >= 4 * shared.engine.info.layout.block_bytes
        found.append([tokens, expected])
    return found


async def test_blocks_that_a_peer_filled_are_read_by_all(fetching, new):  # noqa: F811
    for tokens, expected in await refilled(new):
        assert tokens == expected


async def test_a_stale_mirror_would_be_seen(fetching, new, monkeypatch):  # noqa: F811
    """Followers that get rubbish for blocks' bytes, as if nobody had sent them: other tokens."""
    real = tensor_lead._receive

    def stale(line, pool, blocks) -> None:
        before = pool[blocks].copy()
        real(line, pool, blocks)
        pool[blocks] = before

    monkeypatch.setattr(tensor_lead, "_receive", stale)
    found = await refilled(new)
    assert any(tokens != expected for tokens, expected in found)


async def test_blocks_that_come_back_from_a_tier(new):
    shared = await new("deepseek", 2, kv={"host_tier_mib": 8}, kv_blocks=8)
    alone = await new("deepseek", 1)
    ids = prompt(75)
    expected = await generate(alone, "alone", ids)
    assert await generate(shared, "computed", ids) == expected
    for turn in range(3):
        await generate(shared, f"evicts-{turn}", prompt(90, 50 + turn))
    assert await generate(shared, "again", ids) == expected


async def test_adapters_are_taken_in_by_all(new, root):
    targets = ("q_a_proj", "kv_a_proj_with_mqa", "o_proj", "up_proj", "down_proj")
    for name, seed in (("a", 1), ("b", 2)):
        skip = (".experts.", "layers.3.")
        torch_adapters.write(root / name, root / "deepseek", targets, seed=seed, skip=skip)
    given = {"adapter_folder": str(root), "adapters": ("a=a",), "draft_tokens": 0}
    alone, shared = await new("deepseek", 1, **given), await new("deepseek", 2, **given)
    for worker in (alone, shared):
        await worker.engine.load_adapter("b", "b")
    ids = {"": ""} | {i.partition("@")[0]: i for i in shared.engine.stats().adapters}
    assert set(ids) == {"", "a", "b"}
    found = []
    for worker in (alone, shared):
        for name, adapter in ids.items():
            worker.engine.decode(Request(name, prompt(30), GREEDY, adapter=adapter), None)
        found.append({name: await worker.tokens(name) for name in ids})
    assert found[0] == found[1]
    assert len({tuple(tokens) for tokens in found[0].values()}) == 3
    shared.engine.unload_adapter("a")
    assert await generate(shared, "later", prompt(30, 4)) == await generate(
        alone, "later", prompt(30, 4)
    )


async def test_a_group_of_ranks_decodes_what_sharers_prefilled(new, root):
    shared, alone = await new("deepseek", 2), await new("deepseek", 1)
    model = ModelSettings(name="tiny", path=str(root / "deepseek"))
    engine = EngineSettings(
        block_tokens=BLOCK, kv_blocks=64, threads=2, draft_tokens=2, ranks=2, redundant_experts=2
    )
    kv = KvSettings(recompute_max_tokens=0, layers_per_piece=2)
    group = Worker(Group(Task(model, engine, kv)))
    await group.start()
    try:
        assert group.engine.info.numerics == shared.engine.info.numerics
        for number, (kind, sampling) in enumerate(KINDS.items()):
            request = Request(kind, prompt(45, number), sampling, dp_rank=number)
            found = await handed_over(shared, group, request, 3)
            assert await alone.generate(kind, prompt(45, number), sampling) == found
    finally:
        await group.close()


# Ends


def in_processes(root, ranks: int = 2, **settings):
    values = {"block_tokens": BLOCK, "kv_blocks": 64, "threads": ranks, "draft_tokens": 0}
    return build(
        ModelSettings(name="tiny", path=str(root / "llama")),
        EngineSettings(**(values | settings), tensor_parallel=ranks),
        KvSettings(),
        "127.0.0.1",
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_sharer_lost_in_mid_prefill(root, monkeypatch, how):
    before = set(psutil.Process().children())
    worker = Worker(in_processes(root, chunk_tokens=16))
    await worker.start()
    (sharer,) = set(psutil.Process().children()) - before
    real, calls = TensorGather.__call__, []

    def gather(self, *given):
        calls.append(1)
        if len(calls) == 15:  # In the second of many chunks, in the midst of a layer.
            worker.engine._followers._silence = 1.0  # Not before: this machine may be slow.
            os.kill(sharer.pid, how)
        return real(self, *given)

    monkeypatch.setattr(TensorGather, "__call__", gather)
    worker.engine.prefill(Request("r", prompt(400), GREEDY), Hold(600))
    (output,) = await worker.ended("r")
    assert output.error is not None
    assert output.error.reason == WorkerLostError.reason
    async with asyncio.timeout(WAIT):
        await worker._reading  # There are no more outputs: the worker's process ends.
    await worker.close()
    assert not sharer.is_running() or sharer.status() == psutil.STATUS_ZOMBIE
    assert not [t for t in threading.enumerate() if t.name == "engine-step"]


async def test_a_sharer_that_can_not_begin_is_said(root, monkeypatch):
    """Why it can't is the error; nothing is left of it."""
    before = set(psutil.Process().children())
    with pytest.raises(SettingsError, match="can't share 3 heads"):
        await in_processes(root, ranks=4).start()
    assert set(psutil.Process().children()) == before


async def test_a_sharer_that_dies_before_it_has_its_weights(root, monkeypatch):
    engine = in_processes(root)
    real = Followers.start

    async def start(self, lost) -> None:
        await real(self, lost)
        for process in self._launch._running.values():
            process.kill()

    monkeypatch.setattr(Followers, "start", start)
    with pytest.raises(WorkerLostError, match="rank 1 of 2 is lost"):
        await engine.start()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"ranks": 2}, r"engine\.tensor_parallel: not possible with engine\.ranks above 1"),
        ({"kind": "scripted"}, r"engine\.tensor_parallel: a scripted engine has no model"),
    ],
)
def test_what_can_not_be_is_refused(settings, why):
    with pytest.raises(SettingsError, match=why):
        build(
            ModelSettings(name="m"),
            EngineSettings(tensor_parallel=2, **settings),
            KvSettings(),
            "127.0.0.1",
        )
