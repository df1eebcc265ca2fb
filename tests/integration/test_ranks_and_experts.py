"""Real processes: requests spread over a worker's ranks, and its experts move as load demands."""

from __future__ import annotations

import asyncio

from tests.e2e.world import SCRIPTED, eventually, prompt, running

RANKS = 4
SETTINGS = SCRIPTED | {
    "engine.scripted_dp_ranks": str(RANKS),
    "engine.scripted_experts": "2/16/24/4/2/8",
    "engine.kv_blocks": "2000",
    "worker.heartbeat_seconds": "0.05",
    "coordinator.expert_plan_seconds": "0.5",
    "coordinator.expert_tokens_each": "20",
}


def requests(max_tokens=60):
    """8 of equal length, half of them sampled; every token of them tells of all before it."""
    return [
        prompt(
            *range(100 * n + 3, 100 * n + 67),
            max_tokens=max_tokens,
            temperature=n % 2,
            seed=n,
            ignore_eos=True,
        )
        for n in range(8)
    ]


async def test_ranks_fill_evenly_and_experts_move_under_a_skewed_load():
    settings = SETTINGS | {"engine.scripted_step_seconds": "0.02"}
    async with running(0, 1, settings) as cluster:
        await cluster.workers_up(1)

        async def worker():
            (one,) = (await cluster.status()).workers
            return one

        assert (await worker()).info.dp_ranks == RANKS
        # Long enough for all to run at once, however late the last one comes.
        before = asyncio.gather(*(cluster.ask(request) for request in requests(300)))

        async def all_run() -> bool:
            return sum(rank.running for rank in (await worker()).stats.ranks) == 8

        await eventually(all_run)
        ranks = (await worker()).stats.ranks
        # 2 each, but where a report came between two of them and one counted twice for a moment.
        assert all(1 <= rank.running <= 3 for rank in ranks)
        assert all(rank.kv_tokens > 0 for rank in ranks)
        tokens = [answer.tokens[:60] for answer in await before]
        assert all(len(some) == 60 for some in tokens)

        async def moved() -> bool:
            return (await worker()).experts.plan > 0

        # The load goes on, for what has been seen may have been too little.
        for _ in range(10):
            again = await asyncio.gather(*(cluster.ask(request) for request in requests()))
            assert [answer.tokens for answer in again] == tokens
            if await moved():
                break
        assert await moved()
        # And once more through the experts where they are now: each checks that it is itself.
        after = await asyncio.gather(*(cluster.ask(request) for request in requests()))
        assert [answer.tokens for answer in after] == tokens
        experts = (await worker()).experts
        assert experts.fault == ""
        assert experts.last_plan.startswith("experts of ")
        # In order the layers are 0.46 even by Zipf's law.
        assert experts.balancedness > 0.55
        await cluster.nothing_held()
