"""Guides to calls: what they let through, a parser reads, and it is JSON of the schema."""

from __future__ import annotations

import json

import pytest

from services.engine.api import Guide, GuideKind
from services.engine.guides.guided import Guided
from services.engine.guides.vocabulary import Vocabulary
from services.engine.wire import guide_from, guide_to
from services.frontend.answers.deltas import Content, Reasoning
from services.frontend.answers.families import FAMILIES
from services.frontend.answers.format import AnswerFormat
from services.frontend.answers.marks import Marker
from services.frontend.chat import Calling, Function, ToolChoice
from services.runtime.errors import InvalidRequestError
from tests.unit.frontend.answer_world import (
    AUTO,
    FORMATS,
    REQUIRED,
    TOOLS,
    call,
    form,
    joined,
    read,
)

EOS = 256
DONE = "\0"
VOCABULARY = Vocabulary([bytes([b]) for b in range(256)] + [b""], 260, [EOS])
ARGUMENTS = {"get_weather": '{"city": "東京 </tool_call>", "days": 2}', "clock-2": "{}"}


def follows(guide: Guide, text: str) -> str:
    """How much of the text the guide lets through, and DONE if it may end there."""
    guided = Guided(VOCABULARY, guide)
    for i, byte in enumerate(text.encode()):
        if not guided.masks()[0][byte // 32] >> (byte % 32) & 1:
            return text.encode()[:i].decode(errors="replace")
        guided.accept([byte])
    return text + DONE * bool(guided.masks()[0][EOS // 32] >> (EOS % 32) & 1)


def written(answers: AnswerFormat, *names: str, arguments: str | None = None) -> str:
    """What the model writes to call these."""
    family = FAMILIES[answers.name]
    calls = []
    for i, name in enumerate(names):
        w = family.write(name)
        begin = f"{w.begin}{i}{w.then}" if w.then else w.begin
        calls.append(begin + (arguments or ARGUMENTS[name]) + w.end)
    before, behind = (family.calls.get(m, "") for m in (Marker.CALLS, Marker.CALLS_END))
    return before + family.between.join(calls) + behind


def guide_of(answers: AnswerFormat, choice: ToolChoice = REQUIRED, **asked: bool) -> Guide:
    asked = {"parallel": True, "thinking_open": False} | asked
    guide = answers.guide(TOOLS, choice, **asked)
    assert guide is not None
    return guide


@pytest.mark.parametrize("name", FORMATS)
def test_calls_are_let_through_and_nothing_else(name: str) -> None:
    answers = form(name)
    guide = guide_of(answers)
    one, other = written(answers, "get_weather"), written(answers, "clock-2")
    for text in (one, other):
        assert follows(guide, text) == text + DONE
        assert follows(guide, text[:-1]) == text[:-1]  # no end before the end
        assert not follows(guide, text + "x").endswith(("x", DONE))
    assert follows(guide, "Hello") == ""
    wrong = written(answers, "get_weather", arguments='{"town": 1}')
    assert len(follows(guide, wrong)) == wrong.index("town")
    assert not follows(guide, written(answers, "clock-2", arguments='{"a": 1}')).endswith(DONE)
    name_at = one.index("get_weather")
    assert len(follows(guide, one.replace("get_weather", "get_whether"))) == name_at + len("get_w")


@pytest.mark.parametrize("name", FORMATS)
def test_several_calls_where_the_model_makes_several(name: str) -> None:
    answers = form(name)
    text = written(answers, "clock-2", "get_weather", "clock-2")
    may = name != "llama"
    assert follows(guide_of(answers), text).endswith(DONE) == may
    assert not follows(guide_of(answers, parallel=False), text).endswith(DONE)
    calls = [*call(0, "clock-2", "{}"), *call(1, "get_weather", ARGUMENTS["get_weather"])]
    if may and name != "kimi_k2":
        assert read(answers, [written(answers, "clock-2", "get_weather")], REQUIRED) == calls


@pytest.mark.parametrize("name", FORMATS)
def test_the_named_function_once(name: str) -> None:
    answers = form(name)
    guide = guide_of(answers, ToolChoice(Calling.NAMED, "clock-2"))
    text = written(answers, "clock-2")
    assert follows(guide, text) == text + DONE
    assert not follows(guide, written(answers, "get_weather")).endswith(DONE)
    assert not follows(guide, written(answers, "clock-2", "clock-2")).endswith(DONE)


@pytest.mark.parametrize("name", FORMATS)
def test_a_thought_comes_first(name: str) -> None:
    answers = form(name, thinks=True)
    thought, calls = "Hm: </thin </think>\n\n", written(answers, "get_weather")
    opened = guide_of(answers, thinking_open=True)
    assert follows(opened, thought + calls) == thought + calls + DONE
    assert not follows(opened, "Hm").endswith(DONE)
    assert not follows(opened, thought + "Hello").endswith("Hello")
    parsed = read(answers, [thought + calls], REQUIRED, thinking_open=True)
    assert parsed[0] == Reasoning("Hm: </thin ")
    may = guide_of(answers)
    for text in (calls, "<think>" + thought + calls):
        assert follows(may, text) == text + DONE
    assert follows(may, "Hm") == ""


def test_json_behind_a_thought() -> None:
    answers = form("deepseek_v3", thinks=True)
    schema = Guide(GuideKind.JSON_SCHEMA, ('{"type": "integer"}',))
    for guide, document in ((schema, "5"), (Guide(GuideKind.JSON_OBJECT), '{"a": 1}')):
        after = answers.after_thought(guide, thinking_open=True)
        text = f"So.</think>\n\n{document}"
        assert follows(after, text) == text + DONE
        assert read(answers, [text], thinking_open=True)[1] == Content(document)
        assert not follows(after, "So.</think>\n\nx").endswith("x")
        assert form("hermes").after_thought(guide, thinking_open=False) == guide
    # A guide lets a model spell what its vocabulary has as a token: no part of the document.
    tokens = form("deepseek_v3", tokens=True, thinks=True)
    parser = tokens.parser((), ToolChoice(Calling.NONE), False, guided=True)
    told = parser.push('<think>So.</think>\n\n{"a": "</think>"}') + parser.finish()
    assert joined(told) == [Reasoning("So."), Content('{"a": "</think>"}')]
    regex = Guide(GuideKind.REGEX, ("a+",))
    assert answers.after_thought(regex, thinking_open=True) == regex


@pytest.mark.parametrize("choice", [AUTO, ToolChoice(Calling.NONE)])
def test_a_model_that_is_free_has_no_guide(choice: ToolChoice) -> None:
    assert form("hermes").guide(TOOLS, choice, True, False) is None


def test_what_can_not_be_enforced_is_refused_by_its_place() -> None:
    tool = Function("f", parameters='{"type": "object", "unevaluatedItems": 5}')
    guide = form("hermes").guide((TOOLS[0], tool), REQUIRED, True, False)
    assert guide is not None
    with pytest.raises(InvalidRequestError, match=r"guide\.frame\.documents\[1\]\.schema: 'unev"):
        Guided(VOCABULARY, guide)


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        ("[]", "an object with documents"),
        ("{", "must be JSON"),
        ('{"documents": []}', "1 to 256"),
        ('{"documents": [5]}', r"documents\[0\]: 5"),
        ('{"documents": [{"schema": 5}]}', r"documents\[0\]\.schema: 5 .* a text"),
        ('{"documents": [{}]}', r"documents\[0\]\.schema"),
        ('{"documents": [{"schema": "true"}], "x": 1}', "'x' is not allowed"),
        ('{"documents": [{"schema": "true"}], "before": 1}', r"frame\.before: 1"),
        ('{"documents": [{"schema": "true"}], "thought": {}}', r"thought\.ends"),
        ('{"documents": [{"schema": "true"}], "thought": 1}', r"thought: 1"),
    ],
)
def test_frames_that_are_none(frame: str, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        Guided(VOCABULARY, Guide(GuideKind.FRAME, (frame,)))


def test_a_frame_of_anything() -> None:
    frame = {
        "documents": [{"schema": "true", "before": '/"\\\n%', "behind": "é"}],
        "before": "@d0 ",
        "behind": "~",
        "several": True,
        "between": "",
    }
    guide = Guide(GuideKind.FRAME, (json.dumps(frame),))
    text = '@d0 /"\\\n%5é/"\\\n%{"a": null}é~'
    assert follows(guide, text) == text + DONE
    assert guide_from(guide_to(guide)) == guide
