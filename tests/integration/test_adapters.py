"""LoRA adapters over real processes: in one batch, in caches, loaded and unloaded under traffic."""

from __future__ import annotations

import asyncio
import json
import signal

import grpc
import numpy as np
import pytest
from typer.testing import CliRunner

from cli.main import app
from services.engine.scripted.adapters import mask_of
from services.engine.scripted.model import logits_of
from services.runtime.errors import from_rpc
from tandem.inference.v1 import inference_pb2
from tests.e2e.world import SCRIPTED, eventually, prompt, running

SETTINGS = SCRIPTED | {
    "engine.kv_blocks": "400",
    "coordinator.local_prefill_tokens": "0",
    "coordinator.worker_wait_seconds": "0.5",
    "worker.heartbeat_seconds": "0.05",
}
SLOW = SETTINGS | {"engine.scripted_step_seconds": "0.02"}
PROMPT = range(40, 77)


def write(folder, content: str):
    """What the scripted engine takes for an adapter: two files."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    (folder / "adapter_model.safetensors").write_bytes(content.encode())
    return folder


@pytest.fixture
def folders(tmp_path):
    for name in ("legal", "poems"):
        write(tmp_path / name, name)
    return tmp_path


def ask(adapter: str = "", *, tokens: int = 24, seed: int = 1) -> inference_pb2.GenerateRequest:
    request = prompt(*PROMPT, max_tokens=tokens, temperature=0, seed=seed, ignore_eos=True)
    request.adapter = adapter
    return request


def expected(adapter_id: str, count: int = 24) -> list[int]:
    """What the scripted model says with an adapter, greedily."""
    mask = int(mask_of(adapter_id)) if adapter_id else 0
    known = list(PROMPT)
    for _ in range(count):
        known.append(int(np.argmax(logits_of(np.array(known, "<u4").tobytes(), mask))))
    return known[len(PROMPT) :]


async def ids(cluster) -> dict[str, str]:
    """The id of each adapter's name."""
    answer = await cluster.inference.ListModels(inference_pb2.ListModelsRequest(), timeout=5)
    return {i.partition("@")[0]: i for m in answer.models for i in m.adapters}


async def refused(cluster, request) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.ask(request)
    return from_rpc(caught.value).reason, caught.value.details()


async def command(cluster, *words: str) -> tuple[int, str]:
    """`tandem adapters ...`, against the cluster."""
    where = ["--coordinator", cluster.local.address("coordinator")]
    result = await asyncio.to_thread(CliRunner().invoke, app, ["adapters", *words, *where])
    return result.exit_code, result.output


def loaded(folders) -> dict[str, str]:
    return {
        "engine.adapter_folder": str(folders),
        "engine.adapters": "legal=legal,poems=poems",
    }


async def test_adapters_share_batches_and_no_cache(folders):
    async with running(1, 1, SETTINGS | loaded(folders)) as cluster:
        await cluster.workers_up(2)
        names = {"": "", **await ids(cluster)}
        assert sorted(names) == ["", "legal", "poems"]
        want = {name: expected(adapter_id) for name, adapter_id in names.items()}
        assert len({tuple(tokens) for tokens in want.values()}) == 3
        # One after the other: each finds nothing of the others', though the prompt is the same.
        for name in names:
            answer = await cluster.ask(ask(name))
            assert answer.tokens == want[name]
            assert answer.last.usage.cached_tokens == 0
        # All at once, twice each: now what each left is found again.
        order = [*names, *names]
        answers = await asyncio.gather(*(cluster.ask(ask(name)) for name in order))
        assert [a.tokens for a in answers] == [want[name] for name in order]
        assert all(a.last.usage.cached_tokens >= 32 for a in answers)
        # By id, for just these weights.
        assert (await cluster.ask(ask(names["legal"]))).tokens == want["legal"]
        reason, words = await refused(cluster, ask("legal@" + "0" * 32))
        assert reason == "UNKNOWN_ADAPTER"
        reason, words = await refused(cluster, ask("lgeal"))
        assert (reason, words) == (
            "UNKNOWN_ADAPTER",
            "adapter 'lgeal' of smollm2-135m-instruct is not loaded; loaded: legal, poems",
        )
        reason, words = await refused(cluster, ask("no name"))
        assert reason == "INVALID_REQUEST"
        await cluster.nothing_held()


async def test_adapters_come_and_go_while_requests_run(folders):
    """By the command that people use, on all workers at once."""
    settings = SLOW | {"engine.adapter_folder": str(folders), "engine.max_adapters": "2"}
    async with running(1, 1, settings) as cluster:
        await cluster.workers_up(2)
        base = asyncio.create_task(cluster.ask(ask(tokens=150)))
        assert await ids(cluster) == {}
        status, words = await command(cluster, "load", "legal")
        assert (status, words.count("legal@")) == (0, 2)
        first = (await ids(cluster))["legal"]
        assert (await cluster.ask(ask("legal"))).tokens == expected(first)

        # Replaced while a request runs with it: that one ends as it began, the next is another.
        started = asyncio.Event()

        async def note(answer) -> None:
            started.set()

        running_on = asyncio.create_task(cluster.ask(ask("legal", tokens=150), note))
        await started.wait()
        write(folders / "newer", "other weights")
        status, words = await command(cluster, "load", "legal", "newer")
        assert status == 0
        status, words = await command(cluster, "list")
        assert words.count("leaving") == 2

        async def replaced() -> bool:
            return (await cluster.ask(ask("legal", tokens=2))).tokens != expected(first, 2)

        await eventually(replaced)
        assert (await running_on).tokens == expected(first, 150)
        # Both were there at the same time; there was room for no third.
        status, words = await command(cluster, "load", "poems")
        assert status == 1
        assert "engine.max_adapters is 2" in words

        async def gone() -> bool:
            _, words = await command(cluster, "list")
            return first.partition("@")[2][:12] not in words

        await eventually(gone)
        second = (await ids(cluster))["legal"]
        assert second != first
        assert (await cluster.ask(ask("legal"))).tokens == expected(second)

        status, words = await command(cluster, "load", "elsewhere", "../../etc")
        assert status == 1
        assert "a folder below engine.adapter_folder" in words
        status, words = await command(cluster, "unload", "legal")
        assert status == 0
        assert (await refused(cluster, ask("legal")))[0] == "UNKNOWN_ADAPTER"
        status, words = await command(cluster, "unload", "legal")
        assert (status, "no worker has adapter 'legal'" in words) == (1, True)
        assert (await base).tokens == expected("", 150)
        await cluster.nothing_held()


async def test_a_request_goes_on_where_its_adapter_is(folders):
    """Its decode worker is killed: another one has the adapter, or nobody has."""
    settings = SLOW | loaded(folders)
    own = {"decode-2": {"engine.adapters": ""}, "decode-1": {"engine.adapters": "legal=legal"}}
    async with running(1, 3, settings, own=own) as cluster:
        await cluster.workers_up(4)
        names = await ids(cluster)
        killed: list[str] = []

        async def kill(answer) -> None:
            if not killed and len(answer.tokens) > 10:
                killed.append(await cluster.busy("decode"))
                cluster.local.kill(killed[0], signal.SIGKILL)

        answer = await cluster.ask(ask("legal", tokens=100), kill)
        assert killed[0] in ("decode-0", "decode-1")
        assert answer.tokens == expected(names["legal"], 100)
        assert len(answer.last.route.attempts) == 2
        assert answer.last.route.attempts[1].decode_worker.startswith("decode-")

        # The last one that has an adapter: its requests can't go on anywhere.
        last = "poems" if killed == ["decode-1"] else "legal"
        killed.clear()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cluster.ask(ask(last, tokens=100), kill)
        assert from_rpc(caught.value).reason == "UNKNOWN_ADAPTER"
        assert names[last] in caught.value.details()
        # Others do: there is a worker.
        assert (await cluster.ask(ask())).tokens == expected("")
