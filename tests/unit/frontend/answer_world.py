"""Answers for tests: functions to call, texts cut into pieces, what they come to."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from services.frontend.answers.deltas import CallArguments, CallBegins, Content, Delta, Reasoning
from services.frontend.answers.families import FAMILIES
from services.frontend.answers.format import AnswerFormat
from services.frontend.chat import Calling, Function, ToolChoice

WEATHER = Function(
    "get_weather",
    "The weather of a city",
    '{"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},'
    ' "required": ["city"], "additionalProperties": false}',
)
CLOCK = Function("clock-2")
TOOLS = (WEATHER, CLOCK)

AUTO = ToolChoice()
NONE = ToolChoice(Calling.NONE)
REQUIRED = ToolChoice(Calling.REQUIRED)

FORMATS = [name for name in FAMILIES if name != "plain"]


def form(name: str, tokens: bool = False, thinks: bool = False) -> AnswerFormat:
    """`tokens`: the vocabulary has all the format's markers as tokens; otherwise none of them."""
    family = FAMILIES[name]
    return AnswerFormat(family, list(family.markers.values()) if tokens else [], thinks)


def marked(text: str, answers: AnswerFormat) -> str:
    """As a detokenizer gives it where every marker in it is a token."""
    for marker, mark in answers.markers.items():
        text = text.replace(marker, mark)
    return text


def pieces(text: str, cuts: Iterable[int]) -> list[str]:
    at = sorted({cut % (len(text) + 1) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(at)]


def joined(deltas: Iterable[Delta]) -> list[Delta]:
    """The same in as few as can be."""
    found: list[Delta] = []
    for delta in deltas:
        match found[-1] if found else None, delta:
            case Content(a), Content(b):
                found[-1] = Content(a + b)
            case Reasoning(a), Reasoning(b):
                found[-1] = Reasoning(a + b)
            case CallArguments(i, a), CallArguments(j, b) if i == j:
                found[-1] = CallArguments(i, a + b)
            case _:
                found.append(delta)
    return found


def read(
    answers: AnswerFormat,
    parts: Sequence[str],
    choice: ToolChoice = AUTO,
    thinking_open: bool = False,
    tools: Sequence[Function] = TOOLS,
) -> list[Delta]:
    parser = answers.parser(tools, choice, thinking_open)
    deltas = [delta for part in parts for delta in parser.push(part)] + parser.finish()
    assert all(not isinstance(d, Content | Reasoning | CallArguments) or d.text for d in deltas)
    assert parser.calls == sum(isinstance(d, CallBegins) for d in deltas)
    return joined(deltas)


def call(index: int, name: str, arguments: str, call_id: str = "") -> list[Delta]:
    return [CallBegins(index, name, call_id), CallArguments(index, arguments)]
