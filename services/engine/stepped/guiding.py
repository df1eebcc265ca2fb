"""Requests with a guide: they reach the step thread when it is compiled."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from services.engine.api import EngineFault
from services.engine.guides.compiling import Guides
from services.engine.stepped.inbox import Command, Proceed, Submit
from services.engine.stepped.sequence import Sequence
from services.runtime.errors import TandemError

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Held:
    sequence: Sequence
    task: asyncio.Task[None]
    proceeds: list[Proceed] = field(default_factory=list)


class Guiding:
    """Belongs to the event loop.

    `put` takes what is for the step thread. `failed` is told of a sequence whose guide is of no
    use, and why: nothing of it has reached the step thread.
    """

    def __init__(
        self,
        guides: Guides,
        put: Callable[[Command], None],
        failed: Callable[[Sequence, EngineFault], None],
    ) -> None:
        self.guides = guides
        self._put = put
        self._failed = failed
        self._held: dict[int, _Held] = {}

    def submit(self, sequence: Sequence) -> None:
        """Passes a sequence on, when its guide is there."""
        if sequence.request.sampling.guide is None:
            self._put(Submit(sequence))
            return
        task = asyncio.get_running_loop().create_task(self._begin(sequence))
        self._held[sequence.serial] = _Held(sequence, task)

    def proceed(self, command: Proceed) -> None:
        """Passes it on behind its sequence."""
        held = self._held.get(command.serial)
        if held is None:
            self._put(command)
        else:
            held.proceeds.append(command)

    def cancel(self, serial: int) -> Sequence | None:
        """The sequence, if it is still here: it goes no further."""
        held = self._held.pop(serial, None)
        if held is None:
            return None
        held.task.cancel()
        return held.sequence

    async def _begin(self, sequence: Sequence) -> None:
        fault, guided = None, None
        try:
            guided = await self.guides.begin(sequence.request)
        except TandemError as error:
            fault = EngineFault(error.reason, error.message, error.metadata)
        except Exception as error:
            log.exception("a guide could not be compiled")
            what = f"the guide could not be compiled: {type(error).__name__}"
            fault = EngineFault("ENGINE_FAILED", what)
        held = self._held.pop(sequence.serial)
        if fault is not None:
            self._failed(sequence, fault)
            return
        self._put(Submit(sequence, guided))
        for proceed in held.proceeds:
            self._put(proceed)
