"""Which of llguidance's grammar language is Lark's, and enforced as Lark means it."""

from __future__ import annotations

import re

from services.runtime.errors import InvalidRequestError

_QUOTED = re.compile(
    r'"(?:\\.|[^"\\\n])*"i?'  # a text
    r"|//[^\n]*|\#[^\n]*"  # a comment
    r"|/(?:\\.|[^/\\\n])+/[imslux]*"  # a regular expression
)

# The library's own additions, and why there is none of them here.
_REFUSED = (
    (re.compile(r"%(?!import\b|ignore\b)\w+"), "of directives, %import and %ignore are known"),
    (re.compile(r"<[^>\n]*>?"), "tokens can't be named: a grammar is about text"),
    (re.compile(r"@[\w-]*"), "there is no other grammar to refer to"),
    (re.compile(r"&"), "terminals can't be intersected"),
    (re.compile(r"~(?!\s*\d)"), "terminals can't be negated; ~ is followed by a count"),
    (re.compile(r"::\S*"), "rules have no parameters"),
    (
        re.compile(r"^[ \t]*[?!]*[\w-]+[ \t]*\[[^\]\n]*\][ \t]*(\.-?\d+)?[ \t]*:", re.MULTILINE),
        "rules have no attributes",
    ),
)


def check_lark(field: str, text: str) -> None:
    """Raises InvalidRequestError for what would do something else than hold text to a form."""
    bare = _QUOTED.sub(lambda found: " " * len(found[0]), text)
    for pattern, allowed in _REFUSED:
        found = pattern.search(bare)
        if found is not None:
            start = found.start() + len(found[0]) - len(found[0].lstrip())
            line = text.count("\n", 0, start) + 1
            raise InvalidRequestError(field, text[start : found.end()], f"line {line}: {allowed}")
