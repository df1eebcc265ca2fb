"""kill -9 of each process in mid-stream: what the client sees is what it would have seen."""

from __future__ import annotations

import asyncio
import signal

import grpc
import pytest

from services.runtime.errors import from_rpc
from tests.e2e.world import SCRIPTED, Cluster, eventually, prompt, running

LONG = 150
"""Tokens of a stream that lasts long enough (3 s) for a worker to say that it runs it."""

SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": 7},
}


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_decode_worker_lost_in_mid_stream(scripted: Cluster, sampling, how):
    request = prompt(**SAMPLINGS[sampling], max_tokens=LONG, ignore_eos=True)
    undisturbed = await scripted.ask(request)
    assert len(undisturbed.tokens) == LONG
    killed: list[str] = []

    async def kill_at_20(answer) -> None:
        if len(answer.tokens) >= 20 and not killed:
            killed.append(await scripted.busy("decode"))
            scripted.local.kill(killed[0], how)

    answer = await scripted.ask(request, kill_at_20)
    assert killed
    assert answer.tokens == undisturbed.tokens
    assert answer.text == undisturbed.text
    attempts = answer.last.route.attempts
    if how is signal.SIGKILL:
        assert len(attempts) == 2
        assert scripted.worker(attempts[0].decode_worker) == killed[0]
        assert attempts[0].decode_worker != attempts[1].decode_worker
        assert attempts[0].failure == "WORKER_LOST"
        assert sum(a.tokens for a in attempts) == LONG
    assert answer.last.usage.completion_tokens == LONG
    await scripted.nothing_held()

    async def gone() -> bool:
        return killed[0] not in scripted.local.pids

    # A drained worker ends by itself; a second signal now would only be impatience.
    await eventually(gone)


@pytest.mark.parametrize("sampling", SAMPLINGS)
async def test_prefill_worker_killed_while_it_computes_the_prompt(sampling):
    settings = SCRIPTED | {
        "engine.scripted_step_seconds": "0.05",
        "engine.chunk_tokens": "8",
        "coordinator.local_prefill_tokens": "0",
    }
    request = prompt(*range(10, 410), **SAMPLINGS[sampling], max_tokens=12, ignore_eos=True)
    async with running(2, 2, settings) as cluster:
        answering = asyncio.create_task(cluster.ask(request))
        busy = await cluster.busy("prefill")
        cluster.local.kill(busy, signal.SIGKILL)
        answer = await answering
        assert len(answer.tokens) == 12
        first, *others = answer.last.route.attempts
        assert cluster.worker(first.prefill_worker) == busy
        assert others
        assert others[-1].prefill_worker != first.prefill_worker
        # Undisturbed afterwards, on whoever is left: the same request, the same tokens.
        assert (await cluster.ask(request)).tokens == answer.tokens
        await cluster.nothing_held()


@pytest.mark.parametrize("sampling", SAMPLINGS)
async def test_prefill_worker_killed_at_the_first_token(scripted: Cluster, sampling):
    request = prompt(**SAMPLINGS[sampling], max_tokens=30, ignore_eos=True)
    undisturbed = await scripted.ask(request)
    names = [scripted.worker(undisturbed.last.route.attempts[0].prefill_worker)]
    assert names[0].startswith("prefill")

    async def kill(answer) -> None:
        if names:
            scripted.local.kill(names.pop(), signal.SIGKILL)

    assert (await scripted.ask(request, kill)).tokens == undisturbed.tokens
    await scripted.nothing_held()


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_with_none_left_the_answer_is_a_clear_unavailable(role):
    settings = SCRIPTED | {
        "engine.scripted_step_seconds": "0.02",
        "coordinator.local_prefill_tokens": "0",
        "coordinator.worker_wait_seconds": "0.5",
    }
    async with running(1, 1, settings, restart=False) as cluster:

        async def kill(answer) -> None:
            if len(answer.tokens) == 5:
                cluster.local.kill("decode-0", signal.SIGKILL)

        if role == "decode":
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await cluster.ask(prompt(max_tokens=60, ignore_eos=True), kill)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert from_rpc(caught.value).reason == "NO_WORKERS"
            assert "decode" in caught.value.details()
        else:
            # Without a prefill worker the decode worker computes prompts itself.
            cluster.local.kill("prefill-0", signal.SIGKILL)
            await cluster.workers_up(1)
            answer = await cluster.ask(prompt(max_tokens=5, ignore_eos=True))
            assert len(answer.tokens) == 5
            assert answer.last.route.attempts[-1].prefill_worker == ""


async def test_the_only_decode_worker_is_brought_back_and_the_stream_goes_on():
    settings = SCRIPTED | {"engine.scripted_step_seconds": "0.02"}
    request = prompt(max_tokens=40, ignore_eos=True, temperature=0.8, seed=11)
    async with running(1, 1, settings, restart=True) as cluster:
        undisturbed = await cluster.ask(request)
        killed = []

        async def kill(answer) -> None:
            if len(answer.tokens) >= 5 and not killed:
                killed.append(True)
                cluster.local.kill("decode-0", signal.SIGKILL)

        answer = await cluster.ask(request, kill)
        assert killed
        assert answer.tokens == undisturbed.tokens
        first, second = answer.last.route.attempts
        assert first.failure == "WORKER_LOST"
        assert any("waited" in reason for reason in second.reasons)


async def test_coordinator_killed_streams_finish_and_workers_come_back(scripted: Cluster):
    request = prompt(max_tokens=80, ignore_eos=True, temperature=0.8, seed=3)
    undisturbed = await scripted.ask(request)
    down = []

    async def kill(answer) -> None:
        if len(answer.tokens) >= 5 and not down:
            down.append(True)
            scripted.local.kill("coordinator", signal.SIGKILL)

    answer = await scripted.ask(request, kill)
    assert down
    assert answer.tokens == undisturbed.tokens
    assert len(answer.last.route.attempts) == 1
    await scripted.local.restart("coordinator")
    await scripted.workers_up(4)
    again = await scripted.ask(request)
    assert again.tokens == undisturbed.tokens
    # The new coordinator knows from the workers' snapshots what they hold.
    assert again.last.usage.cached_tokens > 0
