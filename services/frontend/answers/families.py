"""How each family of models writes calls, as their model cards and chat templates say.

DeepSeek V3 and R1: the templates in tokenizer_config.json of deepseek-ai/DeepSeek-V3 and
deepseek-ai/DeepSeek-R1; V3.1: the section "ToolCall" of its model card. Kimi K2:
docs/tool_call_guidance.md of MoonshotAI/Kimi-K2. Hermes: NousResearch/Hermes-Function-Calling, and
the templates of Qwen2.5, Qwen3 and SmolLM2. Llama: "Llama 3.1" in Meta's prompt formats.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from services.frontend.answers.heads import Reader, bare_head, json_head, pattern_head
from services.frontend.answers.marks import ANY, Marker

THOUGHT: Mapping[Marker, str] = {Marker.THOUGHT: "<think>", Marker.THOUGHT_END: "</think>"}


@dataclass(frozen=True, slots=True)
class Written:
    """A call around its arguments; `then`: digits, and this, come behind `begin` first."""

    begin: str
    end: str
    then: str = ""


@dataclass(frozen=True, slots=True)
class Family:
    """`reader`: of what stands before arguments. `write`: a call of a function of that name.

    `bare`: a call may begin where the answer does, without a marker. `tail`: what may stand between
    arguments and the end of the call; `fence`: a part of it of several characters. `then`: what
    stands before another call that has no marker of its own. `between`: what the model writes there
    between calls; `several`: it can make more than one. `in_thought`: the token that begins calls
    ends a thought.
    """

    name: str
    reader: Reader
    write: Callable[[str], Written]
    calls: Mapping[Marker, str] = field(default_factory=dict)
    bare: bool = False
    tail: str = r"\s*"
    fence: str = ""
    then: str = ""
    between: str = ""
    several: bool = True
    in_thought: bool = False

    @property
    def markers(self) -> Mapping[Marker, str]:
        """All of them."""
        return {**THOUGHT, **self.calls}


def _json_call(key: str, before: str = "", behind: str = "") -> Callable[[str], Written]:
    def write(name: str) -> Written:
        return Written(f'{before}{{"name": {json.dumps(name)}, "{key}": ', "}" + behind)

    return write


HERMES = Family(
    "hermes",
    json_head,
    _json_call("arguments", "<tool_call>\n", "\n</tool_call>"),
    {Marker.CALL: "<tool_call>", Marker.CALL_END: "</tool_call>"},
    tail=r"\s*\}?\s*\]?\s*",
    then=",",  # SmolLM2 writes an array
    between="\n",
)

LLAMA = Family(
    "llama",
    bare_head,
    _json_call("parameters"),
    {Marker.CALL: "<|python_tag|>"},
    bare=True,
    tail=r"\s*\}?\s*",
    then=";",
    several=False,
)

_DEEPSEEK = {
    Marker.CALLS: "<\uff5ctool▁calls▁begin\uff5c>",
    Marker.CALLS_END: "<\uff5ctool▁calls▁end\uff5c>",
    Marker.CALL: "<\uff5ctool▁call▁begin\uff5c>",
    Marker.CALL_END: "<\uff5ctool▁call▁end\uff5c>",
    Marker.INSIDE: "<\uff5ctool▁sep\uff5c>",
}
_SEP = f"[{Marker.INSIDE.either}]"
_WORD = rf"(?P<name>[^\s`{{{ANY}]+)"
# V3.1 has the name before the separator, V3 and R1 a type; their arguments stand in a fence.
_deepseek_head = pattern_head(
    rf"\s*(?:{_WORD}\s*{_SEP}\s*(?=\{{)"
    rf"|[^\s{ANY}]+\s*{_SEP}\s*{_WORD.replace('name', 'fenced')}\s*(?:```(?:json)?\s+)?(?=\{{))"
)


def _write_fenced(name: str) -> Written:
    marks = _DEEPSEEK
    begin = f"{marks[Marker.CALL]}function{marks[Marker.INSIDE]}{name}\n```json\n"
    return Written(begin, f"\n```{marks[Marker.CALL_END]}")


def _write_plain(name: str) -> Written:
    marks = _DEEPSEEK
    return Written(f"{marks[Marker.CALL]}{name}{marks[Marker.INSIDE]}", marks[Marker.CALL_END])


DEEPSEEK_V3 = Family(
    "deepseek_v3",
    _deepseek_head,
    _write_fenced,
    _DEEPSEEK,
    tail=r"\s*(?:```)?\s*",
    fence="```",
    between="\n",
    in_thought=True,
)

DEEPSEEK_V31 = Family(
    "deepseek_v31",
    _deepseek_head,
    _write_plain,
    _DEEPSEEK,
    tail=r"\s*(?:```)?\s*",
    fence="```",
    in_thought=True,
)

_KIMI = {
    Marker.CALLS: "<|tool_calls_section_begin|>",
    Marker.CALLS_END: "<|tool_calls_section_end|>",
    Marker.CALL: "<|tool_call_begin|>",
    Marker.CALL_END: "<|tool_call_end|>",
    Marker.INSIDE: "<|tool_call_argument_begin|>",
}


def _write_kimi(name: str) -> Written:
    marks = _KIMI
    begin = f"{marks[Marker.CALL]}functions.{name}:"
    return Written(begin, marks[Marker.CALL_END], marks[Marker.INSIDE])


KIMI_K2 = Family(
    "kimi_k2",
    pattern_head(rf"\s*(?P<id>(?:functions\.)?(?P<name>[^\s:{ANY}]+)(?::\d+)?)\s*{_SEP}\s*(?=\{{)"),
    _write_kimi,
    _KIMI,
    in_thought=True,
)


def _none(text: str, final: bool, names: frozenset[str]) -> None:
    return None


def _never(name: str) -> Written:
    raise AssertionError("an answer in this format calls nothing")


PLAIN = Family("plain", _none, _never)

FAMILIES = {f.name: f for f in (PLAIN, HERMES, LLAMA, DEEPSEEK_V3, DEEPSEEK_V31, KIMI_K2)}
