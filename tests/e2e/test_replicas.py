"""Two of everything, and etcd: each process dies under load, and users get all their tokens."""

from __future__ import annotations

import asyncio

from cli.cluster import LocalCluster
from loadtest import bench_deaths, deaths_report
from loadtest.bench_deaths import DeathsOptions
from tests.e2e.world import SCRIPTED, Cluster, prompt
from tests.ports import free_ports

SETTINGS = SCRIPTED | {
    "engine.scripted_step_seconds": "0.015",
    "coordinator.local_prefill_tokens": "0",
    "directory.lease_seconds": "2",
}
PATIENCE = 20.0
"""Seconds: far longer than any of it takes on a machine that has nothing else to do."""


async def test_each_process_dies_under_load_and_no_request_fails():
    options = DeathsOptions(
        seed=3,
        users=6,
        questions=12,
        input_tokens="uniform:8:120",
        output_tokens="uniform:30:60",
        down_seconds=0.4,
        stopped_seconds=2.5,
        calm_seconds=0.3,
    )
    async with LocalCluster(
        prefill=2, decode=2, coordinators=2, frontends=2, etcd=True, settings=SETTINGS
    ) as cluster:
        report = await bench_deaths.run(
            options, cluster, say=lambda words: None, stop=asyncio.Event()
        )
    table = deaths_report.markdown(report)
    assert not report.violations, f"{report.violations}\n{table}"
    rows = {row.what: row for row in report.rows}
    assert len(rows) == len(list(bench_deaths.harms(cluster.names))) == 13
    assert all(row.running == options.users for row in report.rows), table
    # The harm was done to something that was at work.
    assert rows["frontend-0 killed"].cut, table
    assert rows["frontend-1 killed"].cut, table
    assert rows["decode-0 killed"].placed_again or rows["decode-1 killed"].placed_again, table
    # A coordinator or etcd takes no stream with it: nothing is even placed again.
    for what, row in rows.items():
        if what.startswith(("coordinator", "all coordinators", "etcd")):
            assert not row.placed_again, table
            assert not row.cut, table
    assert max(row.longest_gap for row in report.rows) < PATIENCE, table
    assert max(row.longest_first for row in report.rows) < PATIENCE, table


async def test_two_coordinators_that_give_the_same_room_away_twice():
    """Each hears of the other's placements from the worker, which refuses what is too much."""
    port = free_ports(2)
    settings = SETTINGS | {
        "engine.max_running": "2",
        "engine.max_waiting": "0",
        "worker.heartbeat_seconds": "0.3",
    }
    own = {f"frontend-{i}": {"frontend.coordinator": f"127.0.0.1:{port + i}"} for i in range(2)}
    requests = [
        prompt(*range(10 + i, 30 + i), max_tokens=20, ignore_eos=True, seed=i) for i in range(10)
    ]
    async with LocalCluster(
        coordinators=2, frontends=2, coordinator_port=port, own=own, settings=settings
    ) as local:
        one, other = (Cluster(local, f"frontend-{i}", f"coordinator-{i}") for i in range(2))
        undisturbed = [await one.ask(request) for request in requests]
        together = await asyncio.gather(
            *((one, other)[i % 2].ask(request) for i, request in enumerate(requests))
        )
        assert [a.tokens for a in together] == [a.tokens for a in undisturbed]
        placed = [(await cluster.status()).placed for cluster in (one, other)]
        assert min(placed) >= len(requests) / 2
        refused = [a.failure for answer in together for a in answer.last.route.attempts]
        assert "ENGINE_OVERLOADED" in refused
        assert set(refused) == {"", "ENGINE_OVERLOADED"}
        await one.nothing_held()
        for cluster in (one, other):
            await cluster.close()
