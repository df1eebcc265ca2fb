"""A small vocabulary, a model that says anything, and schemas to hold it to."""

from __future__ import annotations

import json
import random
import string
from typing import Any

import jsonschema
import numpy as np
from hypothesis import strategies as st

from services.engine.api import Guide, GuideKind
from services.engine.guides.guided import Guided
from services.engine.guides.vocabulary import Vocabulary

EOS = (1, 2)
PIECES = [
    "true",
    "false",
    "null",
    '{"',
    '":',
    '", "',
    "},",
    "]}",
    "ab",
    "abc",
    "é",
    "日本",
    "  ",
    "\n ",
]
TOKENS = [
    b"<control>",
    b"",
    b"",
    *(bytes([i]) for i in range(256)),
    *(piece.encode() for piece in PIECES),
    *(f"{a}{b}".encode() for a in string.digits for b in string.digits),
    b"ab",  # the same text as another token
]
TOKENS[0] = b""
SIZE = len(TOKENS) + 27
"""Logits that a position has: more than there are tokens, as in many a model."""
VOCABULARY = Vocabulary(TOKENS, SIZE, EOS)


def schema(text: object) -> Guide:
    return Guide(GuideKind.JSON_SCHEMA, (json.dumps(text),))


def regex(text: str) -> Guide:
    return Guide(GuideKind.REGEX, (text,))


def allowed(mask: np.ndarray) -> list[int]:
    """Token ids of a mask."""
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return [int(i) for i in np.flatnonzero(bits)]


def text_of(tokens: list[int]) -> str:
    return b"".join(TOKENS[t] for t in tokens if t not in EOS).decode()


def ids_of(text: str) -> list[int]:
    """A byte at a time."""
    return [b + 3 for b in text.encode()]


def spoken(guided: Guided, seed: int, most: int = 400) -> tuple[list[int], bool]:
    """What a model with random logits says, and whether it came to an end."""
    chance, tokens = random.Random(seed), []
    while len(tokens) < most:
        (mask,) = guided.masks()
        may = allowed(mask)
        assert may, guided.failure
        assert max(may) < len(TOKENS)
        tokens.append(chance.choice(may))
        if tokens[-1] in EOS:
            return tokens, True
        guided.accept(tokens[-1:])
    return tokens, False


def check(document: Any, of: Any) -> None:
    jsonschema.Draft202012Validator(of).validate(document)


# Schemas

_names = st.sampled_from(["a", "b", "name", "x y", 'q"', "é", "a/b", "~"])
_texts = st.text(alphabet='ab "\\é日\n/', max_size=4)
_bounded = st.one_of(
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    st.tuples(st.integers(-999, 999), st.integers(0, 500)).map(
        lambda t: {"type": "integer", "minimum": t[0], "maximum": t[0] + t[1]}
    ),
    st.sampled_from([2, 5, 7, 10]).map(
        lambda n: {"type": "integer", "multipleOf": n, "minimum": 0, "maximum": 1000}
    ),
    st.tuples(st.integers(-50, 50), st.integers(1, 9)).map(
        lambda t: {"type": "number", "multipleOf": 0.25, "minimum": t[0], "maximum": t[0] + t[1]}
    ),
    st.tuples(st.integers(0, 3), st.integers(0, 4)).map(
        lambda t: {"type": "string", "minLength": t[0], "maxLength": t[0] + t[1]}
    ),
    st.sampled_from(["^a{1,5}b?$", "^[0-9]{2,3}$", "^(x|yz){1,2}$", "^.{1,3}$"]).map(
        lambda p: {"type": "string", "pattern": p}
    ),
    st.sampled_from(["date", "ipv4", "uuid"]).map(lambda f: {"type": "string", "format": f}),
    st.lists(
        st.one_of(_texts, st.integers(-9, 9), st.booleans(), st.none()), min_size=1, max_size=4
    ).map(lambda values: {"enum": values}),
    _texts.map(lambda t: {"const": t}),
    st.just({"type": ["integer", "null"], "minimum": -(10**6), "maximum": 10**6}),
)
_leaves = st.one_of(
    _bounded,
    st.just({"type": "integer"}),
    st.just({"type": ["integer", "null"]}),
    st.tuples(st.integers(-50, 50), st.integers(1, 9)).map(
        lambda t: {"type": "number", "exclusiveMinimum": t[0], "maximum": t[0] + t[1]}
    ),
    st.just({"type": "string", "pattern": "^a+b?$"}),
    st.just({"type": "string", "format": "time"}),
)


@st.composite
def _objects(draw: st.DrawFn, inner: st.SearchStrategy, bounded: bool) -> dict:
    properties = draw(st.dictionaries(_names, inner, max_size=4))
    required = [n for n in properties if draw(st.booleans())]
    found: dict = {"type": "object", "properties": properties, "required": required}
    found["additionalProperties"] = False
    if len(required) == len(properties) and draw(st.booleans()):
        most = len(required) + draw(st.integers(0, 2))
        more = draw(inner)
        if bounded:
            found["patternProperties"] = {"^[A-Z]{1,3}$": more}
        else:
            found["additionalProperties"] = more
        found["maxProperties"] = most
        if most > len(required):
            found["minProperties"] = len(required) + draw(st.integers(0, 1))
    return found


@st.composite
def _arrays(draw: st.DrawFn, inner: st.SearchStrategy) -> dict:
    least = draw(st.integers(0, 2))
    found = {"type": "array", "items": draw(inner), "minItems": least}
    found["maxItems"] = least + draw(st.integers(0, 2))
    if draw(st.booleans()):
        found["prefixItems"] = draw(st.lists(inner, min_size=1, max_size=2))
    return found


@st.composite
def schemas(draw: st.DrawFn, *, closed: bool = False, bounded: bool = False) -> dict:
    """Schemas whose documents a model that says anything soon ends.

    closed: and show that they are over, as a number does not: for a model that likes no end.
    bounded: none of whose documents is long, whatever the model says: no number has digits without
    end, no text or key as many characters as it likes.
    """
    leaves = _bounded if bounded else _leaves

    def inside(inner: st.SearchStrategy) -> st.SearchStrategy:
        return st.one_of(
            _objects(inner, bounded),
            _arrays(inner),
            st.lists(inner, min_size=1, max_size=3).map(lambda several: {"anyOf": several}),
        )

    tree = st.recursive(leaves, inside, max_leaves=6)
    whole = _objects(st.one_of(tree, st.just({"$ref": "#/$defs/s"})), bounded)
    shared = draw(leaves)
    found = dict(draw(whole if closed else st.one_of(tree, whole)))
    return found | {"$defs": {"s": shared}}
