"""The contract of engines on a group of two: what a leader passes on is what an engine does."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engine.api import FirstTokens, Hold, KvEvents, KvPrefix, Request
from services.engine.group.keys import GroupKeys
from services.engine.group.task import Task
from services.runtime.errors import EngineFailedError, InvalidRequestError
from services.runtime.settings import EngineSettings, KvSettings, ModelSettings
from tests.contract import test_engine
from tests.contract.group_rig import Group
from tests.contract.test_engine import (
    BLOCK,
    CHUNK,
    GREEDY,
    SAMPLED,
    WAIT,
    Worker,
    eventually,
    prompt,
)

RANKS = 2


@pytest.fixture
async def new(request):
    """new(**engine settings) -> a Worker that is up, whose engine is a group."""
    workers = []

    async def make(kv: dict | None = None, **settings) -> Worker:
        values = {"block_tokens": BLOCK, "chunk_tokens": CHUNK, "kv_blocks": 64, "threads": 1}
        engine = EngineSettings(kind="scripted", ranks=RANKS, **(values | settings))
        group = Group(
            Task(ModelSettings(name="tiny"), engine, KvSettings(layers_per_piece=2, **(kv or {})))
        )
        worker = Worker(group)
        await worker.start()
        workers.append(worker)
        return worker

    make.kind = "group"
    yield make
    for worker in workers:
        await worker.close()


# What a leader must not change, taken from the suite that engines share. Left out: what asks a
# leader for figures before its ranks could have told them, and what takes long.
_OTHERWISE = {
    "test_a_request_lives_and_leaves_nothing",
    "test_a_rank_that_is_not_there_takes_no_request",
    "test_cancel_a_decode_that_waits_for_its_first_token",
    "test_kv_events_add_up_to_the_snapshot",
    "test_memory_stays_flat",
    "test_a_start_that_fails_lets_the_folder_go",
}
globals().update({
    name: test
    for name, test in vars(test_engine).items()
    if name.startswith("test_") and name not in _OTHERWISE
})  # fmt: skip


async def test_requests_live_on_their_ranks_and_leave_nothing(new):
    worker = await new()
    info = worker.engine.info
    assert (info.dp_ranks, info.total_blocks, info.max_running) == (RANKS, 128, 64)
    requests = [Request(f"r{n}", prompt(20 + n, n), SAMPLED, dp_rank=n % RANKS) for n in range(6)]
    for request in requests:
        worker.engine.decode(request, None)
    # Counted before any rank has said so.
    ranks = worker.engine.stats().ranks
    assert [(r.running + r.waiting, r.queued_tokens) for r in ranks] == [(3, 66), (3, 69)]
    found = {r.request_id: await worker.tokens(r.request_id) for r in requests}
    assert worker.engine.stats().finished == 6
    await worker.settled()
    # Blocks stay where they were computed, and any rank gives the same tokens.
    for request in requests:
        moved = dataclasses.replace(request, request_id=f"{request.request_id}b")
        for rank in (request.dp_rank, 1 - request.dp_rank):
            again = dataclasses.replace(moved, request_id=f"{moved.request_id}{rank}", dp_rank=rank)
            worker.engine.decode(again, None)
            assert await worker.tokens(again.request_id) == found[request.request_id]
            cached = worker.outputs[again.request_id][0].kv.cached_tokens
            whole = (len(request.prompt_token_ids) - 1) // BLOCK * BLOCK
            assert cached == (whole if rank == request.dp_rank else 0)
    with pytest.raises(InvalidRequestError, match="dp_rank"):
        worker.engine.decode(Request("none", prompt(4), GREEDY, dp_rank=RANKS), None)
    await worker.settled()


async def test_leases_and_blocks_are_found_at_the_rank_that_has_them(new):
    source, sink = await new(), await new()
    ids = prompt(29)
    expected = await source.generate("reference", ids, SAMPLED)
    # By the lease's id, which the leader gave to a rank.
    request = Request("a", ids, SAMPLED, dp_rank=1)
    sink.engine.decode(request, source.source("a"))
    source.engine.prefill(request, Hold(600))
    first = await source.first("a")
    sink.engine.proceed("a", FirstTokens(first.token_ids, first.handle))
    assert [*first.token_ids, *await sink.tokens("a")] == expected
    assert next(o.kv for o in sink.outputs["a"] if o.kv).blocks == 4
    # By keys: a lease that nobody knows, for blocks that rank 1 alone has.
    other = prompt(29, 5)
    source.engine.decode(Request("b", other, SAMPLED, dp_rank=1), None)
    expected = await source.tokens("b")
    await eventually(lambda: set(source.keys(other)) <= told(source.engine))
    sink.engine.decode(Request("c", other, SAMPLED), None, KvPrefix("s", source.address, 24))
    assert await sink.tokens("c") == expected
    report = sink.outputs["c"][0].kv.prefix
    assert report.tokens == 24, report
    await source.settled()
    await sink.settled()


async def test_a_fetch_that_comes_before_its_prompt_finds_the_rank(new):
    source, sink = await new(), await new()
    ids = prompt(29)
    expected = await source.generate("reference", ids, SAMPLED)
    leases = source.engine._leases
    # The reference's blocks are at rank 0, where the fetch would wait in vain for the rest.
    sink.engine.decode(Request("a", ids, SAMPLED), source.source("a"))
    for name in ("gone", "cancelled"):
        sink.engine.decode(Request(name, ids, SAMPLED), source.source(name))
    await eventually(lambda: set(leases.awaited) == {"a", "gone", "cancelled"})
    sink.engine.cancel("gone")
    await eventually(lambda: set(leases.awaited) == {"a", "cancelled"})
    source.engine.cancel("cancelled")
    await eventually(lambda: set(leases.awaited) == {"a"})
    sink.engine.cancel("cancelled")
    source.engine.prefill(Request("a", ids, SAMPLED, dp_rank=1), Hold(600))
    first = await source.first("a")
    sink.engine.proceed("a", FirstTokens(first.token_ids, first.handle))
    assert [*first.token_ids, *await sink.tokens("a")] == expected
    assert next(o.kv for o in sink.outputs["a"] if o.kv).blocks == 4
    assert not leases.awaited
    await source.settled()
    await sink.settled()


def told(group: Group) -> set[bytes]:
    """What a new reader of its KV events is told."""
    reader = group._keys.begin()
    group._keys.end(reader)
    return set(group._keys.read(reader).stored)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.sampled_from(["stored", "lower", "removed", "snapshot", "read"]),
            st.integers(0, 4),
        ),
        max_size=60,
    )
)
def test_keys_of_ranks_add_up(changes):
    keys = GroupKeys(3)
    reader = keys.begin()
    pools, lowers = [set() for _ in range(3)], [set() for _ in range(3)]
    seen: dict[bytes, str] = {}
    for rank, what, number in [*changes, (0, "read", 0)]:
        key, pool, lower = bytes([number]), pools[rank], lowers[rank]
        if what == "read":
            events = keys.read(reader)
            for kind in ("stored", "lower", "removed") if events else ():
                for told_key in getattr(events, kind):
                    seen[told_key] = kind
            continue
        if what == "snapshot":
            pool.clear(), lower.clear()
            keys.take(rank, KvEvents(stored=(key,), snapshot=True))
            pool.add(key)
            continue
        pool.discard(key), lower.discard(key)
        if what != "removed":
            (pool if what == "stored" else lower).add(key)
        keys.take(rank, KvEvents(**{what: (key,)}))
    have = {key for pool in pools for key in pool}
    below = {key for lower in lowers for key in lower} - have
    assert {k for k, kind in seen.items() if kind == "stored"} == have
    assert {k for k, kind in seen.items() if kind == "lower"} == below
    for number in range(5):
        best = keys.holder([bytes([number])])
        held = [bytes([number]) in pools[r] | lowers[r] for r in range(3)]
        assert best == (held.index(True) if any(held) else None)


async def test_a_rank_that_ends_fails_every_request_and_the_engine(new):
    worker = await new(scripted_step_seconds=0.01)
    long = dataclasses.replace(GREEDY, max_tokens=400)
    for n in range(2):
        worker.engine.decode(Request(f"r{n}", prompt(9), long, dp_rank=n), None)
    await worker.until(lambda: len(worker.outputs) == 2)
    worker.engine.launch.tasks[1].cancel()
    for n in range(2):
        outputs = await worker.ended(f"r{n}")
        assert outputs[-1].error.reason == "WORKER_LOST"
        assert "rank 1 of 2 is lost" in outputs[-1].error.message
    await asyncio.wait_for(worker._reading, WAIT)  # outputs() has ended
    with pytest.raises(EngineFailedError, match="rank 1 of 2"):
        worker.engine.decode(Request("late", prompt(9), GREEDY), None)


async def test_a_rank_that_says_nothing_is_lost(new):
    """One that is stopped, say: of which nothing ends."""
    worker = await new(scripted_step_seconds=0.01, rank_silence_seconds=3)
    long = dataclasses.replace(GREEDY, max_tokens=400)
    worker.engine.decode(Request("r", prompt(9), long), None)
    await worker.until(lambda: worker.outputs)
    for rank in worker.engine.launch.ranks:
        rank._say = lambda message: None
    outputs = await worker.ended("r")
    assert outputs[-1].error.reason == "WORKER_LOST"
    assert "it has said nothing for 3 s (engine.rank_silence_seconds)" in outputs[-1].error.message
    await asyncio.wait_for(worker._reading, WAIT)


async def test_a_load_whose_caller_is_gone_is_known_to_the_leader(new, tmp_path):
    """Ranks can't be told not to: else they would hold what the leader has never heard of."""
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1}')
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    worker = await new(adapter_folder=str(tmp_path))
    loading = asyncio.create_task(worker.engine.load_adapter("a", ""))
    await asyncio.sleep(0)  # It begins, and waits for its ranks.
    assert worker.engine._loading
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    await eventually(lambda: worker.engine.adapters())
    (adapter,) = worker.engine.stats().adapters
    worker.engine.decode(Request("r", prompt(9), GREEDY, adapter=adapter, dp_rank=1), None)
    assert len(await worker.tokens("r")) == 12
