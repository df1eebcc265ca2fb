"""A whole cluster on each transport, what its status says of it, and regions that keep KV apart."""

from __future__ import annotations

import asyncio

import pytest

from cli import view
from cli.prepare import prepare
from kvtransfer.transports.available import why_not_here
from services.runtime.client import Client
from services.runtime.load import SettingsError
from tests.e2e.world import SCRIPTED, eventually, prompt, running

SETTINGS = SCRIPTED | {"coordinator.local_prefill_tokens": "0"}


@pytest.mark.parametrize("transport", ["shm", "tcp", "nixl", "ucx"])
async def test_a_cluster_on_one_transport(transport):
    if why := why_not_here([transport]):
        pytest.skip(why[transport])
    async with running(1, 1, SETTINGS | {"kv.transports": transport}) as cluster:
        asks = [
            cluster.ask(prompt(*range(10 + i, 200 + i), max_tokens=5, ignore_eos=True))
            for i in range(0, 900, 300)
        ]
        for answer in await asyncio.gather(*asks):
            (attempt,) = answer.last.route.attempts
            assert (attempt.kv.transport, attempt.kv.lost) == (transport, "")
            assert attempt.kv.blocks == 48
        async with Client("", cluster.local.address("coordinator")) as client:

            async def told() -> bool:
                lines = view.transports(await client.status())
                assert lines[0] == f"KV transports offered: {transport}"
                return lines[1:] and lines[1].startswith(f"{transport}: 3 fetches, 288.0 KiB")

            await eventually(told)
        await cluster.nothing_held()


def test_a_transport_that_is_absent_is_told_before_anything_starts(monkeypatch):
    monkeypatch.setattr(
        "cli.prepare.why_not_here",
        lambda names: {n: f"{n} is not installed" for n in names if n == "nixl"},
    )
    settings = {"kv.transports": "nixl"}
    with pytest.raises(SettingsError, match=r"none can be used here\. nixl: nixl is not installed"):
        prepare(None, {}, settings, fetch=False)


async def test_kv_stays_in_its_region_and_requests_end_well_all_the_same():
    """Prefill in one region, decode in another: the coordinator makes no pair that is refused."""
    own = {"prefill-0": {"worker.region": "eu"}, "decode-0": {"worker.region": "us"}}
    async with running(1, 1, SETTINGS, own=own) as cluster:
        answer = await cluster.ask(prompt(max_tokens=8, ignore_eos=True, temperature=0.0))
        assert len(answer.tokens) == 8
        (attempt,) = answer.last.route.attempts
        assert attempt.prefill_worker == ""
        assert attempt.reasons[-1].endswith("no prefill worker may send KV to its region")
