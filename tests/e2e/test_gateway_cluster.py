"""OpenAI's API over HTTP, through all processes: gateway, frontend, coordinator, workers."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from pathlib import Path

import pytest

from cli.cluster import LocalCluster
from tests.e2e.world import SCRIPTED
from tests.gateway.gateway_rig import BUILD_SECONDS, Gateway, program

pytestmark = pytest.mark.timeout(BUILD_SECONDS)


async def curl(*arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        "curl", "-sS", "--max-time", "60", *arguments, stdout=-1, stderr=-1
    )
    out, err = await asyncio.wait_for(process.communicate(), 90)
    assert process.returncode == 0, err.decode()
    return out.decode()


def asked(url: str, body: object) -> list[str]:
    return [url, "-H", "content-type: application/json", "-d", json.dumps(body)]


async def test_chats_completions_and_models_through_a_cluster():
    built = await asyncio.to_thread(program)
    async with LocalCluster(settings=SCRIPTED, gateway=Path(built)) as cluster:
        address = cluster.address("gateway")
        base = f"http://{address}/v1"
        (model,) = json.loads(await curl(f"{base}/models"))["data"]
        name = model["id"]
        assert json.loads(await curl(f"{base}/models/{name}")) == model
        question = {"model": name, "messages": [{"role": "user", "content": "hello"}]}
        ask = question | {"max_tokens": 12, "temperature": 0, "seed": 1}
        whole = json.loads(await curl(*asked(f"{base}/chat/completions", ask)))
        (choice,) = whole["choices"]
        assert whole["usage"]["completion_tokens"] == 12
        assert choice["finish_reason"] == "length"
        options = {"stream": True, "stream_options": {"include_usage": True}}
        raw = await curl("-N", *asked(f"{base}/chat/completions", ask | options))
        *events, last, done, end = re.split(r"(?:\n\n)?data: |\n\n$", raw)[1:]
        pieces = [json.loads(event) for event in events]
        assert (done, end) == ("[DONE]", "")
        text = "".join(p["choices"][0]["delta"].get("content", "") for p in pieces)
        assert text == choice["message"]["content"]
        assert json.loads(last)["usage"]["completion_tokens"] == 12
        assert {p["usage"] for p in pieces} == {None}

        gateway = Gateway(None, address, None)
        more = {"model": name, "prompt": "once", "max_tokens": 4, "echo": True}
        answer = await gateway.post("/v1/completions", more, x_request_id="mine-7")
        told = answer.json
        assert told["id"] == "cmpl-mine-7"
        assert told["choices"][0]["text"].startswith("once")
        wrong = await gateway.post("/v1/completions", {"model": "other", "prompt": "x"})
        assert (wrong.status, wrong.error["code"], wrong.error["param"]) == (
            404,
            "model_not_found",
            "model",
        )
        wrong = await gateway.post("/v1/chat/completions", question | {"temperature": 3})
        assert (wrong.status, wrong.error["param"]) == (400, "temperature")


async def test_up_says_where_openais_clients_can_ask():
    await asyncio.to_thread(program)
    sets = [part for k, v in SCRIPTED.items() for part in ("--set", f"{k}={v}")]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli.main", "up", "--port", "0", "--coordinator-port", "0", *sets),
        stdout=-1,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(120):
            while b"base URL" not in (line := await process.stdout.readline()):
                assert line, "it has ended"
            url = line.split()[-1].decode()
            assert json.loads(await curl(f"{url}/models"))["object"] == "list"
            process.send_signal(signal.SIGINT)
            rest = (await process.communicate())[0]
            assert process.returncode == 0, rest.decode()
    finally:
        if process.returncode is None:
            process.kill()
