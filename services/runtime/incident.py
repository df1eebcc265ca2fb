"""What is logged of an exception nobody expected: everything but the request's text."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

WINDOW = 8
"""Characters in a row that count as a quotation."""

MAX_WORDS = 500


def report(error: BaseException, request: Any) -> str:
    """The exception's traceback and words. Words that quote the request are withheld.

    `request` is the message being served, or the last one read of a stream; anything else counts
    as having no text.
    """
    texts = list(_texts(request)) if isinstance(request, Message) else []
    return "\n".join(_chain(error, texts))


def _chain(error: BaseException, texts: list[str]) -> Iterator[str]:
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        yield from _chain(cause, texts)
        yield "which led to:"
    yield "".join(traceback.format_tb(error.__traceback__)).rstrip()
    words = str(error)[:MAX_WORDS]
    if any(_quotes(words, text) for text in texts):
        words = "(its words quote the request, and are withheld)"
    yield f"{type(error).__qualname__}: {words}"


def _quotes(words: str, text: str) -> bool:
    size = min(WINDOW, len(text))
    return size > 2 and any(words[i : i + size] in text for i in range(len(words) - size + 1))


def _texts(message: Message) -> Iterator[str]:
    for field, value in message.ListFields():
        values = value if field.is_repeated else [value]
        if field.type == FieldDescriptor.TYPE_STRING:
            yield from values
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            for item in values:
                if isinstance(item, Message):  # and not the keys of a map
                    yield from _texts(item)
