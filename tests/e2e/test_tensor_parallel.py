"""A prefill worker whose model is shared by two processes, either of which is killed."""

from __future__ import annotations

import asyncio
import signal

import psutil

from tests.e2e.test_group import folder  # noqa: F401 - a fixture
from tests.e2e.world import eventually, prompt, running


async def worker(cluster, role: str, but: str = ""):
    """What the one of a role says of itself, once there is another than `but`."""
    found = []

    async def there() -> bool:
        infos = [w.info for w in (await cluster.status()).workers]
        found[:] = [i for i in infos if i.worker_id.startswith(role) and i.worker_id != but]
        return bool(found)

    await eventually(there, seconds=80)
    return found[0]


async def test_a_sharer_killed_in_mid_prefill_changes_no_token(folder):  # noqa: F811
    settings = {
        "model.path": str(folder),
        "model.name": "tiny-deepseek",
        "engine.block_tokens": "16",
        "engine.kv_blocks": "64",
        "worker.heartbeat_seconds": "0.1",
        "coordinator.local_prefill_tokens": "0",
        "coordinator.worker_wait_seconds": "80",
    }
    own = {"prefill-0": {"engine.tensor_parallel": "2", "engine.chunk_tokens": "1"}}
    own["decode-0"] = {"engine.threads": "1"}
    sampling = {"temperature": 0.9, "seed": 7, "max_tokens": 12, "ignore_eos": True}
    async with running(1, 1, settings, own=own, restart=True) as cluster:
        prefill, decode = await worker(cluster, "prefill"), await worker(cluster, "decode")
        assert prefill.numerics == decode.numerics  # the bits of one process
        undisturbed = await cluster.ask(prompt(*range(10, 210), **sampling))
        assert undisturbed.last.route.attempts[-1].prefill_worker == prefill.worker_id

        (sharer,) = psutil.Process(cluster.local.pids["prefill-0"]).children()
        asked = asyncio.create_task(cluster.ask(prompt(*range(210, 10, -1), **sampling)))
        await cluster.busy("prefill")  # a step a token: it is in the midst of it
        sharer.send_signal(signal.SIGKILL)
        answer = await asked
        assert len(answer.tokens) == 12
        await worker(cluster, "prefill", but=prefill.worker_id)  # it was started again
        again = await cluster.ask(prompt(*range(210, 10, -1), **sampling))
        assert again.tokens == answer.tokens
        assert again.last.route.attempts[-1].prefill_worker not in ("", prefill.worker_id)
        assert not sharer.is_running()
        await cluster.nothing_held()

        # One whose rank 0 is gone goes with it.
        (sharer,) = psutil.Process(cluster.local.pids["prefill-0"]).children()
        cluster.local.kill("prefill-0", signal.SIGKILL)

        async def gone() -> bool:
            return not sharer.is_running()

        await eventually(gone)
