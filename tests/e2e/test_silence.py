"""Workers that are stopped, not killed: nothing breaks, nothing answers, and streams go on soon."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time

from tests.e2e.world import SCRIPTED, Cluster, prompt, running

SETTINGS = SCRIPTED | {
    "engine.scripted_step_seconds": "0.02",
    "engine.chunk_tokens": "16",
    "coordinator.local_prefill_tokens": "0",
}
SOON = 15.0
"""Seconds: silence_seconds is 2, stall_seconds are 30, and the tests' machine is busy."""

SAMPLED = {
    "temperature": 0.9,
    "top_p": 0.95,
    "seed": 7,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.3,
    "min_tokens": 140,
    "logprobs": 3,
    "max_tokens": 150,
}


@contextlib.asynccontextmanager
async def stopped(cluster: Cluster, name: str):
    """A process that does nothing for a while."""
    cluster.local.kill(name, signal.SIGSTOP)
    try:
        yield
    finally:
        cluster.local.kill(name, signal.SIGCONT)


async def collect(cluster: Cluster, request, at: int, stop) -> tuple[list, float]:
    """A stream's messages; `stop` is awaited after `at` tokens. The longest wait from then on."""
    messages, count, last, longest = [], 0, None, 0.0
    async for message in cluster.stream(request, timeout=60):
        now = time.monotonic()
        messages.append(message)
        count += len(message.token_ids)
        if last is not None:
            longest = max(longest, now - last)
            last = now
        elif count >= at:
            await stop()
            last = time.monotonic()
    return messages, longest


def parts(messages) -> tuple:
    """All that a client is given of the generation, log-probabilities included."""
    return (
        [t for m in messages for t in m.token_ids],
        [(p.token_id, p.logprob, [(t.token_id, t.logprob) for t in p.top]) for m in messages
         for p in m.logprobs],
        "".join(m.text for m in messages),
    )  # fmt: skip


async def test_a_decode_worker_stopped_in_mid_stream():
    async with running(1, 2, SETTINGS) as cluster, contextlib.AsyncExitStack() as frozen:
        request = prompt(**SAMPLED)

        async def nothing() -> None:
            pass

        undisturbed, _ = await collect(cluster, request, 0, nothing)

        async def stop() -> None:
            await frozen.enter_async_context(stopped(cluster, await cluster.busy("decode")))

        messages, longest = await collect(cluster, request, 20, stop)
        assert parts(messages) == parts(undisturbed)
        first, second = messages[-1].route.attempts
        assert first.failure == "WORKER_SILENT"
        assert first.decode_worker != second.decode_worker
        assert 1.0 < longest < SOON


async def test_a_prefill_worker_stopped_while_it_computes():
    # 100 steps: two seconds, for it to say that it has a prompt.
    request = prompt(*range(10, 1610), max_tokens=10, seed=3, ignore_eos=True)
    async with running(2, 1, SETTINGS) as cluster:
        began = time.monotonic()
        answering = asyncio.create_task(cluster.ask(request))
        name = await cluster.busy("prefill")
        async with stopped(cluster, name):
            answer = await answering
        took = time.monotonic() - began
        attempts = answer.last.route.attempts
        assert [a.failure for a in attempts] == ["WORKER_SILENT", ""]
        assert cluster.worker(attempts[0].prefill_worker) == name
        assert took < SOON
        assert (await cluster.ask(request)).tokens == answer.tokens
        await cluster.nothing_held()
