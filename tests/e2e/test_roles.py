"""Workers change roles under load, and nobody who reads a stream notices."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
from collections import Counter

from tandem.coordinator.v1 import coordinator_pb2 as pb
from tests.e2e.world import SCRIPTED, Cluster, eventually, prompt, running

PREFILL, DECODE = pb.WORKER_ROLE_PREFILL, pb.WORKER_ROLE_DECODE
SETTINGS = SCRIPTED | {
    # 1,600 prompt tokens a second, and 5 requests at once.
    "engine.scripted_step_seconds": "0.02",
    "engine.chunk_tokens": "32",
    "engine.max_running": "4",
    "coordinator.local_prefill_tokens": "0",
    "coordinator.rebalance_seconds": "0.5",
    "worker.can_be": "prefill,decode",
    "worker.role_min_seconds": "0.5",
}
LONG = 220
STREAMS = 3


def long_request(number: int):
    sampled = {"temperature": 0.9, "top_p": 0.95, "seed": number}
    return prompt(*range(10 + number, 31 + number), max_tokens=LONG, ignore_eos=True, **sampled)


async def roles(cluster: Cluster) -> Counter:
    return Counter(w.info.role for w in (await cluster.status()).workers)


@contextlib.asynccontextmanager
async def load(cluster: Cluster, at_once: int, tokens: int, max_tokens: int):
    """So many requests at once, one after the other, with prompts that nobody has seen."""
    numbers = itertools.count(1)

    async def ask_on() -> None:
        while True:
            first = next(numbers)
            ids = ((first * 7919 + i * i) % 30_000 + 10 for i in range(tokens))
            answer = await cluster.ask(prompt(*ids, max_tokens=max_tokens, ignore_eos=True))
            assert len(answer.tokens) == max_tokens

    async with asyncio.TaskGroup() as group:
        asking = [group.create_task(ask_on()) for _ in range(at_once)]
        yield
        for task in asking:
            task.cancel()


async def test_a_decode_worker_becomes_a_prefill_worker_and_one_comes_back():
    async with running(1, 3, SETTINGS) as cluster:
        await cluster.workers_up(4)
        requests = [long_request(i) for i in range(STREAMS)]
        undisturbed = await asyncio.gather(*(cluster.ask(r) for r in requests))
        assert await roles(cluster) == {PREFILL: 1, DECODE: 3}

        async def has(prefill: int) -> bool:
            return (await roles(cluster))[PREFILL] == prefill

        streams = [asyncio.create_task(cluster.ask(r)) for r in requests]
        async with load(cluster, at_once=4, tokens=1000, max_tokens=4):
            await eventually(lambda: has(2), why="prompts wait")
        assert not all(s.done() for s in streams)
        async with load(cluster, at_once=12, tokens=8, max_tokens=100):
            await eventually(lambda: has(1), why="batches are full")
        answers = await asyncio.gather(*streams)
        for answer, expected in zip(answers, undisturbed, strict=True):
            assert answer.tokens == expected.tokens
            assert answer.text == expected.text
        # The one whose worker changed moved; none was ever without a worker.
        failures = [a.failure for answer in answers for a in answer.last.route.attempts]
        assert set(failures) == {"", "DRAINING"}
        await cluster.nothing_held()
        assert sum((await roles(cluster)).values()) == 4


async def test_workers_that_are_both_prefill_for_each_other_and_one_alone_for_itself():
    settings = SCRIPTED | {"coordinator.local_prefill_tokens": "0"}
    request = prompt(*range(10, 110), max_tokens=20, ignore_eos=True, temperature=0.0)
    async with running(0, 0, settings, both=2) as cluster:
        await cluster.workers_up(2)
        together = await cluster.ask(request)
        (attempt,) = together.last.route.attempts
        assert {attempt.prefill_worker[:6], attempt.decode_worker[:6]} == {"both-0", "both-1"}
        assert attempt.kv.blocks == 25
        cluster.local.kill("both-0", signal.SIGTERM)
        await cluster.workers_up(1)
        alone = await cluster.ask(request)
        (attempt,) = alone.last.route.attempts
        assert (attempt.prefill_worker, attempt.decode_worker[:6]) == ("", "both-1")
        assert alone.tokens == together.tokens
        await cluster.nothing_held()
