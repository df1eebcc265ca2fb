"""Over requests of all kinds: a stream comes to the whole answer; nothing is an internal error."""

from __future__ import annotations

import asyncio
import random

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.openai.v1 import openai_pb2 as pb
from tests.integration.openai_rig import an_openai_world, joined, tool, user

PIECES = ["[", "]", "{f(", ")}", '{"a": 1}', "é", "\N{PILE OF POO}", "abc", " ", "{", "x", "ab"]


def babble(request) -> bytes:
    """Something else for every seed."""
    r = random.Random(request.sampling.seed)
    text = "".join(r.choice(PIECES) for _ in range(r.randrange(12)))
    return text.encode() if r.random() < 0.8 else text.encode()[:-1]


@pytest.fixture(scope="module")
def rig():
    with asyncio.Runner() as runner:
        context = an_openai_world(babble)
        world = runner.run(context.__aenter__())
        try:
            yield runner, world
        finally:
            runner.run(context.__aexit__(None, None, None))


asked = st.fixed_dictionaries(
    {
        "seed": st.integers(-(2**63), 2**63 - 1),
        "n": st.sampled_from([1, 1, 2, 5]),
        "max_tokens": st.sampled_from([1, 2, 7, 100]),
    },
    optional={"logprobs": st.just(True), "min_tokens": st.just(1), "ignore_eos": st.booleans()},
)


@settings(max_examples=40, deadline=None)
@given(
    fields=asked,
    stop=st.lists(st.sampled_from(["ab", "x", "(", "é", "c "]), max_size=3),
    tools=st.booleans(),
    frame=st.integers(1, 4),
)
def test_a_stream_comes_to_the_whole_answer(rig, fields, stop, tools, frame):
    runner, world = rig
    world.world.decode["d0"].frame_tokens = frame
    fields = {**fields, "max_tokens": max(fields["max_tokens"], fields.get("min_tokens", 0))}
    request = user("hi", **fields)
    if stop:
        request.stop.list_value.extend(stop)
    if tools:
        request.tools.append(tool("f"))
    if request.logprobs:
        request.top_logprobs = 1
    named = [("x-request-id", "r")]

    async def both():
        whole = await world.chat(request, metadata=named)
        request.stream_options.include_usage = True
        pieces = await world.chat_stream(request, metadata=named)
        return whole, pieces

    whole, pieces = runner.run(both())
    *pieces, last = pieces
    streamed = joined(pieces)
    for choice in (*streamed, *whole.choices):
        # Absent or empty, where nothing was said.
        choice.message.content = choice.message.content
        if not choice.logprobs.content:
            choice.ClearField("logprobs")
    assert streamed == list(whole.choices)
    assert last.usage == whole.usage


numbers = st.sampled_from([0, 1, -1, 2, 0.5, 1e300, float("nan"), float("inf"), -0.0])
whole_numbers = st.sampled_from([0, 1, 2, 20, 128, 2**31 - 1, 2**32 - 1])
texts = st.sampled_from(["", "a", "auto", "none", "bytes", "pirate", "x" * 200, "\0", "{", "high"])


@st.composite
def messages(draw, kind):
    """A message with any of its fields set to anything."""
    message = kind()
    for field in kind.DESCRIPTOR.fields:
        if field.name == "stream" or draw(st.integers(0, 3)):
            continue
        # Of protobuf's own numbers of types.
        if field.message_type is not None and field.message_type.full_name.startswith("google"):
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entries = getattr(message, field.name)
            entries[draw(texts)] = draw(
                numbers if field.message_type.fields_by_name["value"].cpp_type == 5 else texts
            )
        elif field.message_type is not None:
            inner = draw(messages(getattr(pb, field.message_type.name)))
            target = getattr(message, field.name)
            target.extend([inner]) if field.is_repeated else target.CopyFrom(inner)
        else:
            made = draw(scalar(field))
            if field.is_repeated:
                getattr(message, field.name).extend([made])
            else:
                setattr(message, field.name, made)
    return message


def scalar(field):
    match field.cpp_type:
        case field.CPPTYPE_STRING:
            return texts
        case field.CPPTYPE_BOOL:
            return st.booleans()
        case field.CPPTYPE_DOUBLE:
            return numbers
        case field.CPPTYPE_INT32 | field.CPPTYPE_INT64:
            return st.sampled_from([0, 1, -1, 100, -(2**31), 2**31 - 1])
    return whole_numbers


FINE = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


@settings(max_examples=150, deadline=None)
@given(
    request=messages(pb.CreateChatCompletionRequest) | messages(pb.CreateCompletionRequest),
    sane=st.booleans(),
    content=st.text(max_size=5),
)
def test_no_request_is_an_internal_error(rig, request, sane, content):
    runner, world = rig
    request.model = "bytes"
    if isinstance(request, pb.CreateCompletionRequest):
        request.prompt.string_value = content
        method = world.stub.CreateCompletion
    else:
        if sane:  # most refusals are of messages; these have others
            del request.messages[:]
            request.ClearField("tools")
        request.messages.add(role="user").content.string_value = content
        method = world.stub.CreateChatCompletion
    code = runner.run(code_of(method(request, timeout=30)))
    assert code in FINE


async def code_of(call) -> grpc.StatusCode:
    return await call.code()
