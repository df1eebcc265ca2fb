"""What stands before a call's arguments, in each family of models: the name of the function.

A head is read from behind the marker that begins the call, in text in which markers are marks
(marks.py). Arguments are an object: without its brace there is no head.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from services.frontend.answers.marks import ANY, Marker


@dataclass(frozen=True, slots=True)
class Head:
    """`end`: where the arguments begin. `arguments`: if given, all of them; `end` is behind."""

    name: str
    end: int
    id: str = ""
    arguments: str | None = None


class More:
    """There may be a head when there is more text."""


MORE = More()

Reader = Callable[[str, bool, frozenset[str]], Head | More | None]
"""Of text, whether it is all there is, and the functions there are. None: no head, whatever comes.
"""

MOST = 1024
"""Characters of a head that is not JSON."""

_MARK = re.compile(f"[{ANY}]")
_OTHER = re.compile(f"(?![{Marker.INSIDE.either}])[{ANY}]")

_OBJECT = re.compile(
    r'\s*\[?\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?'
    r'"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)',
    re.DOTALL,
)


def json_head(text: str, final: bool, names: frozenset[str]) -> Head | More | None:
    """{"name": ..., "arguments": {...}}, alone or in an array.

    With its keys in another order it is read when it is complete.
    """
    found = _OBJECT.match(text)
    if found is not None:
        return _named(found)
    if text.lstrip()[:1] not in ("", "{", "["):
        return None
    mark = _MARK.search(text)
    if mark is None and not final:
        return MORE
    end = len(text) if mark is None else mark.start()
    whole = _loaded(text[:end])
    if not isinstance(whole, dict) or not _is_text(whole.get("name")):
        return None
    given = whole.get("arguments", whole.get("parameters"))
    if isinstance(given, str):  # an object in a text
        given = _loaded(given)
    if given is None:
        given = {}
    if not isinstance(given, dict):
        return None
    return Head(whole["name"], end, arguments=json.dumps(given))


def bare_head(text: str, final: bool, names: frozenset[str]) -> Head | More | None:
    """The same where no marker says that it is a call: of a function that there is, keys in order.

    Anything else is an answer in JSON.
    """
    found = _OBJECT.match(text)
    if found is not None:
        head = _named(found)
        return head if head is not None and head.name in names else None
    packed = "".join(text.split())
    for name in names:
        for before in ("{", '{"type":"function",'):
            for key in ("parameters", "arguments"):
                if f'{before}"name":"{name}","{key}":'.startswith(packed) and not final:
                    return MORE
    return None


def pattern_head(expression: str) -> Reader:
    """Of an expression with the groups `name`, or `fenced`, and, if calls have one, `id`."""
    pattern = re.compile(expression)

    def read(text: str, final: bool, names: frozenset[str]) -> Head | More | None:
        found = pattern.match(text)
        if found is not None:
            groups = found.groupdict()
            name = groups["name"] or groups["fenced"]
            return Head(name, found.end(), groups.get("id") or "")
        over = final or len(text) > MOST or _OTHER.search(text) is not None
        return None if over else MORE

    return read


def _named(found: re.Match[str]) -> Head | None:
    name = _loaded(found[1])
    return Head(name, found.end()) if _is_text(name) else None


def _is_text(name: object) -> bool:
    """Not one with half a character, as JSON can have."""
    return isinstance(name, str) and _MARK.search(name) is None


def _loaded(text: str) -> Any:
    """The value; None if it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
