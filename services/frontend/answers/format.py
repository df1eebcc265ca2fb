"""How a model's answers are written: the surface of this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from services.engine.api import Guide
from services.frontend.answers.deltas import Delta
from services.frontend.chat import Function, ToolChoice


class Parser(Protocol):
    """One answer's text, as it comes, taken apart. Raises nothing, loses nothing.

    What is not in the format is content. However the text is cut into pieces, the deltas joined
    are the same.
    """

    @property
    def thinking(self) -> bool:
        """What comes next is thought: tokens that come while it is so count as reasoning."""

    @property
    def calls(self) -> int:
        """Calls that have begun."""

    def push(self, text: str) -> list[Delta]:
        """What is certain after these characters too."""

    def finish(self) -> list[Delta]:
        """What was held back, at the end of the answer."""


class AnswerFormat(Protocol):
    """Of one model. Thread-safe."""

    @property
    def name(self) -> str:
        """As in frontend.answer_format."""

    @property
    def takes_tools(self) -> bool:
        """Answers can call functions."""

    @property
    def markers(self) -> tuple[str, ...]:
        """Tokens that the parser must see as such: FolderModel.detokenizer(marked=True).

        The k-th comes as the one character mark_of(k), which no text has; so what a model only
        spells, because somebody asked it to, begins nothing.
        """

    def thinks_after(self, tail: str) -> bool:
        """The answer goes on with thought after a prompt whose text ends so."""

    def parser(self, tools: Sequence[Function], choice: ToolChoice, thinking_open: bool) -> Parser:
        """For one answer."""

    def guide(
        self,
        tools: Sequence[Function],
        choice: ToolChoice,
        parallel: bool,
        thinking_open: bool,
    ) -> Guide | None:
        """Holds the answer to a call of a function, or of the one named; None: the model is free.

        With `parallel` it may go on with more calls. Thought may come first.
        Raises InvalidRequestError (tools, tool_choice) for what can't be enforced.
        """


def mark_of(index: int) -> str:
    """What stands for the marker in text: a lone surrogate, which no bytes decode to."""
    return chr(0xD800 + index)
