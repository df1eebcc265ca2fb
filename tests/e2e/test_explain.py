"""`tandem explain`, as a person runs it: of a request that was refused, that waits, that moved."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys

import grpc
import pytest

from services.runtime.errors import from_rpc
from tests.e2e.world import SCRIPTED, eventually, prompt, running

SETTINGS = SCRIPTED | {
    "engine.scripted_step_seconds": "0.02",
    "engine.max_running": "2",
    "coordinator.local_prefill_tokens": "0",
    "coordinator.queue_limit": "1",
}


async def explain(cluster, request_id, *flags):
    """Exit status, standard output and standard error of the command."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli.main", "explain", request_id),
        *("--coordinator", cluster.local.address("coordinator"), *flags),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    out, error = await process.communicate()
    return process.returncode, out.decode(), error.decode()


def ask(name, **sampling):
    request = prompt(**sampling)
    request.request_id = name
    return request


async def test_a_refused_and_a_queued_request_say_why():
    async with running(1, 1, SETTINGS) as cluster:
        # Two run, one is prepared to join them, one waits in the queue.
        running_ones = [
            asyncio.create_task(cluster.ask(ask(f"runs-{n}", max_tokens=1500, ignore_eos=True)))
            for n in range(3)
        ]

        async def placed():
            return (await cluster.status()).placed == 3

        await eventually(placed)
        queued = asyncio.create_task(cluster.ask(ask("waits", max_tokens=1)))

        async def waiting():
            return (await cluster.status()).queued == 1

        await eventually(waiting)
        status, text, _ = await explain(cluster, "waits")
        assert status == 0
        assert "request waits: has waited " in text
        assert "no decode worker of" in text
        assert "no room: 3 of 3 requests" in text

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cluster.ask(ask("refused", max_tokens=1))
        told = from_rpc(caught.value)
        assert told.reason == "OVERLOADED"
        assert told.metadata["request_id"] == "refused"
        status, text, _ = await explain(cluster, "refused")
        assert status == 0
        assert "request refused: refused with OVERLOADED" in text
        assert "refused: no worker has room, and 1 of 1 requests wait already" in text

        for task in running_ones:
            task.cancel()
        await asyncio.gather(*running_ones, return_exceptions=True)
        await queued
        _, text, _ = await explain(cluster, "waits")
        assert "request waits: answered" in text
        assert "waited" in text
        assert "chosen:" in text

        status, _, error = await explain(cluster, "never-asked")
        assert status == 1
        where = cluster.local.address("coordinator")
        assert f"none of {where} remembers request never-asked" in error

        # Whoever can't be asked is named, and does not hide what others know.
        status, text, error = await explain(cluster, "waits", "--coordinator", "127.0.0.1:1")
        assert status == 0
        assert "request waits: answered" in text
        assert "127.0.0.1:1 did not answer (UNAVAILABLE)" in error


async def test_a_placed_again_request_shows_both_attempts():
    async with running(1, 2, SETTINGS) as cluster:
        lost = []

        async def kill_once(answer):
            if not lost and len(answer.tokens) >= 5:
                lost.append(await cluster.busy("decode"))
                cluster.local.kill(lost[0], signal.SIGKILL)

        answer = await cluster.ask(ask("moved", max_tokens=150, ignore_eos=True), kill_once)
        assert len(answer.tokens) == 150

        async def told():
            _, out, _ = await explain(cluster, "moved", "--json")
            return len(found := json.loads(out)) == 2 and found[1]["ended"]

        await eventually(told)
        _, text, _ = await explain(cluster, "moved")
        assert "request moved: answered" in text
        assert f"tokens: {lost[0]}-" in text
        assert "was lost (WORKER_LOST)" in text
        await cluster.local.restart(lost[0])
