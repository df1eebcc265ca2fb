"""A cluster whose pools hold one prompt and whose tiers hold the rest."""

from __future__ import annotations

from cli import view
from services.runtime.client import Client
from tests.e2e.world import SCRIPTED, eventually, prompt, running

SETTINGS = SCRIPTED | {
    "coordinator.local_prefill_tokens": "0",
    "engine.kv_blocks": "64",
    "kv.host_tier_mib": "8",
    # 190 tokens take 0.6 s to compute: what the tier may take to bring them back.
    "engine.scripted_step_seconds": "0.05",
    "engine.chunk_tokens": "16",
}


async def test_an_evicted_prompt_comes_back_from_a_tier_and_status_says_so():
    first = prompt(*range(10, 200), max_tokens=5, ignore_eos=True, temperature=0.0)
    async with running(1, 1, SETTINGS) as cluster:
        undisturbed = await cluster.ask(first)
        async with Client("", cluster.local.address("coordinator")) as client:

            async def copied() -> bool:
                workers = (await client.status()).workers
                return all(w.kv_tiers and w.kv_tiers[0].stored >= 40 for w in workers)

            await eventually(copied)
            await cluster.ask(prompt(*range(300, 540), max_tokens=5, ignore_eos=True))
            again = await cluster.ask(first)
            assert again.tokens == undisturbed.tokens
            assert again.last.usage.cached_tokens >= 160

            async def told() -> bool:
                lines = view.tiers(await client.status())
                return len(lines) == 2 and all(" host tier: " in line for line in lines)

            await eventually(told)
        await cluster.nothing_held()
