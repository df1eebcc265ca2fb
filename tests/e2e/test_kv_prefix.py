"""A prompt's start comes from another worker that holds it, or is computed: the same tokens."""

from __future__ import annotations

import asyncio
import contextlib
import signal

import grpc
import numpy as np
import pytest

from services.engine.scripted.model import logits_of
from tandem.generation.v1 import generation_pb2
from tandem.kvtransfer.v1 import kvtransfer_pb2, kvtransfer_pb2_grpc
from tandem.prefill.v1 import prefill_pb2, prefill_pb2_grpc
from tests.e2e.world import SCRIPTED, Cluster, prompt, running

SETTINGS = SCRIPTED | {
    # Slow, so that fetching is quicker than computing on a busy machine, too.
    "engine.scripted_step_seconds": "0.03",
    "engine.chunk_tokens": "16",
    "engine.kv_blocks": "400",
    "coordinator.local_prefill_tokens": "0",
    "kv.lease_seconds": "60",
}
BLOCK = 4


def next_tokens(tokens, count: int) -> list[int]:
    """What the scripted model says, greedily, whoever computes which part of it."""
    known = list(tokens)
    for _ in range(count):
        known.append(int(np.argmax(logits_of(np.array(known, "<u4").tobytes()))))
    return known[len(tokens) :]


class Prefill:
    """A prefill worker, asked directly."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.name, self.address = name, cluster.local.address(name)
        self.channel = grpc.aio.insecure_channel(self.address)
        self.stub = prefill_pb2_grpc.PrefillServiceStub(self.channel)
        self.kv = kvtransfer_pb2_grpc.KvTransferServiceStub(self.channel)

    async def run(
        self, name: str, tokens, *, held_by: Prefill | None = None, held: int | None = None
    ) -> prefill_pb2.PrefillDone:
        """The answer, with the prompt's lease released again."""
        sampling = generation_pb2.SamplingParams(
            temperature=0, top_k=0, top_p=1, min_p=0, repetition_penalty=1, presence_penalty=0,
            frequency_penalty=0, max_tokens=8, min_tokens=0, seed=1,
        )  # fmt: skip
        request = prefill_pb2.PrefillRequest(
            request=generation_pb2.TokenRequest(
                request_id=name, prompt_token_ids=tokens, sampling=sampling
            )
        )
        if held_by is not None:
            request.prefix.worker_id = held_by.name
            request.prefix.address = held_by.address
            request.prefix.tokens = len(tokens) if held is None else held
        async for message in self.stub.Prefill(request, timeout=30):
            done = message.done
        assert list(done.token_ids) == next_tokens(tokens, 1)
        await self.kv.Release(kvtransfer_pb2.ReleaseRequest(lease_id=name), timeout=5)
        return done


@pytest.fixture
async def pair():
    async with running(2, 1, SETTINGS) as cluster:
        workers = [Prefill(cluster, f"prefill-{i}") for i in range(2)]
        # So that both know how fast they compute.
        await asyncio.gather(*(w.run(f"warm-{w.name}", range(1000, 1064)) for w in workers))
        try:
            yield cluster, *workers
        finally:
            for worker in workers:
                await worker.channel.close()


async def test_a_prefill_worker_takes_a_prefix_from_another_one(pair):
    cluster, one, other = pair
    tokens = list(range(10, 310))
    first = await one.run("a", tokens)
    assert not first.kv.HasField("prefix")
    done = await other.run("b", [*tokens, *range(500, 541)], held_by=one, held=len(tokens))
    kv = done.kv
    assert kv.prefix.worker_id == one.name
    assert kv.prefix.tokens == 300
    assert (kv.cached_tokens, kv.computed_tokens) == (0, 41)
    assert kv.blocks == 300 // BLOCK
    assert kv.transport == "shm"
    assert 0 < kv.prefix.fetch_seconds < kv.prefix.compute_seconds
    assert "by the prior" in kv.prefix.reason
    assert "tokens/s measured" in kv.prefix.reason
    # It is cached there now, and once a way was measured that is what counts.
    assert (await other.run("c", tokens)).kv.cached_tokens == 296
    await one.run("d", range(2000, 2300))
    again = (await other.run("e", range(2000, 2300), held_by=one)).kv
    assert again.prefix.tokens == 296
    assert "by this peer" in again.prefix.reason
    # A block of four tokens, which is not there: asked for only where that takes less than they do.
    small = (await other.run("f", range(2500, 2550), held_by=one, held=BLOCK)).kv
    assert (small.prefix.tokens, small.computed_tokens, small.transport) == (0, 50, "")
    unasked = small.prefix.fetch_seconds >= small.prefix.compute_seconds
    assert small.prefix.reason.endswith(": computed") == unasked
    assert small.lost.startswith("KV_SOURCE_LOST: ") != unasked
    await cluster.nothing_held()


async def test_a_prefix_that_was_evicted_meanwhile_is_computed(pair):
    cluster, one, other = pair
    tokens = list(range(10, 310))
    await one.run("a", tokens)
    for i in range(6):  # more than the pool has room for beside it
        await one.run(f"more-{i}", range(3000 + 300 * i, 3300 + 300 * i))
    kv = (await other.run("b", tokens, held_by=one)).kv
    assert (kv.prefix.tokens, kv.computed_tokens) == (0, 300)
    assert kv.lost.startswith("KV_SOURCE_LOST: ")
    assert "are not held" in kv.lost
    assert kv.seconds < kv.prefix.compute_seconds
    await cluster.nothing_held()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_holder_that_is_gone_costs_no_more_than_computing_again(pair, how):
    cluster, one, other = pair
    tokens = list(range(10, 310))
    await one.run("a", tokens)
    cluster.local.kill(one.name, how)
    try:
        kv = (await other.run("b", tokens, held_by=one)).kv
        assert (kv.prefix.tokens, kv.computed_tokens) == (0, 300)
        assert kv.lost.startswith("KV_SOURCE_LOST")
        assert kv.seconds < kv.prefix.compute_seconds + 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            cluster.local.kill(one.name, signal.SIGCONT)


async def test_a_holder_killed_among_many_fetches_costs_nobody_a_token(pair):
    cluster, one, other = pair
    prompts = [list(range(10 + 200 * i, 110 + 200 * i)) for i in range(14)]
    for i, tokens in enumerate(prompts):
        await one.run(f"a{i}", tokens)
    runs = [
        asyncio.create_task(other.run(f"b{i}", tokens, held_by=one))
        for i, tokens in enumerate(prompts)
    ]
    await runs[0]
    cluster.local.kill(one.name, signal.SIGKILL)
    for done in await asyncio.gather(*runs):
        assert done.kv.prefix.tokens + done.kv.computed_tokens == 100
    await cluster.workers_up(2)
    await cluster.nothing_held()


async def test_a_holder_is_found_by_the_coordinator():
    """The decode worker holds the conversation; its prefill worker is gone with what it had."""
    async with running(2, 1, SETTINGS, restart=False) as cluster:
        turn = prompt(*range(10, 210), temperature=0.0, max_tokens=40, ignore_eos=True)
        first = await cluster.ask(turn)
        assert first.tokens == next_tokens(range(10, 210), 40)
        used = cluster.worker(first.last.route.attempts[0].prefill_worker)
        cluster.local.kill(used, signal.SIGKILL)
        await cluster.workers_up(2)
        said = [*range(10, 210), *first.tokens, *range(700, 720)]
        following = prompt(*said, temperature=0.0, max_tokens=20, ignore_eos=True)
        answer = await cluster.ask(following)
        assert answer.tokens == next_tokens(said, 20)
        (attempt,) = answer.last.route.attempts
        assert cluster.worker(attempt.prefill_worker) != used
        prefix = attempt.prefill_kv.prefix
        assert prefix.worker_id == attempt.decode_worker
        # Prompt and answer but for its last token, in whole blocks.
        assert prefix.tokens == (200 + 39) // BLOCK * BLOCK
        assert answer.last.usage.cached_tokens == prefix.tokens
        assert any("may fetch them" in reason for reason in attempt.reasons)
        await cluster.nothing_held()
