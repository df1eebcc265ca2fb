"""Which JSON schemas can be enforced: every keyword is known to be, or the schema is refused.

llguidance takes keywords that it does not know for annotations, as the standard has it; so a
misspelt one, or one that it will implement one day, would be a promise that nobody keeps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, NoReturn
from urllib.parse import unquote

from services.runtime.errors import InvalidRequestError

MAX_DEPTH = 60
"""Levels of JSON in a schema's text."""

_ONE = frozenset({"items", "additionalProperties"})
_LIST = frozenset({"anyOf", "allOf", "oneOf", "prefixItems"})
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_NUMBERS = frozenset({"multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
_COUNTS = frozenset(
    {"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"}
)
_VALUES = frozenset({"type", "const", "enum", "required", "$ref", "pattern", "format"})
_NOTES = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
    | {"$comment", "contentMediaType", "contentEncoding"}
)
_ROOT = frozenset({"$schema", "$id"})

_DRAFTS = (
    "http://json-schema.org/draft-06/schema",
    "http://json-schema.org/draft-07/schema",
    "https://json-schema.org/draft/2019-09/schema",
    "https://json-schema.org/draft/2020-12/schema",
)


def check_schema(field: str, text: str) -> dict[str, Any]:
    """The schema. Raises InvalidRequestError naming the field, the place in it, and the reason."""
    schema = _parsed(field, text)
    walk = _Walk(field, schema)
    walk.schema(schema, "#")
    walk.references()
    if schema is True:
        return {}
    assert isinstance(schema, dict)
    return schema


def _parsed(field: str, text: str) -> object:
    def refuse(constant: str) -> NoReturn:
        raise InvalidRequestError(field, constant, "JSON has no such number")

    depth = deepest = 0
    for character in text:  # brackets in strings count too: no schema needs so many
        if character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    if deepest > MAX_DEPTH:
        raise InvalidRequestError(field, f"{deepest} levels", f"at most {MAX_DEPTH} levels")
    try:
        schema = json.loads(text, parse_constant=refuse)
    except ValueError as error:
        raise InvalidRequestError(field, text, f"must be JSON: {error}") from None
    if not isinstance(schema, dict) and schema is not True:
        raise InvalidRequestError(field, text, "a JSON schema is an object, or true")
    return schema


class _Walk:
    """Visits every schema in a schema."""

    def __init__(self, field: str, root: object) -> None:
        self._field = field
        self._seen: set[str] = set()
        self._refs: list[tuple[str, str]] = []
        self._root = root

    def schema(self, schema: object, at: str) -> None:
        self._seen.add(at)
        if isinstance(schema, bool):
            return
        if not isinstance(schema, dict):
            self._refuse(at, schema, "a schema is an object, true or false")
        for keyword, value in schema.items():
            place = f"{at}/{_escaped(keyword)}"
            if keyword in _ONE:
                self.schema(value, place)
            elif keyword in _LIST or keyword in _NAMED:
                for inner, sub in self._inner(keyword, value, place):
                    self.schema(sub, f"{place}/{inner}")
            elif keyword in _VALUES or keyword in _NUMBERS or keyword in _COUNTS:
                self._value(keyword, value, place)
            elif keyword not in _NOTES and not (at == "#" and keyword in _ROOT):
                self._refuse(at, keyword, "this keyword is not one that can be enforced")
        if at == "#":
            self._draft(schema.get("$schema"))
        self._properties(schema, at)

    def references(self) -> None:
        """After the walk: whatever is referred to has been checked."""
        for target, at in self._refs:
            path = unquote(target)
            if path not in self._seen and path.rstrip("/") not in self._seen:
                allowed = "a schema in this document is referred to as #/$defs/name"
                self._refuse(at, target, allowed)

    def _inner(self, keyword: str, value: object, at: str) -> Iterator[tuple[str, object]]:
        if keyword in _LIST and isinstance(value, list):
            yield from ((str(i), sub) for i, sub in enumerate(value))
        elif keyword in _NAMED and isinstance(value, dict):
            yield from ((_escaped(name), sub) for name, sub in value.items())
        else:
            kind = "an array" if keyword in _LIST else "an object"
            self._refuse(at, value, f"{kind} of schemas")

    def _value(self, keyword: str, value: object, at: str) -> None:
        """Of the right type, where a wrong one could be taken for something else."""
        if keyword == "$ref":
            if not isinstance(value, str):
                self._refuse(at, value, "a text")
            self._refs.append((value, at))
        elif keyword in _NUMBERS:
            if isinstance(value, bool) or not isinstance(value, int | float):
                self._refuse(at, value, "a number")
            if isinstance(value, float) and not math.isfinite(value):
                self._refuse(at, value, "a number that a float64 holds")
        elif keyword in _COUNTS and (type(value) is not int or value < 0):
            self._refuse(at, value, "a whole number, 0 or more")

    def _properties(self, schema: dict[str, Any], at: str) -> None:
        """Keys beyond those declared may come twice, and count once."""
        least = schema.get("minProperties", 0)
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            self._refuse(f"{at}/required", required, "an array of texts")
        if least > len(set(required)) + 1:
            allowed = "at most one more than there are required properties can be enforced"
            self._refuse(f"{at}/minProperties", least, allowed)

    def _draft(self, draft: object) -> None:
        if draft is not None and str(draft).rstrip("#") not in _DRAFTS:
            self._refuse("#/$schema", draft, f"one of {', '.join(_DRAFTS)}")

    def _refuse(self, at: str, value: object, allowed: str) -> NoReturn:
        raise InvalidRequestError(self._field, value, f"at {_cut(at)}: {allowed}")


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _cut(place: str) -> str:
    return place if len(place) <= 300 else f"{place[:150]}...{place[-150:]}"
