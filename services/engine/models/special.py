"""Control tokens in text: which ones a chat template wrote, and which ones somebody typed.

Only those of the template may become control tokens: a user who types <|im_end|> has typed ten
characters and ended no turn. So before a conversation is rendered, every place in it where a
control token begins, or could begin and go on in what the template puts behind it, loses its first
character to a stand-in: a Unicode noncharacter that the conversation does not contain. What is
found in the rendered text then is the template's own; afterwards the stand-ins become characters
again.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

NONCHARACTERS = [
    *map(chr, range(0xFDD0, 0xFDF0)),
    *(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF)),
]


THOUGHTS = ("<think>", "</think>")
"""Markers that an assistant's turn may have in it, as templates look for them there."""


class TooManyNoncharactersError(Exception):
    """A conversation has every noncharacter in it, so that none can stand in."""


@dataclass(frozen=True, slots=True)
class Found:
    """A control token in a text: text[start:end]."""

    start: int
    end: int
    token: str


class ControlTokens:
    """Finds and hides a vocabulary's control tokens."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._tokens = frozenset(t for t in tokens if t)
        self._lengths = sorted({len(t) for t in self._tokens}, reverse=True)
        self._prefixes = frozenset(t[:i] for t in self._tokens for i in range(1, len(t)))
        firsts = sorted({t[0] for t in self._tokens})
        self._first = re.compile("|".join(map(re.escape, firsts)) or r"(?!)")

    def find(self, text: str) -> Iterator[Found]:
        """Control tokens from left to right, the longest where several begin."""
        end = 0
        for first in self._first.finditer(text):
            start = first.start()
            token = self._at(text, start) if start >= end else None
            if token is not None:
                end = start + len(token)
                yield Found(start, end, token)

    def hide(
        self, texts: Sequence[str], own: Collection[int] = ()
    ) -> tuple[list[str], Mapping[int, str]]:
        """The texts with stand-ins, and for str.translate what each stands for.

        The latter is empty if none was needed. Lengths stay the same. `own`: which of the texts
        are the model's own, in which THOUGHTS stay. Raises TooManyNoncharactersError.
        """
        begins = [self._begins(text, THOUGHTS if i in own else ()) for i, text in enumerate(texts)]
        hidden = sorted({text[i] for text, at in zip(texts, begins, strict=True) for i in at})
        if not hidden:
            return list(texts), {}
        used = set().union(*texts)
        free = [c for c in NONCHARACTERS if c not in used]
        if len(free) < len(hidden):
            raise TooManyNoncharactersError
        stand_in = dict(zip(hidden, free, strict=False))
        result = []
        for text, at in zip(texts, begins, strict=True):
            characters = list(text)
            for i in at:
                characters[i] = stand_in[text[i]]
            result.append("".join(characters))
        return result, {ord(stand): character for character, stand in stand_in.items()}

    def _hides(self, text: str, start: int, spared: Collection[str]) -> bool:
        token = self._at(text, start)
        return token is not None and token not in spared

    def _at(self, text: str, start: int) -> str | None:
        for length in self._lengths:
            if (token := text[start : start + length]) in self._tokens:
                return token
        return None

    def _begins(self, text: str, spared: Collection[str]) -> list[int]:
        """Where a control token begins, also one inside another, or one that the end cuts off."""
        longest = self._lengths[0] if self._lengths else 0
        return [
            start
            for start in (first.start() for first in self._first.finditer(text))
            if self._hides(text, start, spared)
            or (len(text) - start < longest and text[start:] in self._prefixes)
        ]
