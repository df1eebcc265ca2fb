"""How a model's answers are written: the surface of this package."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from services.engine.api import Guide
from services.frontend.answers import guides
from services.frontend.answers.families import DEEPSEEK_V3, DEEPSEEK_V31, FAMILIES, PLAIN, Family
from services.frontend.answers.marks import Marker
from services.frontend.answers.parser import AnswerParser
from services.frontend.chat import Calling, Function, ToolChoice
from services.runtime.errors import InvalidRequestError

Parser = AnswerParser
AUTO = "auto"


class AnswerFormat:
    """Of one model. Thread-safe.

    `tokens`: texts of the vocabulary's added tokens. `thinks`: answers may begin with a thought.
    """

    def __init__(self, family: Family, tokens: Collection[str] = (), thinks: bool = False) -> None:
        self.name = family.name
        self.thinks = thinks
        self.markers = {t: m.token for m, t in family.markers.items() if t in tokens}
        """Tokens that parsers must see as such, and the character that stands for each."""
        self._family = family
        self._spelled = frozenset(m for m, t in family.markers.items() if t not in tokens)
        opening = family.markers[Marker.THOUGHT]
        self._opening = self.markers.get(opening, opening)

    @property
    def takes_tools(self) -> bool:
        """Answers can call functions."""
        return self._family is not PLAIN

    def thinks_after(self, tail: str) -> bool:
        """The answer goes on with a thought after a prompt whose text, with marks, ends so."""
        return self.thinks and tail.rstrip().endswith(self._opening)

    def parser(
        self,
        tools: Sequence[Function],
        choice: ToolChoice,
        thinking_open: bool,
        guided: bool = False,
    ) -> AnswerParser:
        """For one answer. `guided`: it is held to what after_thought() made."""
        calling = choice.calling if tools else Calling.NONE
        spelled = self._spelled
        if guided or calling in (Calling.REQUIRED, Calling.NAMED):
            spelled = frozenset(self._family.markers)  # as a guide may have had them written
        if not self.thinks:
            spelled -= {Marker.THOUGHT, Marker.THOUGHT_END}
        if calling is Calling.NONE:
            spelled &= {Marker.THOUGHT, Marker.THOUGHT_END}
        names = frozenset() if calling is Calling.NONE else frozenset(t.name for t in tools)
        return AnswerParser(self._family, spelled, names, self.thinks, thinking_open)

    def guide(
        self,
        tools: Sequence[Function],
        choice: ToolChoice,
        parallel: bool,
        thinking_open: bool,
    ) -> Guide | None:
        """Holds the answer to a call of a function, or of the one named; None: the model is free.

        With `parallel` it may go on with more calls, if none is named. Thought may come first.
        Raises InvalidRequestError (tools, tool_choice) for what can't be enforced.
        """
        if choice.calling is Calling.NONE or not tools:
            return None
        if not self.takes_tools:
            allowed = "this model's chat template has no functions (frontend.answer_format)"
            raise InvalidRequestError("tools", f"{len(tools)} functions", allowed)
        if choice.calling is Calling.AUTO:
            return None
        if choice.calling is Calling.NAMED:
            tools = [tool for tool in tools if tool.name == choice.name]
            if not tools:
                raise InvalidRequestError("tool_choice", choice.name, "one of tools")
            parallel = False
        thinks = guides.Thought(self.thinks, thinking_open)
        return guides.of_calls(self._family, tools, parallel, thinks)

    def after_thought(self, guide: Guide, thinking_open: bool) -> Guide:
        """A guide to JSON, behind the thought that such a model begins with.

        Other guides are as they are: they are about all that the model writes.
        """
        if not self.thinks:
            return guide
        return guides.behind_thought(guide, guides.Thought(True, thinking_open))


def format_of(asked: str, template: str, tokens: Collection[str]) -> AnswerFormat:
    """The format asked for by name; with "auto", the one that a chat template is written for.

    `tokens`: texts of the vocabulary's added tokens. A template that has no functions, and is not
    known to be of a family that was trained to call some, is plain.
    """
    thinks = "<think>" in tokens or "</think>" in template
    return AnswerFormat(_family(asked, template, tokens), tokens, thinks)


def _family(asked: str, template: str, tokens: Collection[str]) -> Family:
    if asked != AUTO:
        return FAMILIES[asked]
    for family in (DEEPSEEK_V3, DEEPSEEK_V31):
        if family.calls[Marker.CALL] in template:
            return DEEPSEEK_V3 if "```json" in template else DEEPSEEK_V31
    for name in ("kimi_k2", "hermes"):
        if FAMILIES[name].calls[Marker.CALL] in template:
            return FAMILIES[name]
    llama = "<|python_tag|>" in template or ("<|python_tag|>" in tokens and "tools" in template)
    return FAMILIES["llama"] if llama else PLAIN
