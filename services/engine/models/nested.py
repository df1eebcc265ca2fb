"""Every text in a conversation, however deep: names, arguments and schemas as well as contents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any


def texts(value: object, at: str) -> Iterator[tuple[str, str]]:
    """Each text with its place, which begins with `at`. Keys are texts, too."""
    if isinstance(value, str):
        yield at, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield at, key
            yield from texts(inner, f"{at}.{key}")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from texts(inner, f"{at}[{i}]")


def replaced(value: Any, text: Callable[[str], str]) -> Any:
    """The same with each text replaced, in the order of texts(). All of it is a copy."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, Mapping):
        return {text(key): replaced(inner, text) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [replaced(inner, text) for inner in value]
    return value
