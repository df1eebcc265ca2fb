"""A prefill worker whose model is shared by two processes, either of which is killed."""

from __future__ import annotations

import asyncio
import signal

import psutil

from tests.e2e.test_group import folder  # noqa: F401 - a fixture
from tests.e2e.world import eventually, prompt, running


async def worker(cluster, role: str):
    """What the one of a role says of itself."""
    (found,) = [
        w.info for w in (await cluster.status()).workers if w.info.worker_id.startswith(role)
    ]
    return found


async def test_a_sharer_killed_in_mid_prefill_changes_no_token(folder):  # noqa: F811
    settings = {
        "model.path": str(folder),
        "model.name": "tiny-deepseek",
        "engine.block_tokens": "16",
        "engine.kv_blocks": "64",
        "worker.heartbeat_seconds": "0.1",
        "coordinator.local_prefill_tokens": "0",
    }
    own = {"prefill-0": {"engine.tensor_parallel": "2", "engine.chunk_tokens": "1"}}
    own["decode-0"] = {"engine.threads": "1"}
    sampling = {"temperature": 0.9, "seed": 7, "max_tokens": 12, "ignore_eos": True}
    async with running(1, 1, settings, own=own, restart=False) as cluster:
        prefill, decode = await worker(cluster, "prefill"), await worker(cluster, "decode")
        assert prefill.numerics == decode.numerics  # the bits of one process
        undisturbed = await cluster.ask(prompt(*range(10, 60), **sampling))
        assert undisturbed.last.route.attempts[-1].prefill_worker == prefill.worker_id

        own_process = psutil.Process(cluster.local.pids["prefill-0"])
        (sharer,) = own_process.children()
        long = [*range(310, 10, -1)]
        asked = asyncio.create_task(cluster.ask(prompt(*long, **sampling)))
        await cluster.busy("prefill")  # a step a token: it is in the midst of it
        sharer.send_signal(signal.SIGKILL)
        answer = await asked
        assert len(answer.tokens) == 12

        async def ended() -> bool:
            return not (own_process.is_running() or sharer.is_running())

        await eventually(ended)  # who runs the worker starts it again, were it to
        for ids, tokens in (
            (range(10, 60), undisturbed.tokens),
            (long, answer.tokens),
        ):
            again = await cluster.ask(prompt(*ids, **sampling))
            assert again.last.route.attempts[-1].prefill_worker != prefill.worker_id
            assert again.tokens == tokens
        await cluster.nothing_held()
