"""A guide as one grammar of llguidance; refuses what the library would not enforce as meant."""

from __future__ import annotations

import json

from services.engine.api import Guide, GuideKind
from services.engine.guides.frame import check_frame, frame_grammar
from services.engine.guides.lark import check_lark
from services.engine.guides.schema import check_schema
from services.runtime.errors import InvalidRequestError

MAX_TEXT_BYTES = 2**18
"""Of a guide. What compiles it has a stack that even so long a chain of references fits."""
MAX_CHOICES = 4096

_FREE = '%llguidance {"no_forcing": true}'
"""Where one text only can follow, any tokens that spell it may: the model knows best how."""

_SPACE = r"( |\n {0,40})"
"""White space between the parts of JSON: a space, or a line's end and indentation. It is allowed
once at a place, so that a model can't go on with it for ever."""

FIELDS = {
    GuideKind.JSON_SCHEMA: "sampling.guide.json_schema",
    GuideKind.REGEX: "sampling.guide.regex",
    GuideKind.GRAMMAR: "sampling.guide.grammar",
    GuideKind.CHOICE: "sampling.guide.choice.texts",
    GuideKind.JSON_OBJECT: "sampling.guide.json_object",
    GuideKind.FRAME: "sampling.guide.frame",
}


def grammar_of(guide: Guide) -> str:
    """The grammar, as JSON text for LLMatcher. Raises InvalidRequestError naming field and place.

    What only compiling finds (a regular expression that is none, say) is not found here.
    """
    check_size(guide)
    field = FIELDS[guide.kind]
    match guide.kind:
        case GuideKind.JSON_SCHEMA:
            return _json(check_schema(field, guide.texts[0]))
        case GuideKind.JSON_OBJECT:
            return _json({"type": "object"})
        case GuideKind.GRAMMAR:
            check_lark(field, guide.texts[0])
            return _lark(guide.texts[0])
        case GuideKind.REGEX:
            return _lark(f"start: /{_slashes_escaped(guide.texts[0])}/")
        case GuideKind.CHOICE:
            return _lark(f"start: /{'|'.join(map(_literal, guide.texts))}/")
        case GuideKind.FRAME:
            return _framed(*frame_grammar(check_frame(field, guide.texts[0]), _literal))


def check_size(guide: Guide) -> None:
    """As many texts as the kind has, none empty, not too much of it. Raises InvalidRequestError."""
    field = FIELDS[guide.kind]
    size = sum(len(text.encode()) for text in guide.texts)
    if size > MAX_TEXT_BYTES:
        raise InvalidRequestError(field, f"{size} bytes", f"at most {MAX_TEXT_BYTES} bytes")
    if guide.kind is GuideKind.CHOICE:
        if not 1 <= len(guide.texts) <= MAX_CHOICES:
            allowed = f"1 to {MAX_CHOICES} texts"
            raise InvalidRequestError(field, f"{len(guide.texts)} texts", allowed)
        if len(set(guide.texts)) < len(guide.texts):
            twice = next(t for t in guide.texts if guide.texts.count(t) > 1)
            raise InvalidRequestError(field, twice, "texts that differ from each other")
    for i, text in enumerate(guide.texts):
        if not text:
            named = f"{field}[{i}]" if guide.kind is GuideKind.CHOICE else field
            raise InvalidRequestError(named, text, "at least one character")


def _json(schema: dict[str, object]) -> str:
    return _framed("start: @d0", [schema])


def _framed(rules: str, schemas: list[dict[str, object]]) -> str:
    """Rules that refer to these schemas as @d0, @d1, ..."""
    options = {"lenient": False, "coerce_one_of": False, "whitespace_pattern": _SPACE}
    top = {"lark_grammar": f"{rules}\n{_FREE}"}
    documents = [
        {"name": f"d{i}", "json_schema": schema | {"x-guidance": options}}
        for i, schema in enumerate(schemas)
    ]
    return json.dumps({"grammars": [top, *documents]})


def _lark(text: str) -> str:
    # At the end, so that line numbers in what the library says are the client's.
    return json.dumps({"grammars": [{"lark_grammar": f"{text}\n{_FREE}\n"}]})


def _slashes_escaped(expression: str) -> str:
    """For between two slashes: a slash that is not escaped yet becomes so, and line ends."""
    parts = []
    escaped = False
    for character in expression:
        if character == "\n":
            parts.append("n" if escaped else "\\n")
        else:
            parts.append("\\/" if character == "/" and not escaped else character)
        escaped = character == "\\" and not escaped
    return "".join(parts)


def _literal(text: str) -> str:
    """As a regular expression: letters and digits as they are, all else by its code point."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):X}}}" for c in text)
