"""Guides that make a model call functions in its own format, with arguments of their schemas."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from services.engine.api import Guide, GuideKind
from services.frontend.answers.families import THOUGHT, Family
from services.frontend.answers.marks import Marker
from services.frontend.chat import Function

_NOTHING = '{"type": "object", "properties": {}, "additionalProperties": false}'
"""Arguments of a function without parameters."""

_ANY = '{"type": "object"}'


@dataclass(frozen=True, slots=True)
class Thought:
    """The answer may begin with one; `open`: the prompt has begun it."""

    may: bool
    open: bool


def of_calls(family: Family, tools: Sequence[Function], parallel: bool, thought: Thought) -> Guide:
    """One call, or with `parallel` any number of them, where the family can make several."""
    calls = []
    for tool in tools:
        written = family.write(tool.name)
        schema = tool.parameters or _NOTHING
        calls.append([written.begin, written.then, schema, written.end])
    return _framed(
        thought,
        calls,
        before=family.calls.get(Marker.CALLS, ""),
        behind=family.calls.get(Marker.CALLS_END, ""),
        between=family.between,
        several=parallel and family.several,
    )


def behind_thought(guide: Guide, thought: Thought) -> Guide:
    """A guide to a JSON document behind a thought; others as they are."""
    match guide.kind:
        case GuideKind.JSON_SCHEMA:
            schema = guide.texts[0]
        case GuideKind.JSON_OBJECT:
            schema = _ANY
        case _:
            return guide
    return _framed(thought, [["", "", schema, ""]])


def _framed(
    thought: Thought,
    documents: list[list[str]],
    before: str = "",
    behind: str = "",
    between: str = "",
    several: bool = False,
) -> Guide:
    opening, closing = THOUGHT[Marker.THOUGHT], THOUGHT[Marker.THOUGHT_END]
    frame = {
        "thought": {"begins": "" if thought.open else opening, "ends": closing},
        "before": before,
        "documents": [
            dict(zip(("before", "number", "schema", "behind"), d, strict=True)) for d in documents
        ],
        "between": between,
        "several": several,
        "behind": behind,
    }
    if not thought.may:
        del frame["thought"]
    return Guide(GuideKind.FRAME, (json.dumps(frame, ensure_ascii=False),))
