"""OpenAI's Python package: what is refused, what breaks off, who leaves, and many at once."""

from __future__ import annotations

import asyncio
import itertools
import signal
import time

import openai
import pytest
import pytest_asyncio

from services.runtime.errors import OverloadedError
from tests.conformance.conformance_world import MODEL, serving
from tests.e2e.world import eventually
from tests.gateway.gateway_rig import behind

pytestmark = pytest.mark.asyncio(loop_scope="module")

HELLO = [{"role": "user", "content": "hello there"}]
LONG = {"model": MODEL, "messages": HELLO, "max_completion_tokens": 4000, "seed": 5}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(tmp_path_factory):
    """5 ms a step, so that there is a middle of a stream."""
    steady = {
        "coordinator__local_prefill_tokens": "0",
        "coordinator__worker_wait_seconds": "0.2",
        "engine__scripted_step_seconds": "0.005",
        "engine__max_running": "64",
    }
    async with serving(tmp_path_factory.mktemp("model"), **steady) as it:
        yield it


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": -1}, "n", "integer_below_min_value"),
        ({"max_completion_tokens": 2**40}, "max_completion_tokens", "integer_above_max_value"),
        ({"stop": [""]}, "stop[0]", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias[99999999]", "invalid_value"),
        ({"presence_penalty": 9}, "presence_penalty", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "oracle", "content": "x"}]}, "messages[0].role", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            "invalid_value",
        ),
        ({"tools": [{"type": "web"}]}, "tools[0].type", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"type": "strange"}},
                }
            },
            "response_format.json_schema.schema",
            "invalid_value",
        ),
        ({"service_tier": "gold"}, "service_tier", "invalid_value"),
        ({"reasoning_effort": "lots"}, "reasoning_effort", "invalid_value"),
        ({"user": "x" * 129}, "user", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ],
)
async def test_what_is_refused_is_named(client, fields, param, code):
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(**(LONG | fields))
    error = refused.value
    assert (error.param, error.code, error.type) == (param, code, "invalid_request_error")
    assert error.request_id
    # It is the same before a stream's first piece.
    if "stream_options" not in fields:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(**(LONG | fields), stream=True)
        assert (refused.value.param, refused.value.code) == (param, code)


async def test_models_that_are_not_served(client):
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(**(LONG | {"model": "x"}), stream=stream)
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")


async def test_a_request_id_is_for_one_at_a_time(world, client):
    named = {"extra_headers": {"x-request-id": "same"}, "stream": True}
    stream = await client.chat.completions.create(**LONG, **named)
    with pytest.raises(openai.ConflictError) as refused:
        await client.with_options(max_retries=2).chat.completions.create(**LONG, **named)
    assert refused.value.code == "duplicate_request"
    await stream.close()
    await world.nothing_held()


async def test_deadlines_of_clients_are_kept(world, client):
    short = {"extra_headers": {"x-request-timeout": "0.3"}}
    with pytest.raises(openai.InternalServerError) as late:
        await client.with_options(max_retries=2).chat.completions.create(**LONG, **short)
    assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")
    with pytest.raises(openai.APIError) as late:
        async for _ in await client.chat.completions.create(**LONG, **short, stream=True):
            pass
    assert late.value.code == "deadline_exceeded"
    await world.nothing_held()


async def test_a_client_that_waits_no_longer_ends_its_request(world, client):
    with pytest.raises(openai.APITimeoutError):
        await client.with_options(timeout=0.3).chat.completions.create(**LONG)
    await world.nothing_held()


async def test_levels_of_service_that_cannot_be_had_are_refused(client):
    short = LONG | {"max_completion_tokens": 16, "extra_body": {"itl_seconds": 1e-6}}
    refused: list[openai.RateLimitError] = []

    async def told() -> bool:
        """Once the coordinator knows how fast the worker is."""
        try:
            await client.chat.completions.create(**short)
        except openai.RateLimitError as error:
            refused.append(error)
        return bool(refused)

    await eventually(told)
    assert refused[0].code == "rate_limit_exceeded"
    assert float(refused[0].response.headers["retry-after"]) > 0


@pytest.mark.parametrize("pieces", [0, 1, 5])
async def test_leaving_a_stream_frees_all_that_it_held(world, client, pieces):
    stream = await client.chat.completions.create(**LONG, n=2, stream=True)
    for _ in range(pieces):
        await anext(stream)
    await stream.close()
    await world.nothing_held()


async def test_cancelled_tasks_free_all_that_they_held(world, client):
    task = asyncio.create_task(client.chat.completions.create(**LONG))
    await world.busy("decode")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await world.nothing_held()


async def test_a_hundred_streams_at_once_say_what_each_would_alone(world, client):
    def asked(i: int) -> dict[str, object]:
        turn = {"role": "user", "content": f"question {i} of many"}
        return {"model": MODEL, "messages": [turn], "max_completion_tokens": 20, "seed": i}

    async def streamed(i: int) -> str:
        pieces = await client.chat.completions.create(**asked(i), stream=True)
        return "".join([p.choices[0].delta.content or "" async for p in pieces])

    together = await asyncio.gather(*(streamed(i) for i in range(100)))
    assert len(set(together)) == 100
    for i in range(0, 100, 10):
        alone = await client.chat.completions.create(**asked(i))
        assert together[i] == (alone.choices[0].message.content or "")
    await world.nothing_held()


async def test_busy_servers_are_asked_again_when_they_said():
    async with behind() as (gateway, backend):
        # It has room at the third time.
        backend.error = OverloadedError("full", retry_after=0.3)
        asked: list[float] = []

        async def note(request) -> None:
            asked.append(time.monotonic())
            if len(asked) == 3:
                backend.error = None

        http = openai.DefaultAsyncHttpxClient(event_hooks={"request": [note]})
        url = f"{gateway.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", http_client=http) as client:
            answer = await client.chat.completions.create(model="m", messages=HELLO)
        assert answer.choices[0].message.content == "hi"
        assert len(asked) == 3
        assert all(later - before > 0.29 for before, later in itertools.pairwise(asked))


async def test_nobody_there_to_answer(world, client):
    """The last test: it takes the cluster's only decode worker."""
    world.local.kill("decode-0", signal.SIGKILL)
    await world.workers_up(1)
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as failed:
            await client.chat.completions.create(**LONG, stream=stream)
        assert (failed.value.status_code, failed.value.code) == (503, "no_workers")
        assert failed.value.type == "server_error"
