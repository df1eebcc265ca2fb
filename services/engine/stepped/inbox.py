"""What the event loop tells the step thread, and the queue it goes through."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

from services.engine.api import EngineFault
from services.engine.guides.guided import Guided
from services.engine.stepped.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Submit:
    """A new request, and the form of its output, if it has one."""

    sequence: Sequence
    guided: Guided | None = None


@dataclass(frozen=True, slots=True)
class Proceed:
    """A request's first tokens, which came at `at` by the engine's clock, seconds."""

    serial: int
    token_ids: tuple[int, ...]
    at: float


@dataclass(frozen=True, slots=True)
class Cancel:
    """End a request; free its lease, also if prefill has just ended and left only that."""

    serial: int
    request_id: str


@dataclass(frozen=True, slots=True)
class FetchStopped:
    """A fetch is over: nothing writes into its blocks any more.

    `arrived`: leading blocks that were verified, the first `restored` of them from this worker's
    tiers; what else is said is of the rest. `lost`: the reason code if not all were, `why` in
    words. `fault`: why it can't be made up for by computing, if it can't. `ended`: when, by the
    engine's clock. `choice`: why this transport.
    """

    serial: int
    arrived: int = 0
    restored: int = 0
    transport: str = ""
    bytes: int = 0
    blocks: int = 0
    seconds: float = 0.0
    corrupt_blocks: int = 0
    choice: str = ""
    lost: str = ""
    why: str = ""
    fault: EngineFault | None = None
    ended: float = 0.0


@dataclass(frozen=True, slots=True)
class ChangeAdapter:
    """Give the model an adapter's weights, or drop them (None); who uses them comes after."""

    adapter_id: str
    weights: Any


@dataclass(frozen=True, slots=True)
class Close:
    """End the step thread once no request is left."""


Command = Submit | Proceed | Cancel | FetchStopped | ChangeAdapter | Close


class Inbox:
    """Any thread puts, one takes."""

    def __init__(self) -> None:
        self._commands: deque[Command] = deque()
        self._nudged = False
        self._changed = threading.Condition()

    def put(self, command: Command) -> None:
        """Never blocks for long."""
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    def nudge(self) -> None:
        """There is no command, but another look may be worth it: blocks became free."""
        with self._changed:
            self._nudged = True
            self._changed.notify()

    def take(self, *, wait: bool) -> list[Command]:
        """All there is; with `wait`, not before there is something, or a nudge."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._commands or self._nudged)
            self._nudged = False
            commands = list(self._commands)
            self._commands.clear()
        return commands
