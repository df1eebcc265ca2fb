"""Markers in text: what a model says as a token of its own, and what it only spells.

A marker that is one token of the vocabulary comes as one character, which stands for the token: a
high surrogate, which no bytes decode to. So nothing that is spelled, because a user asked for it,
say, is taken for it. Where a vocabulary has no such token, or a guide made the model write the
marker by whatever tokens, what is spelled counts; it becomes a low surrogate here, so that what
reads the text has one character to look for either way, and can tell the two apart.
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Mapping

_TOKEN, _SPELLED = 0xD800, 0xDC00

ANY = "\ud800-\udfff"
"""For a class of characters: every mark."""

_MARK = re.compile(f"[{ANY}]")


class Marker(enum.IntEnum):
    """What markers are for."""

    THOUGHT = 0
    THOUGHT_END = 1
    CALLS = 2
    CALLS_END = 3
    CALL = 4
    CALL_END = 5
    INSIDE = 6
    """In what stands before a call's arguments."""

    @property
    def token(self) -> str:
        """What stands for it where it is a token."""
        return chr(_TOKEN + self)

    @property
    def spelled(self) -> str:
        """What stands for its characters."""
        return chr(_SPELLED + self)

    @property
    def either(self) -> str:
        """Both, for a class of characters."""
        return self.token + self.spelled


class Marks:
    """Gives marks their text again."""

    def __init__(self, markers: Mapping[Marker, str]) -> None:
        self._texts = {
            ord(mark): text for m, text in markers.items() for mark in (m.token, m.spelled)
        }

    def restored(self, text: str) -> str:
        """With the text of every marker in its place."""
        return text.translate(self._texts) if _MARK.search(text) else text


@functools.cache
def _spelling(
    markers: tuple[tuple[Marker, str], ...],
) -> tuple[dict[str, str], re.Pattern[str], frozenset[str], tuple[str, ...]]:
    """The mark of each text, all of them as one expression, their beginnings, their first letters.

    Of a few sets of markers, those of each format.
    """
    marks = {text: marker.spelled for marker, text in markers}
    whole = re.compile("|".join(map(re.escape, marks)) or "(?!)")
    prefixes = frozenset(text[:i] for text in marks for i in range(1, len(text)))
    return marks, whole, prefixes, tuple(sorted({text[0] for text in marks}))


class Speller:
    """Puts marks in the place of markers that are spelled; none is the beginning of another."""

    def __init__(self, markers: Mapping[Marker, str]) -> None:
        self._marks, self._whole, self._prefixes, self._firsts = _spelling(tuple(markers.items()))
        self._longest = max(map(len, self._marks), default=0)
        self._held = ""

    def push(self, text: str) -> str:
        """Text that is final now; the beginning of what may be a marker is held back."""
        if self._held:
            text, self._held = self._held + text, ""
        elif not any(first in text for first in self._firsts):
            return text
        text = self._whole.sub(lambda found: self._marks[found[0]], text)
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start:] in self._prefixes:
                self._held = text[start:]
                return text[:start]
        return text

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held
