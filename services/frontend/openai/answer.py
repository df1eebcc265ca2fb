"""One answer taken apart as it comes: its text into what is said, thought and called."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from services.frontend.answers.deltas import CallArguments, Content, Delta, Reasoning
from services.frontend.text import Detokenizer, TextStream


class Parser(Protocol):
    """Of services.frontend.answers: however text is cut, the deltas come to the same."""

    calls: int
    """That have begun."""

    @property
    def thinking(self) -> bool:
        """What comes next is thought."""

    def push(self, text: str) -> list[Delta]:
        """What is certain after these characters too."""

    def finish(self) -> list[Delta]:
        """What was held back, at the end of the answer."""


class AnswerText:
    """See request.Text. Text leaves by take() alone."""

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str], parser: Parser) -> None:
        self._text = TextStream(detokenizer, stops)
        self._parser = parser
        self._deltas: list[Delta] = []
        self.thought_tokens = 0

    @property
    def stopped(self) -> bool:
        """A stop string was found; text ends before it."""
        return self._text.stopped

    @property
    def calls(self) -> int:
        """Calls that have begun."""
        return self._parser.calls

    def push(self, token_ids: Sequence[int]) -> tuple[int, str]:
        """How many tokens were taken. One by one: so those of a thought can be counted."""
        for count, token_id in enumerate(token_ids, start=1):
            thinking = self._parser.thinking
            _, text = self._text.push((token_id,))
            if text:
                self._deltas += self._parser.push(text)
            self.thought_tokens += thinking
            if self._text.stopped:
                self._deltas += self._parser.finish()
                return count, ""
        return len(token_ids), ""

    def finish(self) -> str:
        """What was held back is among the deltas."""
        text = self._text.finish()
        if text:
            self._deltas += self._parser.push(text)
        self._deltas += self._parser.finish()
        return ""

    def take(self) -> list[Delta]:
        """What came since the last call."""
        deltas, self._deltas = self._deltas, []
        return joined(deltas)


def joined(deltas: Iterable[Delta]) -> list[Delta]:
    """The same in as few as can be."""
    found: list[Delta] = []
    for delta in deltas:
        match found[-1] if found else None, delta:
            case Content(before), Content(text):
                found[-1] = Content(before + text)
            case Reasoning(before), Reasoning(text):
                found[-1] = Reasoning(before + text)
            case CallArguments(index, before), CallArguments(same, text) if index == same:
                found[-1] = CallArguments(index, before + text)
            case _:
                found.append(delta)
    return found
