"""Answers as each family of models writes them, after the published formats (families.py)."""
# ruff: noqa: RUF001 - the markers of DeepSeek have full-width bars

from __future__ import annotations

import pytest

from services.frontend.answers.deltas import CallBegins, Content, Reasoning
from services.frontend.answers.format import format_of
from services.frontend.chat import Calling, ToolChoice
from services.runtime.errors import InvalidRequestError
from tests.unit.frontend.answer_world import (
    FORMATS,
    NONE,
    REQUIRED,
    TOOLS,
    call,
    form,
    marked,
    read,
)
from tests.unit.models.template_styles import STYLES

PARIS, HERE = '{"city": "Paris", "days": 3}', '{"city": "東京 {\\"} 🌦️"}'
BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALLED, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
KIMI, KIMI_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
ID, ARGUMENTS, KIMI_CALLED = (
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
)

EXAMPLES = {
    "hermes: two calls": (
        "hermes",
        f'Let me see.\n<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>\n'
        f'<tool_call>\n{{"name": "get_weather", "arguments": {HERE}}}\n</tool_call>',
        [
            Content("Let me see."),
            *call(0, "get_weather", PARIS),
            *call(1, "get_weather", HERE),
        ],
    ),
    "hermes: an array, as SmolLM2 writes it": (
        "hermes",
        f'<tool_call>[{{"name": "get_weather", "arguments": {PARIS}}}, '
        f'{{"name": "clock-2", "arguments": {{}}}}]</tool_call>',
        [*call(0, "get_weather", PARIS), *call(1, "clock-2", "{}")],
    ),
    "hermes: keys in the other order": (
        "hermes",
        f'<tool_call>\n{{"arguments": {PARIS}, "name": "get_weather"}}\n</tool_call>',
        call(0, "get_weather", PARIS),
    ),
    "hermes: no arguments": (
        "hermes",
        '<tool_call>\n{"name": "clock-2"}\n</tool_call>',
        call(0, "clock-2", "{}"),
    ),
    "hermes: arguments in a text": (
        "hermes",
        '<tool_call>\n{"name": "clock-2", "arguments": "{\\"a\\": 1}"}\n</tool_call>',
        call(0, "clock-2", '{"a": 1}'),
    ),
    "hermes: then it speaks": (
        "hermes",
        '<tool_call>{"name": "clock-2", "arguments": {}}</tool_call>\n\nWait for it.',
        [*call(0, "clock-2", "{}"), Content("Wait for it.")],
    ),
    "hermes: cut off in the arguments": (
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Par',
        call(0, "get_weather", '{"city": "Par'),
    ),
    "hermes: the end's marker is missing": (
        "hermes",
        '<tool_call>\n{"name": "clock-2", "arguments": {}}\n'
        '<tool_call>\n{"name": "clock-2", "arguments": {}}\n',
        [*call(0, "clock-2", "{}"), *call(1, "clock-2", "{}")],
    ),
    "deepseek_v3": (
        "deepseek_v3",
        f"{BEGIN}{CALL}function{SEP}get_weather\n```json\n{PARIS}\n```{CALLED}\n"
        f"{CALL}function{SEP}clock-2\n```json\n{{}}\n```{CALLED}{END}",
        [*call(0, "get_weather", PARIS), *call(1, "clock-2", "{}")],
    ),
    "deepseek_v3: without the outer markers": (
        "deepseek_v3",
        f"So: {CALL}function{SEP}get_weather\n```json\n{HERE}\n```{CALLED}",
        [Content("So:"), *call(0, "get_weather", HERE)],
    ),
    "deepseek_v31": (
        "deepseek_v31",
        f"Sure. {BEGIN}{CALL}get_weather{SEP}{PARIS}{CALLED}{CALL}clock-2{SEP}{{}}{CALLED}{END}",
        [Content("Sure."), *call(0, "get_weather", PARIS), *call(1, "clock-2", "{}")],
    ),
    "kimi_k2": (
        "kimi_k2",
        f"{KIMI}{ID}functions.get_weather:0{ARGUMENTS}{PARIS}{KIMI_CALLED}"
        f"{ID}functions.clock-2:1{ARGUMENTS} {{}} {KIMI_CALLED}{KIMI_END}",
        [
            *call(0, "get_weather", PARIS, "functions.get_weather:0"),
            *call(1, "clock-2", "{}", "functions.clock-2:1"),
        ],
    ),
    "llama": (
        "llama",
        f'{{"name": "get_weather", "parameters": {PARIS}}}',
        call(0, "get_weather", PARIS),
    ),
    "llama: after the tag, with a type": (
        "llama",
        f'<|python_tag|>{{"type": "function", "name": "get_weather", "parameters": {PARIS}}}',
        call(0, "get_weather", PARIS),
    ),
    "llama: several": (
        "llama",
        '{"name": "clock-2", "parameters": {}}; '
        f'{{"name": "get_weather", "parameters": {HERE}}}',
        [*call(0, "clock-2", "{}"), *call(1, "get_weather", HERE)],
    ),
}


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("example", EXAMPLES)
def test_calls(example: str, tokens: bool) -> None:
    name, text, expected = EXAMPLES[example]
    answers = form(name, tokens)
    text = marked(text, answers)
    assert read(answers, [text]) == expected
    assert read(answers, list(text)) == expected


NO_CALLS = {
    "hermes": [
        "The marker <tool_call> begins a call.",
        '<tool_call>\n{"name": 5, "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "clock-2", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"name": "clock',
        '<tool_call>\n{"name": "\\ud800", "arguments": {}}\n</tool_call>',
        "</tool_call> <tool_call",
        '{"name": "clock-2", "arguments": {}}',
    ],
    "llama": [
        '{"name": "unknown", "parameters": {}}',
        '{"names": ["clock-2"]}',
        '{"na',
        "<|python_tag|>print(1)",
        'Say {"name": "clock-2", "parameters": {}}',
        "[1, 2]",
    ],
    "deepseek_v3": [
        f"{BEGIN}no call{END}",
        f"{BEGIN}{CALL}function{SEP}clock-2\n```json\nnull\n```{CALLED}{END}",
        f"{BEGIN}{CALL}function",
        f"{BEGIN}\n",
    ],
    "deepseek_v31": [f"{CALL}{SEP}{{}}{CALLED}", f"{BEGIN}{CALL}clock-2 {{}}{CALLED}{END}"],
    "kimi_k2": [f"{KIMI}{ID}{ARGUMENTS}{{}}{KIMI_CALLED}{KIMI_END}", f"{KIMI}{ID}functions.a:0"],
}


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize(("name", "text"), [(n, t) for n, ts in NO_CALLS.items() for t in ts])
def test_what_is_no_call_is_content_to_the_letter(name: str, text: str, tokens: bool) -> None:
    answers = form(name, tokens)
    given = marked(text, answers)
    assert read(answers, [given]) == [Content(text)]
    assert read(answers, list(given)) == [Content(text)]


@pytest.mark.parametrize("name", FORMATS)
def test_without_functions_nothing_is_a_call(name: str) -> None:
    for example, (of, text, _) in EXAMPLES.items():
        if of == name:
            for answers in (form(name), form(name, tokens=True)):
                given = list(marked(text, answers))
                assert read(answers, given, NONE) == [Content(text)], example
                assert read(answers, given, tools=()) == [Content(text)], example


def test_what_is_only_spelled_begins_nothing_where_there_is_a_token() -> None:
    """A user who has the model repeat a call has it say one, not make one."""
    for name, text, _ in EXAMPLES.values():
        if name != "llama":
            assert read(form(name, tokens=True), list(text)) == [Content(text)]


def test_what_a_guide_made_it_spell_counts() -> None:
    for name, text, expected in EXAMPLES.values():
        assert read(form(name, tokens=True), list(text), REQUIRED) == expected


def test_a_marker_in_an_argument_is_an_argument() -> None:
    spelled = '{"city": "</tool_call><tool_call>"}'
    text = f'<tool_call>{{"name": "get_weather", "arguments": {spelled}}}</tool_call>'
    assert read(form("hermes"), list(text)) == call(0, "get_weather", spelled)
    # Of a token the model can mean the marker only.
    answers = form("hermes", tokens=True)
    assert read(answers, [marked(text, answers)])[:2] == call(0, "get_weather", '{"city": "')


THOUGHTS = [
    ("<think>\nHm.\n\n</think>\n\nYes.", False, [Reasoning("Hm."), Content("Yes.")]),
    ("\n<think>Hm.</think>Yes.", False, [Reasoning("Hm."), Content("Yes.")]),
    ("Hm.\n</think>\n\nYes.", True, [Reasoning("Hm."), Content("Yes.")]),
    ("Hm, a <think> in\n it", True, [Reasoning("Hm, a <think> in\n it")]),
    ("</think>Yes.", True, [Content("Yes.")]),
    ("Yes </think> no <think>.", False, [Content("Yes </think> no <think>.")]),
    (
        "Hm.</think>Yes <think>no</think>.",
        True,
        [Reasoning("Hm."), Content("Yes <think>no</think>.")],
    ),
    ("Hm.\n\n", True, [Reasoning("Hm.\n\n")]),
]


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize(("text", "thinking_open", "expected"), THOUGHTS)
def test_thoughts(text: str, thinking_open: bool, expected: list, tokens: bool) -> None:
    for name in ("plain", "hermes", "deepseek_v3"):
        answers = form(name, tokens, thinks=True)
        given = list(marked(text, answers))
        assert read(answers, given, NONE, thinking_open) == expected
        assert read(answers, given, thinking_open=thinking_open) == expected


def test_a_thought_then_calls() -> None:
    for name, text, expected in EXAMPLES.values():
        answers = form(name, thinks=True)
        assert read(answers, list(f"Hm.\n</think>\n\n{text}"), thinking_open=True) == [
            Reasoning("Hm."),
            *expected,
        ]


def test_a_call_in_a_thought_ends_it_where_models_are_known_to_leave_that_out() -> None:
    name, text, expected = EXAMPLES["kimi_k2"]
    answers = form(name, tokens=True, thinks=True)
    given = marked("Hm." + text, answers)
    assert read(answers, list(given), thinking_open=True) == [Reasoning("Hm."), *expected]
    spelled = form(name, thinks=True)
    assert read(spelled, [text], thinking_open=True) == [Reasoning(text)]


def test_a_model_that_does_not_think_says_so() -> None:
    text = "<think>a</think>b"
    assert read(form("hermes"), list(text)) == [Content(text)]


def test_thought_is_known_while_it_lasts() -> None:
    parser = form("hermes", thinks=True).parser((), NONE, True)
    seen = []
    for piece in ("Hm", " so", "</thi", "nk>", "\n", "Yes", "."):
        seen.append(parser.thinking)
        parser.push(piece)
    assert seen == [True, True, True, True, False, False, False]


def test_arguments_come_as_they_are_written() -> None:
    """A piece of arguments is not held back until they are whole."""
    parser = form("hermes").parser(TOOLS, ToolChoice(), False)
    parser.push('<tool_call>{"name": "get_weather", "arguments": ')
    assert parser.push('{"ci') == [CallBegins(0, "get_weather"), *call(0, "", '{"ci')[1:]]
    assert parser.push('ty": "x') == call(0, "", 'ty": "x')[1:]


def test_content_comes_at_once_but_for_white_space() -> None:
    parser = form("hermes").parser(TOOLS, ToolChoice(), False)
    assert parser.push("One") == [Content("One")]
    assert parser.push(" two") == [Content(" two")]
    assert parser.push(" \n") == []
    assert parser.push("three <to") == [Content(" \nthree")]
    assert parser.push("ken>") == [Content(" <token>")]


@pytest.mark.parametrize(
    ("template", "tokens", "name", "thinks"),
    [
        (STYLES["hermes"], (), "hermes", True),
        (STYLES["llama"], (), "llama", False),
        (STYLES["deepseek_v3"].replace("</think>", ""), (), "deepseek_v3", False),
        (STYLES["deepseek_r1"], ("<think>",), "deepseek_v3", True),
        (STYLES["deepseek_v31"], (), "deepseek_v31", True),
        (STYLES["kimi_k2"], (), "kimi_k2", False),
        ("{{ messages }}", (), "plain", False),
        ("", ("<think>", "<tool_call>"), "plain", True),
        ("{{ tools }}", ("<|python_tag|>",), "llama", False),
    ],
)
def test_a_template_tells_the_format(
    template: str, tokens: tuple[str, ...], name: str, thinks: bool
) -> None:
    found = format_of("auto", template, tokens)
    assert (found.name, found.thinks, found.takes_tools) == (name, thinks, name != "plain")
    assert format_of("kimi_k2", template, tokens).name == "kimi_k2"


def test_a_plain_model_refuses_functions() -> None:
    plain = format_of("auto", "", ())
    with pytest.raises(InvalidRequestError, match=r"tools: '2 functions'.*answer_format"):
        plain.guide(TOOLS, ToolChoice(), True, False)
    assert plain.guide(TOOLS, NONE, True, False) is None
    assert plain.guide((), ToolChoice(), True, False) is None


def test_a_function_that_is_not_there_can_not_be_chosen() -> None:
    with pytest.raises(InvalidRequestError, match="tool_choice: 'clock'"):
        form("hermes").guide(TOOLS, ToolChoice(Calling.NAMED, "clock"), True, False)
