"""Text of others on one line of a terminal or a log."""

from __future__ import annotations


def one_line(text: str) -> str:
    r"""Text without anything that could drive a terminal, reorder a line or begin another one.

    What isn't printable (control and format characters, surrogates, separators but the space) is
    written as an escape: "\n", "\x1b", "\u202e".
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )
