"""What an answer gains with a piece of its text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """More of what the model says. Never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of what the model thinks. Never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """A call of this function, the answer's `index`-th, from 0. Its arguments follow.

    `id`: what the model calls it, which its template wants to see again; "" if it names none.
    """

    index: int
    name: str
    id: str = ""


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON text of a call's arguments. Never empty."""

    index: int
    text: str


Delta = Content | Reasoning | CallBegins | CallArguments
