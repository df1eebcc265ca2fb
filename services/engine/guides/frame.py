"""JSON documents in a frame of fixed text, such as a model's calls of functions.

A frame is a JSON object with

- `documents`: an array of {"schema", "before", "number", "behind"}: a JSON schema (as text) and the
  text around a document of it; with `number` digits and this text come behind `before`;
- `several`: any number of documents may come, with `between` between them; otherwise one;
- `before`, `behind`: text around all of them;
- `thought`: {"begins", "ends"}: any text up to the first `ends` comes before it all, if it begins
  so; with "" for `begins` it must.

All but `documents` and their schemas may be missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from services.engine.guides.schema import check_schema
from services.runtime.errors import InvalidRequestError

MAX_DOCUMENTS = 256

_TEXTS = ("before", "behind", "between")
_KEYS = frozenset({*_TEXTS, "documents", "several", "thought"})
_DOCUMENT_TEXTS = ("before", "number", "behind")


def check_frame(field: str, text: str) -> dict[str, Any]:
    """The frame. Raises InvalidRequestError naming the field and the place in it."""
    try:
        frame: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(field, text, f"must be JSON: {error}") from None
    documents = frame.get("documents") if isinstance(frame, dict) else None
    if not isinstance(documents, list) or not 1 <= len(documents) <= MAX_DOCUMENTS:
        _refuse(field, text, f"an object with documents, 1 to {MAX_DOCUMENTS} of them")
    if unknown := set(frame) - _KEYS:
        _refuse(field, min(unknown), f"one of {', '.join(sorted(_KEYS))}")
    _check_texts(field, frame, _TEXTS)
    if "thought" in frame:
        _check_texts(f"{field}.thought", frame["thought"], ("begins", "ends"))
        if not frame["thought"].get("ends"):
            _refuse(f"{field}.thought.ends", "", "at least one character")
    for i, document in enumerate(documents):
        place = f"{field}.documents[{i}]"
        _check_texts(place, document, (*_DOCUMENT_TEXTS, "schema"))
        check_schema(f"{place}.schema", document.get("schema", ""))
    return frame


def frame_grammar(frame: Mapping[str, Any], literal: Callable[[str], str]) -> tuple[str, list[Any]]:
    """Its rules in Lark's notation, and the schemas that they name as @d0, @d1, ...

    `literal`: a text as a regular expression.
    """

    def terminal(text: str) -> str:
        return f"/{literal(text)}/" if text else ""

    documents = frame["documents"]
    names = [f"d{i}" for i in range(len(documents))]
    rules = []
    for name, d in zip(names, documents, strict=True):
        number = f"/[0-9]+/ {terminal(d['number'])}" if d.get("number") else ""
        before, behind = terminal(d.get("before", "")), terminal(d.get("behind", ""))
        rules.append(f"a{name}: {before} {number} @{name} {behind}")
    more = ""
    if frame.get("several"):
        more = f"({terminal(frame.get('between', ''))} document)*"
    before, behind = terminal(frame.get("before", "")), terminal(frame.get("behind", ""))
    start = f"{before} document {more} {behind}"
    thought = frame.get("thought")
    if thought is not None:
        ends = literal(thought["ends"])
        # Up to the first of them: nothing that has one, and then more.
        rules.append(f"THOUGHT: /(?s:.*){ends}/ & ~/(?s:.*){ends}(?s:.+)/")
        begins = terminal(thought.get("begins", ""))
        thinks = f"{begins} THOUGHT /\\n{{1,2}}/?"
        start = f"({thinks})? {start}" if begins else f"{thinks} {start}"
    rules += [f"document: {' | '.join('a' + name for name in names)}", f"start: {start}"]
    schemas = [json.loads(d["schema"]) for d in documents]
    return "\n".join(rules), [{} if s is True else s for s in schemas]


def _check_texts(field: str, value: object, keys: tuple[str, ...]) -> None:
    if not isinstance(value, dict):
        _refuse(field, value, "an object")
    for key in keys:
        if not isinstance(value.get(key, ""), str):
            _refuse(f"{field}.{key}", value[key], "a text")


def _refuse(field: str, value: object, allowed: str) -> NoReturn:
    raise InvalidRequestError(field, value, allowed)
