"""Ranks that are started one by one, as on several hosts: each at an address of its own."""

from __future__ import annotations

import asyncio
import sys

import pytest

from services.engine.api import Request, Sampling
from services.engine.build import build
from services.runtime.load import SettingsError
from services.runtime.server import ListenError
from services.runtime.settings import EngineSettings, KvSettings, ModelSettings
from tests.ports import free_ports
from tests.unit.engine_torch import torch_models

GREEDY = Sampling(temperature=0.0, max_tokens=5, ignore_eos=True)


def leader(address: str, model: str = "", **settings):
    engine = EngineSettings(kind="scripted", ranks=2, group_address=address, kv_blocks=64)
    return build(
        ModelSettings(name="tiny", path=model),
        engine.model_copy(update=settings),
        KvSettings(),
        "127.0.0.1",
    )


async def start_rank(address: str, rank: int) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli.main", "serve", "rank", "--host", f"127.0.0.{rank + 1}"),
        *("--group", address, "--rank", str(rank)),
        stderr=asyncio.subprocess.PIPE,
    )


async def test_ranks_meet_their_leader_whoever_starts_them_first():
    address = f"127.0.0.1:{free_ports()}"
    engine = leader(address)
    first = await start_rank(address, 1)  # it waits for the leader
    starting = asyncio.create_task(engine.start())
    second = await start_rank(address, 0)
    try:
        await asyncio.wait_for(starting, 60)
        assert engine.info.dp_ranks == 2
        for rank in range(2):
            engine.decode(Request(f"r{rank}", (3, 4, 5), GREEDY, dp_rank=rank), None)
        found: dict[str, list[int]] = {"r0": [], "r1": []}
        outputs = engine.outputs()
        async with asyncio.timeout(60):
            while min(map(len, found.values())) < 5:
                for output in (await anext(outputs)).outputs:
                    found[output.request_id] += output.token_ids
        assert found["r0"] == found["r1"]
        await engine.close()
        # In good order: they were told to end.
        assert await asyncio.wait_for(first.wait(), 60) == 0
        assert await asyncio.wait_for(second.wait(), 60) == 0
    finally:
        for process in (first, second):
            if process.returncode is None:
                process.kill()
            await process.communicate()
        await engine.close()


async def test_sharers_of_a_model_meet_like_ranks(tmp_path):
    torch_models.write(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    address = f"127.0.0.1:{free_ports()}"
    made = {"kind": "torch", "ranks": 1, "tensor_parallel": 2, "threads": 1, "block_tokens": 16}
    engine = leader(address, model=str(tmp_path), **made)
    sharer = await start_rank(address, 1)
    try:
        await asyncio.wait_for(engine.start(), 120)
        engine.decode(Request("r", (3, 4, 5), GREEDY), None)
        outputs, found = engine.outputs(), []
        async with asyncio.timeout(60):
            while len(found) < 5:
                for output in (await anext(outputs)).outputs:
                    found += output.token_ids
        await engine.close()
        assert await asyncio.wait_for(sharer.wait(), 60) == 0
    finally:
        if sharer.returncode is None:
            sharer.kill()
        await sharer.communicate()
        await engine.close()


async def test_nothing_listens_beyond_this_host_unasked():
    with pytest.raises(ListenError, match="allow_unauthenticated_remote"):
        await leader("0.0.0.0:0").start()


def test_a_group_of_one_meets_nowhere():
    with pytest.raises(SettingsError, match=r"engine\.group_address"):
        leader("127.0.0.1:0", ranks=1)
