"""Structured outputs through every process, workers dying among them."""

from __future__ import annotations

import json
import re
import signal

import grpc
import pytest

from services.runtime.errors import from_rpc
from tandem.inference.v1 import inference_pb2
from tests.contract.guide_models import scripted_folder
from tests.e2e.world import SCRIPTED, prompt, running
from tests.unit.guides.guide_world import check

STORY = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 90, "maxLength": 110},
        "pages": {"type": "integer", "minimum": 1, "maximum": 9999},
        "kind": {"enum": ["tale", "report", None]},
    },
    "required": ["title", "pages", "kind"],
    "additionalProperties": False,
}


def asked(seed: int, **guide) -> inference_pb2.GenerateRequest:
    request = prompt(max_tokens=400, temperature=1.0, seed=seed)
    for form, value in guide.items():
        if form == "choice":
            request.sampling.guide.choice.texts.extend(value)
        else:
            setattr(request.sampling.guide, form, value)
    return request


@pytest.fixture
async def cluster(tmp_path):
    settings = SCRIPTED | {
        "model.path": str(scripted_folder(tmp_path)),
        "model.name": "bytes",
        "engine.scripted_step_seconds": "0.02",
        "coordinator.local_prefill_tokens": "0",
    }
    async with running(2, 2, settings) as it:
        yield it


async def test_documents_survive_the_workers_that_write_them(cluster):
    request = asked(5, json_schema=json.dumps(STORY))
    undisturbed = await cluster.ask(request)
    check(json.loads(undisturbed.text), STORY)
    assert len(undisturbed.tokens) > 90
    killed: list[str] = []

    async def kill_at_15(answer) -> None:
        if len(answer.tokens) >= 15 and not killed:
            killed.append(await cluster.busy("decode"))
            cluster.local.kill(killed[0], signal.SIGKILL)

    answer = await cluster.ask(request, kill_at_15)
    assert killed
    assert answer.tokens == undisturbed.tokens
    assert answer.text == undisturbed.text
    first, second = answer.last.route.attempts
    assert first.prefill_worker
    assert first.failure == "WORKER_LOST"
    assert 0 < second.tokens < len(answer.tokens)

    # The other forms, on who is left; and what is refused, before a worker has heard of it.
    matched = await cluster.ask(asked(1, regex="[a-f]{3}(-[0-9]{2}){2}"))
    assert re.fullmatch("[a-f]{3}(-[0-9]{2}){2}", matched.text)
    assert (await cluster.ask(asked(2, choice=["north", "south"]))).text in ("north", "south")
    derived = await cluster.ask(asked(3, grammar='start: "(" start ")" | "x"'))
    assert re.fullmatch(r"\(*x\)*", derived.text)
    assert derived.text.count("(") == derived.text.count(")")
    early = asked(4, regex="true")
    early.sampling.min_tokens = 50
    assert (await cluster.ask(early)).text == "true"
    placed = (await cluster.status()).placed
    for bad, words in (
        (asked(1, regex="(a"), "unclosed"),
        (asked(1, json_schema='{"uniqueItems": true}'), "uniqueItems"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await cluster.ask(bad)
        error = from_rpc(refused.value)
        assert error.reason == "INVALID_REQUEST"
        assert error.metadata["field"].startswith("sampling.guide.")
        assert words in error.message
    assert (await cluster.status()).placed == placed
    await cluster.nothing_held()
