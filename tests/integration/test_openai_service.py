"""OpenAIService: each field of its answers, whole and streamed, and what ends them early."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import grpc
import pytest
from google.protobuf import json_format

from services.engine.api import Guide, GuideKind
from services.frontend.answers.families import PLAIN
from services.frontend.answers.format import AnswerFormat
from services.frontend.openai.choices import seed_of
from tandem.decode.v1 import decode_pb2
from tandem.openai.v1 import openai_pb2 as pb
from tests.integration.openai_rig import (
    CONTEXT,
    an_openai_world,
    joined,
    refusal,
    say,
    tool,
    user,
)
from tests.integration.test_frontend import eventually

PROMPT = len("user:hi\n")


@pytest.fixture
async def world():
    async with an_openai_world(now=lambda: 1_700_000_000.5) as it:
        yield it


async def test_a_whole_answer_has_every_field(world):
    call = world.chat(user("hi"), metadata=[("x-request-id", "mine-1")])
    answer = await call
    assert (answer.id, answer.object) == ("chatcmpl-mine-1", "chat.completion")
    assert (answer.created, answer.model, answer.service_tier) == (
        1_700_000_000,
        "bytes",
        "default",
    )
    assert answer.system_fingerprint.startswith("fp_")
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason) == (0, "stop")
    assert (choice.message.role, choice.message.content) == ("assistant", "hello")
    assert not choice.message.HasField("reasoning_content")
    assert not choice.message.tool_calls
    assert not choice.HasField("logprobs")
    usage = answer.usage
    # The end counts: it was generated.
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (PROMPT, 6, 14)
    assert usage.prompt_tokens_details.cached_tokens == 3
    assert usage.completion_tokens_details.reasoning_tokens == 0
    assert dict(await call.initial_metadata())["x-request-id"] == "mine-1"


async def test_a_stream_comes_as_openai_sends_it(world):
    request = user("hi")
    request.stream_options.include_usage = True
    pieces = await world.chat_stream(request)
    assert {p.id for p in pieces} == {"chatcmpl-made-0"}
    assert {p.object for p in pieces} == {"chat.completion.chunk"}
    assert {(p.created, p.model) for p in pieces} == {(1_700_000_000, "bytes")}
    assert len({p.system_fingerprint for p in pieces}) == 1
    assert [p.service_tier for p in pieces] == ["default", *[""] * (len(pieces) - 1)]
    first, *said, last, usage = pieces
    assert json_format.MessageToDict(first.choices[0].delta) == {"role": "assistant", "content": ""}
    for piece in said:
        delta = piece.choices[0].delta
        assert [field.name for field, _ in delta.ListFields()] == ["content"]
        assert not piece.choices[0].HasField("finish_reason")
    assert "".join(p.choices[0].delta.content for p in said) == "hello"
    assert not last.choices[0].delta.ListFields()
    assert last.choices[0].finish_reason == "stop"
    assert not usage.choices
    assert usage.usage == (await world.chat(user("hi"))).usage
    assert not any(p.HasField("usage") for p in pieces[:-1])
    assert not any(p.HasField("usage") for p in await world.chat_stream(user("hi")))


async def test_thoughts_and_calls_are_told_apart():
    async with an_openai_world(say('[let me see]so {f({"a": 1})}{g()}')) as world:
        request = user("hi", tools=[tool("f"), tool("g")])
        answer = await world.chat(request, metadata=[("x-request-id", "r")])
        (choice,) = answer.choices
        assert choice.finish_reason == "tool_calls"
        message = choice.message
        assert (message.content, message.reasoning_content) == ("so ", "let me see")
        assert [(c.id, c.type) for c in message.tool_calls] == [
            ("call_r_0_0", "function"),
            ("call_r_0_1", "function"),
        ]
        assert [(c.function.name, c.function.arguments) for c in message.tool_calls] == [
            ("f", '{"a": 1}'),
            ("g", ""),
        ]
        # "let me see" and "]", which was a thought's as it came.
        assert answer.usage.completion_tokens_details.reasoning_tokens == 11
        pieces = await world.chat_stream(request, metadata=[("x-request-id", "r")])
        assert joined(pieces) == list(answer.choices)
        calls = [c for p in pieces for i in p.choices for c in i.delta.tool_calls]
        begun = [c for c in calls if c.HasField("id")]
        assert [(c.index, c.function.name, c.function.arguments) for c in begun] == [
            (0, "f", ""),
            (1, "g", ""),
        ]
        assert all(not c.function.HasField("name") for c in calls if not c.HasField("id"))


async def test_an_answer_of_calls_alone_has_no_content():
    async with an_openai_world(say("{f(1)}")) as world:
        answer = await world.chat(user("hi", tools=[tool("f")]))
        assert not answer.choices[0].message.HasField("content")
        for request in (user("hi", tools=[tool("f")]), user("hi")):
            assert (await world.chat(request)).choices[0].finish_reason == "tool_calls"


async def test_an_answer_without_a_word_has_content():
    async with an_openai_world(say("")) as world:
        message = (await world.chat(user("hi"))).choices[0].message
        assert message.HasField("content")
        assert message.content == ""
        (choice,) = joined(await world.chat_stream(user("hi")))
        assert choice.finish_reason == "stop"


async def test_a_thought_that_the_prompt_opened():
    async with an_openai_world(say("hm]yes")) as world:
        request = user("hi")
        request.messages.add(role="assistant").content.string_value = "["
        world.model.thinks_after = lambda prompt: True
        message = (await world.chat(request)).choices[0].message
        assert (message.reasoning_content, message.content) == ("hm", "yes")


async def test_answers_of_a_plain_model_are_all_content():
    async with an_openai_world(say("[a]{f(1)}"), AnswerFormat(PLAIN)) as world:
        assert (await world.chat(user("hi"))).choices[0].message.content == "[a]{f(1)}"


async def test_length_ends_an_answer(world):
    for field in ("max_tokens", "max_completion_tokens"):
        answer = await world.chat(user("hi", **{field: 3}))
        assert answer.choices[0].message.content == "hel"
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 3


async def test_stop_strings_end_an_answer_and_are_no_part_of_it(world):
    request = user("hi")
    request.stop.string_value = "l"
    answer = await world.chat(request)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("he", "stop")
    request.stop.list_value.extend(["x", "lo"])
    assert joined(await world.chat_stream(request))[0].message.content == "hel"


async def test_logprobs_spell_tokens_exactly_where_they_split_characters():
    async with an_openai_world(say("é\N{PILE OF POO}")) as world:
        request = user("hi", logprobs=True, top_logprobs=2)
        (choice,) = (await world.chat(request)).choices
        tokens = choice.logprobs.content
        assert bytes(b for t in tokens for b in t.bytes).decode() == choice.message.content
        assert len(tokens) == 6  # and none of the token that ends it
        assert tokens[0].token == "\N{REPLACEMENT CHARACTER}"
        assert list(tokens[0].bytes) == [0xC3]
        assert tokens[0].logprob == -0.125
        assert [t.logprob for t in tokens[0].top_logprobs] == [-0.125, -0.25]
        assert list(tokens[0].top_logprobs[1].bytes) == [0xC4]
        assert joined(await world.chat_stream(request)) == [choice]
        assert (
            not (await world.chat(user("hi", logprobs=True)))
            .choices[0]
            .logprobs.content[0]
            .top_logprobs
        )


def echo_seed(request) -> bytes:
    """Different for every seed and prompt."""
    return f"{request.sampling.seed:x} {len(request.prompt_token_ids)}".encode()


async def test_n_answers_come_of_seeds_of_one_and_the_first_is_that_of_one_alone():
    async with an_openai_world(echo_seed) as world:
        alone = await world.chat(user("hi", seed=7))
        four = await world.chat(user("hi", seed=7, n=4))
        said = [c.message.content for c in four.choices]
        assert [c.index for c in four.choices] == [0, 1, 2, 3]
        assert said[0] == alone.choices[0].message.content
        assert [int(text.split()[0], 16) for text in said] == [seed_of(7, k) for k in range(4)]
        assert len(set(said)) == 4
        streamed = joined(await world.chat_stream(user("hi", seed=7, n=4)))
        assert streamed == list(four.choices)
        assert four.usage.prompt_tokens == PROMPT
        assert four.usage.completion_tokens == sum(len(text) + 1 for text in said)
        negative = await world.chat(user("hi", seed=-1))
        assert negative.choices[0].message.content.split()[0] == "f" * 16


async def test_the_other_answers_begin_when_the_first_has_its_first_token():
    async with an_openai_world() as world:
        speaker = world.world.decode["d0"]
        speaker.pause_at = 0
        answer = asyncio.ensure_future(world.chat(user("hi", n=3)))
        await speaker.paused.wait()
        assert [p.request_id for p in world.coordinator.places] == ["made-0"]
        speaker.go_on()
        assert len((await answer).choices) == 3
        places = world.coordinator.places
        assert [p.request_id for p in places] == ["made-0", "made-0#1", "made-0#2"]
        # They are kept where the prompt is.
        assert {p.session for p in places} == {"made-0"}
        assert world.model.encoded == 1
        await world.world.settled()


@pytest.mark.parametrize("streamed", [False, True])
async def test_all_answers_end_when_the_client_leaves(streamed):
    async with an_openai_world(say("x" * 100)) as world:
        speaker = world.world.decode["d0"]
        speaker.pause_at = 4
        send = world.chat_stream if streamed else world.chat
        call = asyncio.ensure_future(send(user("hi", n=3)))
        await eventually(lambda: len(speaker.running) == 3)
        await eventually(lambda: all(len(r.tokens) == 4 for r in speaker.running.values()))
        call.cancel()
        await world.world.settled()
        assert len(speaker.cancels) == 3


@pytest.mark.parametrize("streamed", [False, True])
async def test_one_answers_failure_ends_all(world, streamed):
    speaker = world.world.decode["d0"]
    speaker.pause_at = 3
    send = world.chat_stream if streamed else world.chat
    call = asyncio.ensure_future(send(user("hi", n=2)))
    await eventually(lambda: len(speaker.running) == 2)
    await eventually(lambda: all(len(r.tokens) == 3 for r in speaker.running.values()))
    speaker.break_off("made-0#1/0")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    assert refusal(raised.value) == ("DEADLINE", "")
    await world.world.settled()
    assert speaker.cancels == ["made-0/0"]


@pytest.mark.parametrize("n", [1, 3])
async def test_a_stream_goes_on_when_its_worker_dies(n):
    text = "[thinking of it]{f(12)} and more"
    async with an_openai_world(say(text)) as world:
        await world.add("d1", say(text))
        request = user("hi", n=n, logprobs=True, tools=[tool("f")])
        expected = await world.chat(request, metadata=[("x-request-id", "r")])
        await world.world.settled()
        first = world.world.decode["d0"]
        first.pause_at = 9
        call = asyncio.ensure_future(world.chat_stream(request, metadata=[("x-request-id", "r")]))
        await eventually(lambda: len(first.running) == n)
        await eventually(lambda: all(len(r.tokens) == 9 for r in first.running.values()))
        await world.world.kill("d0")
        assert joined(await call) == list(expected.choices)


async def test_an_error_after_the_first_piece_ends_the_stream(world):
    speaker = world.world.decode["d0"]
    speaker.pause_at = 3
    message = pb.StreamChatCompletionRequest(request=user("hi"))
    call = world.stub.StreamChatCompletion(message, timeout=20)
    pieces = [await call.read()]
    while joined(pieces)[0].message.content != "hel":
        pieces.append(await call.read())
    speaker.break_off("made-0/0")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call.read()
    assert refusal(raised.value) == ("DEADLINE", "")


async def test_wishes_reach_the_coordinator(world):
    request = user("hi", user="alice", service_tier="flex", ttft_seconds=0.5, itl_seconds=0.1)
    answer = await world.chat(request)
    assert answer.service_tier == "flex"
    (place,) = world.coordinator.places
    assert (place.session, place.priority) == ("alice", -50)
    assert 0 < place.ttft_seconds <= 0.5
    assert place.itl_seconds == 0.1
    await world.chat(user("hi", service_tier="priority"))
    await world.chat(user("hi", service_tier="flex", priority=3))
    assert [p.priority for p in world.coordinator.places[1:]] == [50, 3]


async def test_sampling_reaches_the_worker(world):
    request = user(
        "hi",
        temperature=0.5,
        top_p=0.25,
        presence_penalty=1.5,
        frequency_penalty=-0.5,
        top_k=5,
        min_p=0.125,
        repetition_penalty=2.0,
        min_tokens=2,
        stop_token_ids=[7, 8],
        max_tokens=9,
        seed=11,
    )
    request.logit_bias["65"] = -100
    request.logit_bias["66"] = 1.5
    await world.chat(request)
    sampling = world.world.decode["d0"].starts[0].request.sampling
    assert sampling.temperature == 0.5
    assert (sampling.top_p, sampling.min_p, sampling.top_k) == (0.25, 0.125, 5)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1.5, -0.5)
    assert (sampling.repetition_penalty, sampling.min_tokens) == (2.0, 2)
    assert (list(sampling.stop_token_ids), sampling.max_tokens) == ([7, 8], 9)
    assert (sampling.seed, dict(sampling.logit_bias)) == (11, {65: -100.0, 66: 1.5})


async def test_forms_reach_the_worker_with_their_keys_in_order(world):
    schema = '{"type": "object", "properties": {"zebra": {"type": "null"}, "ant": {}}}'
    request = user("hi")
    request.response_format.type = "json_schema"
    request.response_format.json_schema.name = "animals"
    request.response_format.json_schema.schema = schema
    await world.chat(request)
    for form in ({"type": "json_object"}, {"type": "text"}):
        await world.chat(user("hi", response_format=form))
    await world.chat(user("hi", guided_choice=["a", "b"]))
    starts = [s.request.sampling for s in world.world.decode["d0"].starts]
    assert starts[0].guide.json_schema == schema
    assert starts[1].guide.WhichOneof("form") == "json_object"
    assert not starts[2].HasField("guide")
    assert list(starts[3].guide.choice.texts) == ["a", "b"]


async def test_calls_that_are_required_are_held_to_their_form(world):
    request = user("hi", tools=[tool("f"), tool("g")])
    request.tool_choice.string_value = "required"
    await world.chat(request)
    json_format.ParseDict(
        {"type": "function", "function": {"name": "g"}}, request.tool_choice.struct_value
    )
    await world.chat(request)
    request.tool_choice.string_value = "none"
    await world.chat(request)
    either, named, none = (s.request.sampling for s in world.world.decode["d0"].starts)
    assert either.guide.regex == r"\{(f|g)\(.*\)\}"
    assert named.guide.regex == r"\{(g)\(.*\)\}"
    assert not none.HasField("guide")


async def test_a_functions_schema_that_cant_be_enforced_is_named(world):
    world.model.answers.guide = lambda *_: Guide(GuideKind.JSON_SCHEMA, ('{"type": "odd"}',))
    request = user("hi", tools=[tool("f"), tool("g", '{"type": "odd"}')])
    request.tool_choice.string_value = "required"
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await world.chat(request)
    assert refusal(raised.value) == ("INVALID_REQUEST", "tools[1].function.parameters")
    request = user("hi")
    request.response_format.type = "json_schema"
    request.response_format.json_schema.name = "x"
    request.response_format.json_schema.schema = '{"type": "odd"}'
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await world.chat(request)
    path = "response_format.json_schema.schema"
    assert refusal(raised.value) == ("INVALID_REQUEST", path)
    assert world.world.coordinator.places == []


async def test_an_adapter_is_asked_for_as_a_model(world):
    request = user("hi")
    request.model = "pirate"
    answer = await world.chat(request)
    plain = await world.chat(user("hi"))
    assert answer.model == "pirate"
    assert [p.adapter for p in world.coordinator.places] == ["pirate@0a", ""]
    assert answer.system_fingerprint != plain.system_fingerprint


async def test_the_fingerprint_is_of_what_decides_tokens():
    prints = []
    for numerics in (("n1",), ("n1",), ("n2",), ("n1", "n2")):
        async with an_openai_world() as world:
            world.coordinator.numerics = numerics
            prints.append((await world.chat(user("hi"))).system_fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


async def test_models(world):
    models = (await world.stub.ListModels(pb.ListModelsRequest())).data
    assert [(m.id, m.parent, m.object) for m in models] == [
        ("bytes", "", "model"),
        ("pirate", "bytes", "model"),
    ]
    assert {(m.created, m.owned_by, m.max_model_len) for m in models} == {
        (1_700_000_000, "tandem", CONTEXT)
    }
    for model in models:
        one = await world.stub.RetrieveModel(pb.RetrieveModelRequest(model=model.id))
        assert one.SerializeToString() == model.SerializeToString()
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await world.stub.RetrieveModel(pb.RetrieveModelRequest(model="gpt-4"))
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND
    assert refusal(raised.value) == ("UNKNOWN_MODEL", "model")


async def test_tokens_of_texts_and_conversations(world):
    ask = pb.TokenizeRequest(model="bytes", prompt="hé", return_token_strs=True)
    answer = await world.stub.Tokenize(ask)
    assert list(answer.tokens) == [257, *"hé".encode()]
    assert (answer.count, answer.max_model_len) == (4, CONTEXT)
    cut = "\N{REPLACEMENT CHARACTER}"
    assert list(answer.token_strs) == ["<|turn|>", "h", cut, cut]
    ask.add_special_tokens = False
    assert list((await world.stub.Tokenize(ask)).tokens) == list("hé".encode())
    chat = pb.TokenizeRequest(model="bytes", messages=user("hi").messages, tools=[tool("f")])
    tokens = (await world.stub.Tokenize(chat)).tokens
    assert bytes(tokens) == b"fuser:hi\n"
    text = await world.stub.Detokenize(pb.DetokenizeRequest(model="bytes", tokens=[257, *tokens]))
    assert text.prompt == "fuser:hi\n"


def completion(prompt, **fields) -> pb.CreateCompletionRequest:
    request = pb.CreateCompletionRequest(model="bytes", **fields)
    json_format.ParseDict(prompt, request.prompt)
    return request


async def test_a_completion_has_every_field(world):
    answer = await world.complete(completion("ab"))
    assert (answer.id, answer.object, answer.model) == ("cmpl-made-0", "text_completion", "bytes")
    (choice,) = answer.choices
    assert (choice.index, choice.text, choice.finish_reason) == (0, "hello", "stop")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 6)
    # No conversation: nothing is a thought or a call.
    request = completion("ab")
    request.stream_options.include_usage = True
    *pieces, last = await world.complete_stream(request)
    assert "".join(p.choices[0].text for p in pieces) == "hello"
    assert [p.choices[0].finish_reason for p in pieces] == [*[""] * (len(pieces) - 1), "stop"]
    assert not last.choices
    assert last.usage == answer.usage


@pytest.mark.parametrize("streamed", [False, True])
async def test_many_prompts_have_n_continuations_each(streamed):
    async with an_openai_world(echo_seed) as world:
        for prompts, sizes in ((["a", "bcd"], (2, 4)), ([[97], [98, 99, 100]], (1, 3))):
            request = completion(prompts, n=2, seed=7, max_tokens=40)
            expected = [f"{seed_of(7, k):x} {size}" for size in sizes for k in range(2)]
            if streamed:
                texts = [""] * 4
                for piece in await world.complete_stream(request):
                    texts[piece.choices[0].index] += piece.choices[0].text
                assert texts == expected
            else:
                answer = await world.complete(request)
                assert [c.text for c in answer.choices] == expected
                assert [c.index for c in answer.choices] == [0, 1, 2, 3]
                assert answer.usage.prompt_tokens == sum(sizes)


async def test_a_completion_generates_16_tokens_unless_asked():
    async with an_openai_world(say("x" * 100)) as world:
        assert len((await world.complete(completion("a"))).choices[0].text) == 16


async def test_echo_says_the_prompt_first(world):
    for prompt in ("abc", [97, 98, 99]):
        answer = await world.complete(completion(prompt, echo=True))
        assert answer.choices[0].text == "abchello"
        pieces = await world.complete_stream(completion(prompt, echo=True))
        assert "".join(p.choices[0].text for p in pieces) == "abchello"


async def test_logprobs_of_completions_have_offsets_in_characters():
    async with an_openai_world(say("é1")) as world:
        request = completion("a", logprobs=2)
        (choice,) = (await world.complete(request)).choices
        logprobs = choice.logprobs
        assert list(logprobs.tokens) == [r"bytes:\xc3", r"bytes:\xa9", "1"]
        assert list(logprobs.text_offset) == [0, 0, 1]
        assert list(logprobs.token_logprobs) == [-0.125] * 3
        assert dict(logprobs.top_logprobs[2]) == {"1": -0.125, "2": -0.25}
        streamed = pb.CompletionLogprobs()
        for piece in await world.complete_stream(request):
            streamed.MergeFrom(piece.choices[0].logprobs)
        assert streamed == logprobs


async def test_a_request_with_the_name_of_a_live_one_is_refused(world):
    speaker = world.world.decode["d0"]
    speaker.pause_at = 1
    named = [("x-request-id", "same")]
    first = asyncio.ensure_future(world.chat(user("hi"), metadata=named))
    await speaker.paused.wait()
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await world.chat(user("hi"), metadata=named)
    assert raised.value.code() is grpc.StatusCode.ALREADY_EXISTS
    speaker.go_on()
    await first


async def test_late_words_of_a_name_used_before_are_not_taken_for_its_own(world):
    """A stop string ends a request here; its worker hears of that later, and may have gone on."""
    named = [("x-request-id", "again")]
    request = user("hi")
    request.stop.string_value = "l"
    assert (await world.chat(request, metadata=named)).choices[0].message.content == "he"
    speaker = world.world.decode["d0"]
    speaker.pause_at = 0
    second = asyncio.ensure_future(world.chat(user("hi"), metadata=named))
    await speaker.paused.wait()
    late = decode_pb2.RequestOutput(request_id="again/0", token_ids=list(b"late"))
    speaker.streams_out[-1].put_nowait(decode_pb2.DecodeResponse(outputs=[late]))
    speaker.go_on()
    assert (await second).choices[0].message.content == "hello"
    assert [s.request.request_id for s in speaker.starts] == ["again/0", "again/0~1"]


async def test_nothing_is_tokenized_of_what_can_hardly_fit(world):
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await world.chat(user("x" * (CONTEXT * 32 + 1)))
    assert refusal(raised.value) == ("INVALID_REQUEST", "messages")
    assert world.model.encoded == 0
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await world.chat(user("x" * CONTEXT))
    assert refusal(raised.value) == ("INVALID_REQUEST", "messages")
    assert world.model.encoded == 1


async def test_a_model_that_takes_no_tools_refuses_them_untokenized():
    async with an_openai_world(answers=AnswerFormat(PLAIN)) as world:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await world.chat(user("hi", tools=[tool("f")]))
        assert refusal(raised.value) == ("INVALID_REQUEST", "tools")
        assert world.model.encoded == 0


async def test_the_client_in_the_docs_works_as_pasted(world, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "openai.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert "127.0.0.1:7400" in block
    script = tmp_path / "client.py"
    script.write_text(block.replace("127.0.0.1:7400", world.world.address))
    client = await asyncio.create_subprocess_exec(
        sys.executable, str(script), stdout=asyncio.subprocess.PIPE, cwd=tmp_path
    )
    out, _ = await asyncio.wait_for(client.communicate(), 60)
    assert client.returncode == 0
    assert out.decode() == "hello\n 6 tokens\n"
