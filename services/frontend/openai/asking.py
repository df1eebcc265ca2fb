"""What one OpenAI request asks of the frontend, and its own names for what that refuses. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from services.frontend.chat import Function, ToolChoice
from services.frontend.validate import AskedSampling, Input
from services.runtime.errors import InvalidRequestError, TandemError, by_reason

TIERS = {"auto": 0, "default": 0, "flex": -50, "priority": 50}
"""Priority of a service tier."""

Names = tuple[tuple[str, str], ...]
"""(path here, path there): the first that begins an error's path is replaced."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a request may have; see frontend.* in the settings."""

    messages: int
    tools: int
    tools_bytes: int
    choices: int


@dataclass(frozen=True, slots=True)
class Asking:
    """A request. `inputs`: one conversation, or prompts. `n`: answers to each of them."""

    model: str
    inputs: tuple[Input, ...]
    sampling: AskedSampling
    stop: tuple[str, ...]
    n: int
    tier: str
    priority: int
    session: str
    ttft_seconds: float
    itl_seconds: float
    include_usage: bool
    names: Names
    tools: tuple[Function, ...] = ()
    choice: ToolChoice = field(default_factory=ToolChoice)
    parallel: bool = True
    echo: bool = False


@contextmanager
def named_as(names: Names) -> Iterator[None]:
    """Errors from within name the fields that the client knows."""
    try:
        yield
    except InvalidRequestError as error:
        raise _renamed(error, names) from None


def _renamed(error: InvalidRequestError, names: Names) -> TandemError:
    told = error.metadata
    old = told.get("field", "")
    new, allowed = renamed(old, names), told.get("allowed", "")
    for name in ("sampling.", "service_level."):
        allowed = allowed.replace(name, "")
    message = error.message
    if old and message.startswith(f"{old}: "):
        message = f"{new}: {told.get('value')} is not allowed; {allowed}"
    return by_reason(error.reason, message, {**told, "field": new, "allowed": allowed})


def renamed(path: str, names: Sequence[tuple[str, str]]) -> str:
    """A field's path there."""
    for old, new in names:
        if path == old or (path.startswith(old) and (old[-1] == "." or path[len(old)] in ".[")):
            return new + path[len(old) :]
    return path
