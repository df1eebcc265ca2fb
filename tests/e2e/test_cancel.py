"""Clients that go away: nothing stays held, on either side, at any moment they choose."""

from __future__ import annotations

import asyncio

import grpc
import pytest
import pytest_asyncio

from tests.e2e.world import SCRIPTED, STEADY, Cluster, eventually, prompt, running

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def scripted():
    """One for all: each test ends with nothing held, so the next one finds none of it."""
    async with running(2, 2, STEADY) as cluster:
        yield cluster


@pytest.mark.parametrize("after", [0, 1, 3, 10])
async def test_cancel_after_some_tokens(scripted: Cluster, after):
    call = scripted.stream(prompt(max_tokens=200, ignore_eos=True))
    seen = 0
    while seen < after:
        seen += len((await call.read()).token_ids)
    call.cancel()
    await scripted.nothing_held()


async def test_clients_that_vanish_with_their_connection(scripted: Cluster):
    channel = grpc.aio.insecure_channel(scripted.local.address("frontend"))
    here = Cluster.__new__(Cluster)
    here.inference = type(scripted.inference)(channel)
    calls = [here.stream(prompt(*range(i, i + 30), max_tokens=200)) for i in range(1, 9)]
    await asyncio.gather(*(call.read() for call in calls))
    await channel.close()
    await scripted.nothing_held()


async def test_deadline_passes_in_mid_stream(scripted: Cluster):
    call = scripted.stream(prompt(max_tokens=2000, ignore_eos=True), timeout=0.7)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await scripted.nothing_held()


async def test_cancel_while_the_prompt_is_computed_and_blocks_move():
    settings = SCRIPTED | {
        "engine.scripted_step_seconds": "0.03",
        "engine.chunk_tokens": "8",
        "coordinator.local_prefill_tokens": "0",
    }
    async with running(1, 1, settings) as cluster:
        call = cluster.stream(prompt(*range(10, 1610), max_tokens=5))

        async def leased() -> bool:
            workers = (await cluster.status()).workers
            return any(w.stats.leases for w in workers)

        reading = asyncio.create_task(call.read())
        await eventually(leased)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await cluster.nothing_held()


async def test_a_storm_of_requests_and_cancellations(scripted: Cluster):
    async def one(i: int) -> int:
        call = scripted.stream(prompt(*range(i % 7, i % 7 + 40), max_tokens=20, seed=i))
        tokens = 0
        async for message in call:
            tokens += len(message.token_ids)
            if i % 3 == 0 and tokens >= i % 11:
                call.cancel()
                return -1
        return tokens

    async def guarded(i: int) -> int:
        try:
            return await one(i)
        except asyncio.CancelledError:
            return -1

    counts = await asyncio.gather(*(guarded(i) for i in range(60)))
    assert all(n > 0 for i, n in enumerate(counts) if i % 3)
    await scripted.nothing_held()
