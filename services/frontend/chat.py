"""A conversation as clients send it, and the functions that its answer may call."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Call:
    """A call that an assistant's turn made. `arguments`: JSON text, as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Turn:
    """What one said. `content`: None where there are only calls.

    `name`: who speaks, of several with one role, or the function that a tool's turn answers for.
    `call_id`: the call that a tool's turn answers. `reasoning`: what an assistant thought before.
    """

    role: str
    content: str | None = None
    name: str = ""
    calls: tuple[Call, ...] = ()
    call_id: str = ""
    reasoning: str | None = None


@dataclass(frozen=True, slots=True)
class Function:
    """What can be called. `parameters`: JSON schema of its arguments, as text; "" for any object.

    `strict`: arguments must have the schema also where the model is free to call or not.
    """

    name: str
    description: str = ""
    parameters: str = ""
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Chat:
    """Turns, oldest first. `variables`: for the template, such as {"enable_thinking": False}.

    `continues`: the last turn is the assistant's, and the answer goes on with its content.
    """

    turns: tuple[Turn, ...]
    tools: tuple[Function, ...] = ()
    variables: Mapping[str, object] = field(default_factory=dict)
    continues: bool = False


class Calling(enum.Enum):
    """What an answer may do with functions."""

    NONE = "none"
    AUTO = "auto"
    REQUIRED = "required"
    NAMED = "named"


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`name`: with NAMED, the function that the answer must call."""

    calling: Calling = Calling.AUTO
    name: str = ""
