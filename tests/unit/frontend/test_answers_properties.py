"""Whatever a model writes, and however it is cut: nothing is lost, nothing raises."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from services.engine.models.template import ChatTemplate
from services.frontend.answers.deltas import CallArguments, CallBegins, Content, Delta, Reasoning
from services.frontend.answers.families import FAMILIES
from services.frontend.answers.format import format_of
from services.frontend.answers.marks import Marker
from services.frontend.answers.spans import ObjectSpan
from services.frontend.chat import Calling, ToolChoice
from tests.unit.frontend.answer_world import FORMATS, TOOLS, form, joined, marked, pieces, read
from tests.unit.models.template_styles import ENDS, STYLES

CHOICES = [ToolChoice(calling, "clock-2") for calling in Calling]
WORDS = ["Hi", " ", "\n", "\n\n", "东京", "🌦️", "é", "\u200d", "\ufeff", "<", ">", "|", "\\", '"']
JSON = ["{", "}", "[", "]", ",", ":", ";", "{}", '"a"', "1", "null", '"name"', '"arguments"']
HEADS = ['{"name": "clock-2", "arguments": ', '{"name": "get_weather", "parameters": ', "```json\n"]
NAMES = ["clock-2", "functions.clock-2:0", "function", "get_weather\n", "\n```", "```", "`"]


def parts_of(name: str) -> list[str]:
    markers = list(FAMILIES[name].markers.values())
    return [*markers * 3, *(m[:-2] for m in markers), *WORDS, *JSON, *HEADS, *NAMES]


@st.composite
def answers(draw: st.DrawFn) -> tuple[str, str]:
    """A format, and what a model made of its parts; calls that are right among them."""
    name = draw(st.sampled_from(FORMATS))
    family = FAMILIES[name]
    written = [family.write(tool.name) for tool in TOOLS]
    calls = [
        w.begin + ("0" + w.then if w.then else "") + '{"a": [1, "}"]}' + w.end for w in written
    ]
    part = st.sampled_from(parts_of(name)) | st.sampled_from(calls * 4) | st.text(max_size=4)
    return name, "".join(draw(st.lists(part, max_size=14)))


CUTS = st.lists(st.integers(0, 10**6), max_size=12)


@given(
    answer=answers(),
    cuts=CUTS,
    choice=st.sampled_from(CHOICES),
    tokens=st.booleans(),
    thinks=st.booleans(),
    thinking_open=st.booleans(),
)
@settings(max_examples=600, deadline=None)
def test_cuts_make_no_difference_and_nothing_is_lost(
    answer: tuple[str, str],
    cuts: list[int],
    choice: ToolChoice,
    tokens: bool,
    thinks: bool,
    thinking_open: bool,
) -> None:
    name, text = answer
    answer_format = form(name, tokens, thinks)
    given_text = marked(text, answer_format)
    whole = read(answer_format, [given_text], choice, thinking_open)
    assert read(answer_format, pieces(given_text, cuts), choice, thinking_open) == whole
    assert read(answer_format, list(given_text), choice, thinking_open) == whole
    assert_nothing_lost(name, text, whole)
    assert_text(whole)


def assert_text(deltas: list[Delta]) -> None:
    """No mark is left."""
    for delta in deltas:
        (delta.name + delta.id if isinstance(delta, CallBegins) else delta.text).encode()


def assert_nothing_lost(name: str, text: str, deltas: list[Delta]) -> None:
    """What was said, thought and called stands in the text, in this order, and between it nothing
    but markers and what a format puts around names and arguments."""
    said = []
    for delta in deltas:
        match delta:
            case CallBegins(_, function, call_id):
                said.append(call_id or function)
            case Content(words) | Reasoning(words) | CallArguments(_, words):
                said.append(words)
    # Arguments that were written anew, as they came before the name, say.
    assume(all(words in text for words in said))
    frame = ["\\s", '["{}\\[\\],:;`]', "function", "json", "functions\\.", "\\d"]
    frame += ["name", "arguments", "parameters", "type", "null"]
    frame += [re.escape(marker) for marker in FAMILIES[name].markers.values()]
    between = f"(?:{'|'.join(frame)})*?"
    expression = between + between.join(f"{re.escape(words)}" for words in said) + between
    if said:
        assert re.fullmatch(expression, text), (text, deltas)
    else:
        assert re.fullmatch(between, text), text


@given(
    name=st.sampled_from([*FORMATS, "plain"]),
    junk=st.lists(st.text(max_size=6) | st.integers(0, 6), max_size=20),
    choice=st.sampled_from(CHOICES),
    thinking_open=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_junk_raises_nothing(
    name: str, junk: list[str | int], choice: ToolChoice, thinking_open: bool
) -> None:
    answer_format = form(name, tokens=True, thinks=True)
    marks = list(answer_format.markers.values())
    parts = [marks[p % len(marks)] if isinstance(p, int) else p for p in junk]
    assert_text(read(answer_format, parts, choice, thinking_open))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.text(max_size=8)
    | st.sampled_from(['"', "\\", "}", "</tool_call>", "<think>", "{", "\n```", "\u2028"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
CALLS = st.lists(
    st.tuples(
        st.sampled_from([t.name for t in TOOLS]), st.dictionaries(st.text(max_size=6), VALUES)
    ),
    min_size=1,
    max_size=3,
)
TEMPLATES = {
    name: ChatTemplate(
        {"default": source}, Path("t"), {"bos_token": "<bos>", "eos_token": "<eos>"}, datetime.now
    )
    for name, source in STYLES.items()
}


@pytest.mark.parametrize("style", STYLES)
@given(calls=CALLS, cuts=CUTS, said=st.sampled_from([None, "Let me see.", "Wait:\n so"]))
@settings(max_examples=60, deadline=None)
def test_what_a_template_renders_is_read_again(
    style: str, calls: list[tuple[str, dict]], cuts: list[int], said: str | None
) -> None:
    """The assistant's turn of a conversation, taken for an answer, has the same calls."""
    if style == "llama":
        calls = calls[:1]
    if style not in ("hermes", "kimi_k2"):
        said = None  # the template has no place for it
    template = TEMPLATES[style]
    turn = {
        "role": "assistant",
        "content": said,
        "tool_calls": [
            {
                "id": f"functions.{name}:{i}",
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments)},
            }
            for i, (name, arguments) in enumerate(calls)
        ],
    }
    user = {"role": "user", "content": "Do."}
    before = template.render(template.prepared([user]))
    before = re.sub(r"(<think>\n?|</think>)$", "", before)
    whole = template.render(template.prepared([user, turn]))
    assert whole.startswith(before)
    answer = whole[len(before) :].removeprefix("</think>")
    answer = answer[: answer.rindex(ENDS[style])]
    answer_format = format_of("auto", STYLES[style], ())
    deltas = read(answer_format, pieces(answer, cuts))
    assert said is None or deltas[0] == Content(said)
    found = [d for d in deltas if isinstance(d, CallBegins)]
    arguments = [json.loads(d.text) for d in deltas if isinstance(d, CallArguments)]
    assert [(d.name, a) for d, a in zip(found, arguments, strict=True)] == calls
    if style == "kimi_k2":
        assert [d.id for d in found] == [c["id"] for c in turn["tool_calls"]]


@given(value=st.dictionaries(st.text(max_size=5), VALUES), rest=st.text(max_size=5), cuts=CUTS)
@settings(max_examples=300, deadline=None)
def test_where_an_object_ends(value: dict, rest: str, cuts: list[int]) -> None:
    text = json.dumps(value, ensure_ascii=False)
    span, taken = ObjectSpan(), 0
    for piece in pieces(text + rest, cuts):
        if not span.done:
            taken += span.push(piece)
    assert (span.done, taken) == (True, len(text))


def test_joined_is_of_the_same_call() -> None:
    a, b = CallArguments(0, "1"), CallArguments(1, "2")
    assert joined([a, b]) == [a, b]
    assert Marker.CALL.token != Marker.CALL.spelled
