"""OpenAI's requests, read: what they come to, what is refused, and by which path."""

from __future__ import annotations

import pytest
from google.protobuf import json_format, struct_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.api import Guide, GuideKind
from services.frontend.chat import Call, Calling, ToolChoice, Turn
from services.frontend.openai.asking import Asking, Bounds, named_as, renamed
from services.frontend.openai.wire import NAMES, chat_from, completion_from
from services.frontend.validate import Prompt, Tokens
from services.runtime.errors import InvalidRequestError
from tandem.openai.v1 import openai_pb2 as pb

BOUNDS = Bounds(messages=4, tools=2, tools_bytes=200, choices=6)
TOOL = {"type": "function", "function": {"name": "f", "parameters": '{"type": "object"}'}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def chat(streaming: bool = False, **fields) -> Asking:
    fields.setdefault("messages", [{"role": "user", "content": "hi"}])
    request = json_format.ParseDict({"model": "m", **fields}, pb.CreateChatCompletionRequest())
    return chat_from(request, BOUNDS, stream=streaming)


def complete(streaming: bool = False, **fields) -> Asking:
    fields.setdefault("prompt", "hi")
    request = json_format.ParseDict({"model": "m", **fields}, pb.CreateCompletionRequest())
    return completion_from(request, BOUNDS, 8, stream=streaming)


def messages(*more: dict) -> dict:
    return {"messages": [{"role": "user", "content": "hi"}, *more]}


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}] * 5}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (messages({"role": "user", "content": 3}), "messages[1].content"),
        (messages({"role": "user", "content": ["x"]}), "messages[1].content[0]"),
        (
            messages({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}),
            "messages[1].content[0].type",
        ),
        (
            messages({"role": "user", "content": [{"type": "text", "text": 1}]}),
            "messages[1].content[0].text",
        ),
        (messages({"role": "tool", "content": "x"}), "messages[1].tool_call_id"),
        (
            messages({"role": "user", "content": "x", "tool_call_id": "c"}),
            "messages[1].tool_call_id",
        ),
        (
            messages({"role": "user", "content": "x", "tool_calls": [CALL]}),
            "messages[1].tool_calls",
        ),
        (
            messages({"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}),
            "messages[1].tool_calls[0].type",
        ),
        (
            messages({"role": "assistant", "tool_calls": [{"id": "c"}]}),
            "messages[1].tool_calls[0].function.name",
        ),
        ({"tools": [TOOL, TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": "{"}}]},
            "tools[0].function.parameters",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": "[]"}}]},
            "tools[0].function.parameters",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "description": "x" * 300}}]},
            "tools",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes", "tools": [TOOL]}, "tool_choice"),
        ({"tool_choice": {"type": "function"}, "tools": [TOOL]}, "tool_choice"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]},
            "tool_choice.function.name",
        ),
        ({"n": 0}, "n"),
        ({"n": 7}, "n"),
        ({"stop": 3}, "stop"),
        ({"stop": ["a", None]}, "stop[1]"),
        ({"stream": True}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"store": True}, "store"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"metadata": {"k": "x" * 513}}, "metadata.k"),
        ({"service_tier": "gold"}, "service_tier"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs.a b"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"01": 1}}, "logit_bias.01"),
        ({"logit_bias": {"\u0661": 1}}, "logit_bias.\u0661"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": "{}"}}},
            "response_format.json_schema.name",
        ),
        (
            {"response_format": {"type": "json_object"}, "guided_regex": "a"},
            "guided_regex",
        ),
        ({"response_format": {"type": "json_object"}, "tools": [TOOL]}, "response_format"),
        ({"guided_choice": ["a"], "tools": [TOOL]}, "guided_choice"),
        ({"ttft_seconds": -1}, "ttft_seconds"),
        ({"itl_seconds": "NaN"}, "itl_seconds"),
    ],
)
def test_chats_refused(fields, path):
    with pytest.raises(InvalidRequestError) as raised:
        chat(**fields)
    assert raised.value.metadata["field"] == path


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": ["a", [1]]}, "prompt[1]"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [1, -1]}, "prompt[1]"),
        ({"prompt": [[1], [1.5]]}, "prompt[1][0]"),
        ({"prompt": [1] * 9}, "prompt"),
        ({"prompt": ["a"] * 7}, "prompt"),
        ({"prompt": ["a"] * 4, "n": 2}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": 1, "echo": True}, "logprobs"),
    ],
)
def test_completions_refused(fields, path):
    with pytest.raises(InvalidRequestError) as raised:
        complete(**fields)
    assert raised.value.metadata["field"] == path


def test_a_conversation_is_read_whole():
    asking = chat(
        messages=[
            {
                "role": "developer",
                "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}],
            },
            {"role": "user", "content": "hi", "name": "ada"},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm"},
            {"role": "tool", "content": "3", "tool_call_id": "c1"},
        ],
        tools=[TOOL],
        chat_template_kwargs={"enable_thinking": True, "depth": 3, "of": [{"x": 2.5, "y": 2}]},
        reasoning_effort="none",
    )
    (given,) = asking.inputs
    assert given.turns == (
        Turn("developer", "be kind"),
        Turn("user", "hi", "ada"),
        Turn("assistant", None, calls=(Call("c1", "f", "{}"),), reasoning="hm"),
        Turn("tool", "3", "f", call_id="c1"),
    )
    assert given.variables == {
        "reasoning_effort": "none",
        "enable_thinking": True,
        "thinking": False,
        "depth": 3,
        "of": [{"x": 2.5, "y": 2}],
    }
    assert type(given.variables["depth"]) is int
    assert type(given.variables["of"][0]["y"]) is int
    assert asking.choice == ToolChoice(Calling.AUTO)


def test_a_refusal_is_what_the_assistant_said():
    (given,) = chat(**messages({"role": "assistant", "refusal": "no"})).inputs
    assert given.turns[1].content == "no"


def test_defaults():
    asking = chat()
    assert (asking.n, asking.priority, asking.session, asking.stop) == (1, 0, "", ())
    assert asking.choice.calling is Calling.NONE
    assert asking.parallel
    assert asking.sampling.max_tokens is None
    assert asking.sampling.seed is None
    assert not chat(parallel_tool_calls=False, tools=[TOOL]).parallel
    assert chat(max_tokens=3, max_completion_tokens=3).sampling.max_tokens == 3
    assert complete().sampling.max_tokens == 16
    assert chat(tools=[TOOL], tool_choice="none").choice.calling is Calling.NONE
    assert chat(stop="x").stop == ("x",)
    assert chat(stop=["x", "y"]).stop == ("x", "y")
    assert chat(seed=-1).sampling.seed == 2**64 - 1
    assert complete(best_of=2, n=2).n == 2


def test_prompts_of_all_kinds():
    assert complete(prompt="a").inputs == (Prompt("a"),)
    assert complete(prompt=["a", "b"]).inputs == (Prompt("a"), Prompt("b"))
    assert complete(prompt=[1, 2]).inputs == (Tokens((1, 2)),)
    assert complete(prompt=[[1], [2]]).inputs == (Tokens((1,)), Tokens((2,)))


def test_a_schema_is_taken_as_it_is_written():
    text = '{ "b": 1,  "a": 2 }'
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": text}}
    assert chat(response_format=form).sampling.guide == Guide(GuideKind.JSON_SCHEMA, (text,))


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ("sampling.top_p", "top_p"),
        ("chat.messages[2].content", "messages[2].content"),
        ("chat", "messages"),
        ("chat_template_kwargs.x", "chat_template_kwargs.x"),
        ("tokens.token_ids[3]", "prompt[3]"),
        ("session", "user"),
        ("stop[1]", "stop[1]"),
        ("", ""),
    ],
)
def test_fields_have_the_clients_names(here, there):
    assert renamed(here, NAMES) == there


def test_a_guides_faults_are_those_of_the_field_that_asks_for_it():
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": "{}"}}
    names = chat(response_format=form).names
    path = "response_format.json_schema.schema"
    assert renamed("sampling.guide.json_schema", names) == path
    assert renamed("sampling.guide.json_schema.properties", names) == f"{path}.properties"
    assert renamed("sampling.max_tokens", chat(max_tokens=3).names) == "max_tokens"
    assert renamed("sampling.max_tokens", chat().names) == "max_completion_tokens"
    with pytest.raises(InvalidRequestError) as raised, named_as(NAMES):
        raise InvalidRequestError("sampling.min_tokens", 3, "at most sampling.max_tokens")
    assert raised.value.message == "min_tokens: 3 is not allowed; at most max_tokens"
    assert raised.value.metadata["field"] == "min_tokens"


values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.sampled_from(["auto", "a"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "function", "name", "x"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


def value_of(value) -> struct_pb2.Value:
    made = struct_pb2.Value()
    match value:
        case None:
            made.null_value = 0
        case bool():
            made.bool_value = value
        case float() | int():
            made.number_value = value
        case str():
            made.string_value = value
        case list():
            made.list_value.values.extend(value_of(v) for v in value)
            made.list_value.SetInParent()
        case dict():
            made.struct_value.SetInParent()
            for key, inner in value.items():
                made.struct_value.fields[key].CopyFrom(value_of(inner))
    return made


@settings(max_examples=300, deadline=None)
@given(content=values, stop=values, choice=values, name=st.text(max_size=3), n=st.integers(0, 9))
def test_any_values_are_read_or_refused(content, stop, choice, name, n):
    request = pb.CreateChatCompletionRequest(model="m", n=n)
    message = request.messages.add(role="user")
    message.content.CopyFrom(value_of(content))
    request.stop.CopyFrom(value_of(stop))
    request.tool_choice.CopyFrom(value_of(choice))
    request.tools.add(type="function").function.name = name
    texts = pb.CreateCompletionRequest(model="m")
    texts.prompt.CopyFrom(value_of(content))
    for read in (
        lambda: chat_from(request, BOUNDS, stream=False),
        lambda: completion_from(texts, BOUNDS, 8, stream=False),
    ):
        try:
            asking = read()
        except InvalidRequestError as refused:
            error = refused
        else:
            assert all(isinstance(stop, str) for stop in asking.stop)
            continue
        assert error.metadata["field"]
