"""Fields that OpenAI gives several types: read from JSON values, refused by their path. Pure."""

from __future__ import annotations

from typing import Any

from google.protobuf import struct_pb2

from services.runtime.errors import InvalidRequestError

Json = Any
"""None, bool, float, str, or lists and dicts of these."""

TEXT_PART = 'a string, or an array of parts {"type": "text", "text": ...}'


def json_of(value: struct_pb2.Value) -> Json:
    """What a google.protobuf.Value holds. Depth is bounded by what protobuf parses."""
    match value.WhichOneof("kind"):
        case "string_value":
            return value.string_value
        case "number_value":
            return value.number_value
        case "bool_value":
            return value.bool_value
        case "list_value":
            return [json_of(item) for item in value.list_value.values]
        case "struct_value":
            return object_of(value.struct_value)
    return None


def object_of(value: struct_pb2.Struct) -> dict[str, Json]:
    """The same of an object. Numbers that are whole become integers, as templates print them."""
    return {name: _whole(json_of(inner)) for name, inner in value.fields.items()}


def _whole(value: Json) -> Json:
    match value:
        case float():
            return int(value) if value.is_integer() else value
        case list():
            return [_whole(item) for item in value]
        case dict():
            return {name: _whole(inner) for name, inner in value.items()}
    return value


def text_of(path: str, value: Json) -> str | None:
    """Content of a message: a string, or parts of text joined; None if null.

    Raises InvalidRequestError, also for parts that are no text (images, audio), by name.
    """
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InvalidRequestError(path, value, TEXT_PART)
    return "".join(_part(f"{path}[{i}]", part) for i, part in enumerate(value))


def _part(path: str, part: Json) -> str:
    if not isinstance(part, dict):
        raise InvalidRequestError(path, part, 'a part is {"type": "text", "text": ...}')
    kind = part.get("type")
    if kind != "text":
        allowed = 'parts of type "text" only: images, audio and files can\'t be read'
        raise InvalidRequestError(f"{path}.type", kind, allowed)
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequestError(f"{path}.text", text, "a string")
    return text


def stops_of(value: Json) -> tuple[str, ...]:
    """`stop`: nothing, a string, or an array of strings. Raises InvalidRequestError."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise InvalidRequestError("stop", value, "a string, or an array of strings")
    for i, stop in enumerate(value):
        if not isinstance(stop, str):
            raise InvalidRequestError(f"stop[{i}]", stop, "a string")
    return tuple(value)


def prompts_of(value: Json, most: int, most_tokens: int) -> list[str | tuple[int, ...]]:
    """`prompt`: a string, strings, tokens, or arrays of tokens; at most so many, so long.

    Raises InvalidRequestError.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        allowed = "a string, or an array of strings, of tokens, or of arrays of tokens; not empty"
        raise InvalidRequestError("prompt", value, allowed)
    if isinstance(value[0], float):
        return [_tokens("prompt", value, most_tokens)]
    if len(value) > most:
        raise InvalidRequestError("prompt", f"{len(value)} prompts", f"at most {most}")
    prompts: list[str | tuple[int, ...]] = []
    for i, prompt in enumerate(value):
        path = f"prompt[{i}]"
        if isinstance(prompt, str):
            prompts.append(prompt)
        elif isinstance(prompt, list):
            prompts.append(_tokens(path, prompt, most_tokens))
        else:
            raise InvalidRequestError(path, prompt, "a string, or an array of tokens")
        if not isinstance(prompt, type(value[0])):
            raise InvalidRequestError(path, prompt, "strings and tokens can't be mixed")
    return prompts


def _tokens(path: str, values: list[Json], most: int) -> tuple[int, ...]:
    if len(values) > most:
        allowed = f"at most {most}, which the context window holds"
        raise InvalidRequestError(path, f"{len(values)} tokens", allowed)
    for i, value in enumerate(values):
        if not isinstance(value, float) or not value.is_integer() or value < 0:
            raise InvalidRequestError(f"{path}[{i}]", value, "a token's id, a whole number")
    return tuple(map(int, values))
