"""A decode worker drains under running streams: nobody who reads them notices."""

from __future__ import annotations

import asyncio
import itertools
import signal
import time

from tests.e2e.test_silence import SAMPLED, parts
from tests.e2e.world import SCRIPTED, Cluster, prompt, running

STEP = 0.02
SETTINGS = SCRIPTED | {
    "engine.scripted_step_seconds": str(STEP),
    "coordinator.local_prefill_tokens": "0",
    "server.drain_seconds": "30",
}
STREAMS = 6
TOKENS = 150


def request(number: int):
    more = SAMPLED | {"max_tokens": TOKENS, "min_tokens": TOKENS - 10, "seed": number}
    return prompt(*range(10 + number, 70 + number), **more)


async def stream(cluster: Cluster, number: int, started: asyncio.Event) -> tuple[list, list[float]]:
    """The messages, and when each came."""
    messages, times, count = [], [], 0
    async for message in cluster.stream(request(number), timeout=60):
        messages.append(message)
        times.append(time.monotonic())
        count += len(message.token_ids)
        if count >= 20:
            started.set()
    return messages, times


async def streams(cluster: Cluster, then=None) -> list[tuple[list, list[float]]]:
    started = [asyncio.Event() for _ in range(STREAMS)]
    running = [asyncio.create_task(stream(cluster, i, started[i])) for i in range(STREAMS)]
    for event in started:
        await event.wait()
    if then is not None:
        then()
    return await asyncio.gather(*running)


async def test_a_drained_worker_s_streams_go_on_without_a_gap():
    async with running(1, 2, SETTINGS) as cluster:
        undisturbed = await streams(cluster)

        def drain() -> None:
            cluster.local.kill("decode-0", signal.SIGTERM)

        found = await streams(cluster, drain)
        gaps: dict[bool, list[float]] = {True: [], False: []}
        for (messages, times), (expected, _) in zip(found, undisturbed, strict=True):
            assert parts(messages) == parts(expected)
            attempts = messages[-1].route.attempts
            assert attempts[-1].decode_worker.startswith("decode-1")
            moved = len(attempts) > 1
            if moved:
                assert [a.failure for a in attempts] == ["DRAINING", ""]
                assert attempts[1].kv.prefix.tokens > 0, "its KV came from the old worker"
            gaps[moved].append(max(b - a for a, b in itertools.pairwise(times)))
        # A second's worth of tokens would be missing if they had been placed again. What a busy
        # machine takes shows in the streams that stayed where they were.
        assert max(gaps[True]) < max(gaps[False]) + 0.6
        # It left as soon as they had moved, long before their last tokens.
        async with asyncio.timeout(20):
            while "decode-0" in cluster.local.pids:  # noqa: ASYNC110 - a process gives no event
                await asyncio.sleep(0.02)
        await cluster.nothing_held()
