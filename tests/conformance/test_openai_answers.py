"""OpenAI's Python package: each field that docs/openai.md names, whole and streamed."""

from __future__ import annotations

import asyncio
import json
import math

import openai
import pydantic
import pytest
import pytest_asyncio

from tests.conformance.conformance_world import MODEL, TOKENS, biases, serving
from tests.conformance.node_package import FETCH_SECONDS, HERE, node_folder

pytestmark = pytest.mark.asyncio(loop_scope="module")

HELLO = [{"role": "user", "content": "hello there"}]
SHORT = {"model": MODEL, "messages": HELLO, "max_completion_tokens": 12, "seed": 5}

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Paris"]}, "days": {"enum": [1, 2, 3]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock-2"}}
TOOLS = {"tools": [WEATHER, CLOCK], "max_completion_tokens": 400}


class Step(pydantic.BaseModel, extra="forbid"):
    """A part of the plan."""

    place: str = pydantic.Field(max_length=8)
    days: int = pydantic.Field(ge=1, le=9)


class Plan(pydantic.BaseModel, extra="forbid"):
    """What an answer is parsed into."""

    urgent: bool
    steps: list[Step] = pydantic.Field(min_length=1, max_length=2)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    async with serving(folder, coordinator__local_prefill_tokens="0") as it:
        yield it
        await it.nothing_held()


async def chat(client, **fields):
    return await client.chat.completions.create(**(SHORT | fields))


async def joined(client, **fields):
    """A stream's answer, by the package's own accumulation, held equal to the whole one."""
    whole = await chat(client, **fields)
    options = {"include_usage": True}
    helper = client.chat.completions.stream(**(SHORT | fields), stream_options=options)
    async with helper as stream:
        async for _ in stream:
            pass
        # Its get_final_completion() raises where an answer was cut.
        final = stream.current_completion_snapshot
    for one, other in zip(whole.choices, final.choices, strict=True):
        assert one.finish_reason == other.finish_reason
        # Ids of calls are made anew for each answer.
        assert told(one.message) == told(other.message)
        assert (one.logprobs and one.logprobs.content) == (
            other.logprobs and other.logprobs.content
        )
    assert whole.usage.completion_tokens == final.usage.completion_tokens
    assert whole.usage.prompt_tokens == final.usage.prompt_tokens
    assert whole.system_fingerprint == final.system_fingerprint
    return whole


def told(message):
    calls = [(c.function.name, c.function.arguments) for c in message.tool_calls or []]
    return message.role, message.content, getattr(message, "reasoning_content", None), calls


async def test_models_are_listed_and_found_by_name(client):
    (model,) = (await client.models.list()).data
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "tandem")
    assert model.created > 0
    assert await client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError) as missing:
        await client.models.retrieve("conformance/other")
    assert missing.value.code == "model_not_found"


async def test_an_answer_has_all_that_it_should(client):
    answer = await joined(client)
    (choice,) = answer.choices
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model, answer.created > 0) == ("chat.completion", MODEL, True)
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.message.tool_calls is None
    usage = answer.usage
    assert usage.completion_tokens == 12
    assert usage.total_tokens == usage.prompt_tokens + 12
    assert answer.system_fingerprint
    assert answer.service_tier == "default"


async def test_requests_have_ids_that_clients_may_choose(client):
    raw = await client.chat.completions.with_raw_response.create(
        **SHORT, extra_headers={"x-request-id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == raw.request_id == "mine-1"
    assert raw.parse().id == "chatcmpl-mine-1"
    assert (await chat(client))._request_id
    with pytest.raises(openai.BadRequestError) as refused:
        await chat(client, temperature=3)
    assert refused.value.request_id == refused.value.response.headers["x-request-id"]


async def test_pieces_are_as_clients_expect_them(client):
    stream = await chat(client, stream=True)
    pieces = [piece async for piece in stream]
    assert {p.object for p in pieces} == {"chat.completion.chunk"}
    assert len({(p.id, p.created, p.model, p.system_fingerprint) for p in pieces}) == 1
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [p.choices[0].finish_reason for p in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert {p.usage for p in pieces} == {None}
    stream = await chat(client, stream=True, stream_options={"include_usage": True})
    *pieces, last = [piece async for piece in stream]
    assert last.choices == []
    assert last.usage.completion_tokens == 12
    assert {p.usage for p in pieces} == {None}


async def test_what_was_computed_before_is_told(client):
    long = [{"role": "user", "content": "once upon a time " * 20}]
    first = await chat(client, messages=long)
    again = await chat(client, messages=long)
    cached = [one.usage.prompt_tokens_details.cached_tokens for one in (first, again)]
    assert cached[0] < cached[1] < again.usage.prompt_tokens


async def test_several_answers_of_one_prompt(client):
    answer = await joined(client, n=3)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts[0] == (await chat(client)).choices[0].message.content
    assert answer.usage.completion_tokens == 36


async def test_seeds_temperatures_and_penalties(client):
    async def text(**fields):
        return (await chat(client, **fields)).choices[0].message.content

    assert await text() == await text() != await text(seed=6)
    greedy = await text(temperature=0)
    assert greedy == await text(temperature=0, seed=6) == await text(top_p=1e-9)
    both = {"presence_penalty": 2, "frequency_penalty": 2}
    once = await text(temperature=0, max_completion_tokens=150)
    assert once != await text(temperature=0, max_completion_tokens=150, **both)
    more = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.0, "priority": 5}
    assert await text(extra_body=more) == greedy


async def test_answers_end_before_stop_strings(client):
    whole = (await chat(client, temperature=0)).choices[0].message.content
    end = whole[5:8]
    for stop in (end, ["never said", end]):
        (choice,) = (await joined(client, temperature=0, stop=stop)).choices
        assert choice.finish_reason == "stop"
        assert choice.message.content == whole[: whole.index(end)]


async def test_logprobs_of_chats(client):
    (choice,) = (await joined(client, temperature=0, logprobs=True, top_logprobs=3)).choices
    tokens = choice.logprobs.content
    assert len(tokens) == 12
    raw = bytes(byte for token in tokens for byte in token.bytes)
    assert raw.decode(errors="replace") == choice.message.content
    for token in tokens:
        assert token.logprob <= 0
        best = [top.logprob for top in token.top_logprobs]
        assert len(best) == 3
        assert best == sorted(best, reverse=True)
        assert math.isclose(best[0], token.logprob)  # greedy
    assert (await chat(client, logprobs=True)).choices[0].logprobs.content[0].top_logprobs == []


async def test_biases_ban_and_force_tokens(client):
    async def tokens(bias):
        answer = await chat(client, temperature=0, logit_bias=bias, logprobs=True)
        return [token.token for token in answer.choices[0].logprobs.content]

    assert await tokens({str(TOKENS["q"]): 100}) == ["q"] * 12
    free = await tokens({})
    found = next(token for token in free if token in TOKENS)
    assert found not in await tokens({str(TOKENS[found]): -100})


async def test_both_names_of_the_bound_mean_the_same(client):
    old = {"model": MODEL, "messages": HELLO, "seed": 5, "max_tokens": 3}
    assert (await client.chat.completions.create(**old)).usage.completion_tokens == 3
    assert (await chat(client, max_completion_tokens=3)).usage.completion_tokens == 3
    with pytest.raises(openai.BadRequestError) as refused:
        await chat(client, max_tokens=4)
    assert refused.value.param == "max_tokens"


async def test_answers_are_json(client):
    # Any text may stand in an object: what ends it is made likely.
    form = {"response_format": {"type": "json_object"}, "max_completion_tokens": 2000}
    (choice,) = (await joined(client, **form, logit_bias=biases(**{'"': 9, "}": 9}))).choices
    assert choice.finish_reason == "stop"
    assert isinstance(json.loads(choice.message.content), dict)


async def test_answers_are_parsed_into_the_clients_own_types(client):
    for seed in range(4):
        parsed = await client.chat.completions.parse(
            **(SHORT | {"max_completion_tokens": 400, "seed": seed}),
            response_format=Plan,
            logit_bias=biases(),
        )
        assert isinstance(parsed.choices[0].message.parsed, Plan)


async def test_thoughts_come_before_answers_and_apart_from_them(client):
    schema = {"name": "plan", "schema": Plan.model_json_schema(), "strict": True}
    form = {"response_format": {"type": "json_schema", "json_schema": schema}}
    ends = {"logit_bias": biases(), "max_completion_tokens": 400}
    thoughts = []
    for seed in range(3):
        thinking = form | ends | {"reasoning_effort": "high", "seed": seed}
        answer = await joined(client, **thinking)
        (choice,) = answer.choices
        Plan.model_validate_json(choice.message.content)
        # Absent where there is none.
        thoughts.append(getattr(choice.message, "reasoning_content", ""))
        assert answer.usage.completion_tokens_details.reasoning_tokens > 0
    assert any(thoughts)
    assert "</think>" not in "".join(thoughts)
    plain = await chat(client, reasoning_effort="none", max_completion_tokens=40)
    assert plain.usage.completion_tokens_details.reasoning_tokens == 0


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"get_weather", "clock-2"}),
        ({"type": "function", "function": {"name": "get_weather"}}, {"get_weather"}),
    ],
)
async def test_calls_have_arguments_of_the_schema(client, choice, names):
    for seed in range(3):
        asked = TOOLS | {"tool_choice": choice, "seed": seed, "logit_bias": biases()}
        answer = await joined(client, **asked, parallel_tool_calls=False)
        (told,) = answer.choices
        assert (told.finish_reason, told.message.content) == ("tool_calls", None)
        (call,) = told.message.tool_calls
        assert (call.type, call.function.name in names, bool(call.id)) == ("function", True, True)
        arguments = json.loads(call.function.arguments)
        if call.function.name == "get_weather":
            assert set(arguments) == {"city", "days"}
        else:
            assert arguments == {}


async def test_several_calls_of_one_answer_in_pieces(client):
    # The scripted engine goes on with calls for as long as it may.
    asked = TOOLS | {
        "tool_choice": "required",
        "logit_bias": biases(),
        "max_completion_tokens": 250,
    }
    calls: list[list[str]] = []
    async for piece in await chat(client, **asked, stream=True):
        for part in piece.choices[0].delta.tool_calls or []:
            if part.id:
                assert (part.index, part.type) == (len(calls), "function")
                assert part.function.arguments == ""
                calls.append([part.function.name, ""])
            else:
                assert (part.index, part.function.name) == (len(calls) - 1, None)
                calls[part.index][1] += part.function.arguments
    assert len(calls) > 1
    for _, arguments in calls[:-1]:
        json.loads(arguments)


async def test_functions_that_are_not_called(client):
    for choice in ("none", "auto"):
        (answer,) = (await joined(client, tools=[WEATHER], tool_choice=choice)).choices
        assert answer.finish_reason == "length"
        assert answer.message.tool_calls is None
    turns = [
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "clock-2", "arguments": "{}"},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]
    assert (await chat(client, messages=turns, tools=[CLOCK])).choices[0].message.content


async def test_messages_of_every_role_and_form(client):
    parts = [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]
    assert told(
        (await chat(client, messages=[{"role": "user", "content": parts}])).choices[0].message
    ) == told((await chat(client)).choices[0].message)
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "hello", "name": "ann"},
        {"role": "assistant", "content": "hi"},
        *HELLO,
    ]
    assert (await chat(client, messages=turns)).choices[0].message.content


async def test_tiers_users_and_what_is_taken_without_effect(client):
    for tier in ("auto", "default", "flex", "priority"):
        answer = await chat(client, service_tier=tier)
        assert answer.service_tier == ("default" if tier == "auto" else tier)
    await chat(client, user="ann", metadata={"a": "b"}, store=False, extra_body={"unknown": 1})
    with pytest.raises(openai.BadRequestError) as refused:
        await chat(client, store=True)
    assert refused.value.param == "store"


async def test_completions(client):
    ask = {"model": MODEL, "prompt": "once upon", "max_tokens": 6, "seed": 1}
    whole = await client.completions.create(**ask, logprobs=2)
    assert (whole.object, whole.id[:5]) == ("text_completion", "cmpl-")
    (choice,) = whole.choices
    assert (choice.index, choice.finish_reason) == (0, "length")
    told = choice.logprobs
    lengths = (told.tokens, told.token_logprobs, told.top_logprobs, told.text_offset)
    assert [len(one) for one in lengths] == [6] * 4
    assert whole.usage.completion_tokens == 6
    pieces = [p async for p in await client.completions.create(**ask, stream=True)]
    assert "".join(p.choices[0].text for p in pieces) == choice.text
    assert pieces[-1].choices[0].finish_reason == "length"
    echoed = await client.completions.create(**ask, echo=True)
    assert echoed.choices[0].text == "once upon" + choice.text
    several = await client.completions.create(**(ask | {"prompt": ["once upon", "a"]}), n=2)
    assert [one.index for one in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == choice.text
    tokens = await client.completions.create(**(ask | {"prompt": [70, 71, 72]}))
    assert tokens.usage.prompt_tokens == 3


async def test_the_client_of_threads(world):
    def ask():
        with openai.OpenAI(base_url=world.url, api_key="none", max_retries=0) as client:
            whole = client.chat.completions.create(**SHORT)
            pieces = list(client.chat.completions.create(**SHORT, stream=True))
            with client.chat.completions.with_streaming_response.create(**SHORT) as raw:
                assert raw.headers["x-request-id"]
                assert json.loads(raw.read())["object"] == "chat.completion"
            return whole, "".join(p.choices[0].delta.content or "" for p in pieces)

    whole, streamed = await asyncio.to_thread(ask)
    assert streamed == whole.choices[0].message.content


@pytest.mark.timeout(2 * FETCH_SECONDS)
async def test_the_node_package(world):
    folder = await asyncio.to_thread(node_folder)
    script = ["node", str(HERE / "essentials.mjs")]
    process = await asyncio.create_subprocess_exec(
        *script, str(folder), world.url, MODEL, json.dumps(biases()), stdout=-1, stderr=-2
    )
    out, _ = await asyncio.wait_for(process.communicate(), FETCH_SECONDS)
    assert process.returncode == 0, out.decode()
    await world.nothing_held()
