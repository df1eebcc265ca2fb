"""Answers that call nothing: all is content, but for thought between <think> and </think>."""

from __future__ import annotations

from collections.abc import Sequence

from services.engine.api import Guide
from services.frontend.answers.deltas import Content, Delta
from services.frontend.chat import Calling, Function, ToolChoice
from services.runtime.errors import InvalidRequestError


class PlainParser:
    """See format.Parser."""

    thinking = False
    calls = 0

    def push(self, text: str) -> list[Delta]:
        """See format.Parser."""
        return [Content(text)] if text else []

    def finish(self) -> list[Delta]:
        """See format.Parser."""
        return []


class PlainFormat:
    """See format.AnswerFormat."""

    name = "plain"
    takes_tools = False
    markers = ()

    def thinks_after(self, tail: str) -> bool:
        """See format.AnswerFormat."""
        return False

    def parser(
        self, tools: Sequence[Function], choice: ToolChoice, thinking_open: bool
    ) -> PlainParser:
        """See format.AnswerFormat."""
        return PlainParser()

    def guide(
        self,
        tools: Sequence[Function],
        choice: ToolChoice,
        parallel: bool,
        thinking_open: bool,
    ) -> Guide | None:
        """See format.AnswerFormat."""
        if tools and choice.calling is not Calling.NONE:
            raise InvalidRequestError(
                "tools", f"{len(tools)} functions", "this model's chat template knows none"
            )
        return None
