"""Where a JSON object ends, in text that comes in pieces."""

from __future__ import annotations

import re

# The marks of tokens end it wherever they are; those of what is only spelled, outside of texts.
_OUTSIDE = re.compile('["{}\\[\\]\ud800-\udfff]')
_INSIDE = re.compile('["\\\\\ud800-\udbff]')


class ObjectSpan:
    """An object that begins with the first character pushed. Only its brackets are looked at."""

    def __init__(self) -> None:
        self._depth = 0
        self._inside = False
        self._escaped = False
        self.done = False
        """It has ended, or a marker ended it."""

    def push(self, text: str) -> int:
        """How many characters of the text belong to it."""
        at = 0
        while at < len(text):
            if self._escaped:
                # No token's mark is part of what is escaped.
                if "\ud800" <= text[at] <= "\udbff":
                    self.done = True
                    return at
                self._escaped = False
                at += 1
                continue
            found = (_INSIDE if self._inside else _OUTSIDE).search(text, at)
            if found is None:
                break
            character, at = found[0], found.end()
            if character == '"':
                self._inside = not self._inside
            elif character == "\\":
                self._escaped = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.done = True
                    return at
            else:
                self.done = True
                return at - 1
        return len(text)
