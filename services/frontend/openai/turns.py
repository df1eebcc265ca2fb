"""Conversations and functions, as OpenAI's messages have them. Nothing here is tokenized."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from services.frontend.chat import Call, Calling, Function, ToolChoice, Turn
from services.frontend.openai.values import Json, json_of, text_of
from services.runtime.errors import InvalidRequestError
from tandem.openai.v1 import openai_pb2 as pb

ROLES = ("system", "developer", "user", "assistant", "tool")
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
NAME_ALLOWED = 'at most 64 letters, digits, "_" and "-"'
CHOICES = '"none", "auto", "required", or {"type": "function", "function": {"name": ...}}'


def turns_of(messages: Sequence[pb.ChatMessage], most: int) -> tuple[Turn, ...]:
    """A conversation. Raises InvalidRequestError."""
    if not messages:
        raise InvalidRequestError("messages", [], "at least one message")
    if len(messages) > most:
        allowed = f"at most {most} (frontend.max_messages)"
        raise InvalidRequestError("messages", f"{len(messages)} messages", allowed)
    called: dict[str, str] = {}
    turns = []
    for i, message in enumerate(messages):
        turn = _turn(f"messages[{i}]", message, called)
        called.update((call.id, call.name) for call in turn.calls)
        turns.append(turn)
    return tuple(turns)


def _turn(path: str, message: pb.ChatMessage, called: dict[str, str]) -> Turn:
    """`called`: the functions of earlier calls by their ids."""
    role = message.role
    if role not in ROLES:
        raise InvalidRequestError(f"{path}.role", role, f"one of {', '.join(ROLES)}")
    content = text_of(f"{path}.content", json_of(message.content))
    calls = tuple(_call(f"{path}.tool_calls[{i}]", c) for i, c in enumerate(message.tool_calls))
    if calls and role != "assistant":
        raise InvalidRequestError(f"{path}.tool_calls", role, "only an assistant's turn has calls")
    if message.HasField("refusal") and role == "assistant" and content is None:
        content = message.refusal
    if content is None and not calls:
        allowed = "text; only an assistant's turn with tool_calls or a refusal may have none"
        raise InvalidRequestError(f"{path}.content", None, allowed)
    name = message.name
    if role == "tool":
        if not message.tool_call_id:
            allowed = "the id of the call that it answers"
            raise InvalidRequestError(f"{path}.tool_call_id", message.tool_call_id, allowed)
        name = name or called.get(message.tool_call_id, "")
    elif message.HasField("tool_call_id"):
        allowed = 'only a turn with role "tool" answers a call'
        raise InvalidRequestError(f"{path}.tool_call_id", message.tool_call_id, allowed)
    return Turn(
        role=role,
        content=content,
        name=name,
        calls=calls,
        call_id=message.tool_call_id,
        reasoning=message.reasoning_content if message.HasField("reasoning_content") else None,
    )


def _call(path: str, call: pb.ToolCall) -> Call:
    if call.type not in ("", "function"):
        raise InvalidRequestError(f"{path}.type", call.type, '"function"')
    if not NAME.fullmatch(call.function.name):
        raise InvalidRequestError(f"{path}.function.name", call.function.name, NAME_ALLOWED)
    return Call(call.id, call.function.name, call.function.arguments)


def functions_of(tools: Sequence[pb.Tool], most: int, most_bytes: int) -> tuple[Function, ...]:
    """What may be called: at most so many, with at most so many bytes of schemas and descriptions.

    Raises InvalidRequestError.
    """
    if len(tools) > most:
        allowed = f"at most {most} (frontend.max_tools)"
        raise InvalidRequestError("tools", f"{len(tools)} tools", allowed)
    size = sum(
        len((t.function.parameters + t.function.description).encode(errors="replace"))
        for t in tools
    )
    if size > most_bytes:
        allowed = f"at most {most_bytes} bytes together (frontend.tools_bytes)"
        raise InvalidRequestError("tools", f"{size} bytes", allowed)
    functions = [_function(f"tools[{i}]", tool) for i, tool in enumerate(tools)]
    names: set[str] = set()
    for i, function in enumerate(functions):
        if function.name in names:
            raise InvalidRequestError(
                f"tools[{i}].function.name", function.name, "another name than the others"
            )
        names.add(function.name)
    return tuple(functions)


def _function(path: str, tool: pb.Tool) -> Function:
    if tool.type != "function":
        raise InvalidRequestError(f"{path}.type", tool.type, '"function"')
    given = tool.function
    if not NAME.fullmatch(given.name):
        raise InvalidRequestError(f"{path}.function.name", given.name, NAME_ALLOWED)
    if given.parameters:
        check_schema_text(f"{path}.function.parameters", given.parameters)
    return Function(given.name, given.description, given.parameters, given.strict)


def check_schema_text(path: str, text: str) -> None:
    """It is a JSON object. Raises InvalidRequestError."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRequestError(path, text, "JSON") from None
    if not isinstance(found, dict):
        raise InvalidRequestError(path, text, "a JSON object")


def tool_choice_of(value: Json, functions: Sequence[Function]) -> ToolChoice:
    """What the answer may call. Raises InvalidRequestError."""
    if value is None:
        return ToolChoice(Calling.AUTO if functions else Calling.NONE)
    if isinstance(value, str):
        if value not in ("none", "auto", "required"):
            raise InvalidRequestError("tool_choice", value, CHOICES)
        calling = Calling(value)
        if calling is Calling.REQUIRED and not functions:
            raise InvalidRequestError("tool_choice", value, "only with tools")
        return ToolChoice(calling if functions else Calling.NONE)
    inner = value.get("function") if isinstance(value, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(name, str) or value.get("type") != "function":
        raise InvalidRequestError("tool_choice", value, CHOICES)
    if name not in [function.name for function in functions]:
        allowed = f"one of tools: {', '.join(f.name for f in functions) or 'there are none'}"
        raise InvalidRequestError("tool_choice.function.name", name, allowed)
    return ToolChoice(Calling.NAMED, name)
