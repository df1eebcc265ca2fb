"""A worker whose host has no model starts from its neighbour's, and says the same."""

from __future__ import annotations

import signal

import pytest

from services.engine.models.shipped import SHIPPED
from tests.e2e.world import eventually, prompt, running

pytestmark = pytest.mark.timeout(300)

SETTINGS = {
    "model.name": "anything",
    "engine.kv_memory_mib": "16",
    "engine.threads": "1",
    "worker.heartbeat_seconds": "0.1",
}


async def test_a_worker_without_a_model_fetches_it_and_generates_the_same(tmp_path):
    source, place = SHIPPED["tiny-deepseek"].folder, tmp_path / "fetched"
    here = {"model.path": str(source)}
    own = {
        "frontend": here,
        "decode-0": here,
        "decode-1": {"model.path": str(place), "weights.sources": "workers"},
    }
    more = {"own": own, "logs": tmp_path / "logs"}
    asked = [
        prompt(5, 6, 7, 8, max_tokens=12, temperature=0.0),
        prompt(9, 8, 7, max_tokens=12, temperature=0.9, seed=4),
    ]
    async with running(0, 2, SETTINGS, **more) as cluster:
        await cluster.workers_up(2)
        log = (tmp_path / "logs" / "decode-1.log").read_text()
        assert "is not here; workers to fetch it from" in log
        assert "fetched anything to" in log
        files = {p.name: p.read_bytes() for p in source.iterdir() if p.name != "README.md"}
        there = {p.name: p.read_bytes() for p in place.iterdir()}
        assert files.items() <= there.items()
        answers = []
        for leaves in ("decode-1", "decode-0"):
            cluster.local.kill(leaves, signal.SIGTERM)
            await eventually(lambda name=leaves: left(cluster, name), seconds=60)
            answers.append([(await cluster.ask(request)).tokens for request in asked])
            if leaves == "decode-1":
                await cluster.local.restart(leaves)
        assert answers[0] == answers[1]
        assert all(answers[0])
        # The second time it had its files.
        assert (tmp_path / "logs" / "decode-1.log").read_text().count("fetched anything to") == 1


async def left(cluster, name: str) -> bool:
    return name not in cluster.local.pids
