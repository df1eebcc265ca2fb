"""A worker: one engine behind the servicers of the roles it may have, and the role it has."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from services.engine.api import Engine, EngineFault, TokenOutput
from services.runtime.errors import DrainingError, EngineFailedError, RoleChangedError
from services.worker.duty import SERVES, Duty

log = logging.getLogger(__name__)

DRAIN_POLL_SECONDS = 0.05

_LEAVING = EngineFault(DrainingError.reason, "this worker is shutting down")


class WorkerServicer(Protocol):
    """What a servicer does beside serving its calls."""

    @property
    def live(self) -> int:
        """Requests taken on and not finished."""

    def deliver(self, outputs: tuple[TokenOutput, ...]) -> None:
        """One engine step's outputs. Those of requests that it does not have are not its own."""

    def open(self) -> None:
        """Takes new requests, as it does from the start."""

    def drain(self, why: EngineFault) -> None:
        """Refuses new requests with `why`; what runs finishes, or moves where it can."""

    def hand_back(self, why: EngineFault) -> None:
        """Gives what still runs back to the frontends."""


class Worker:
    """Use on the event loop's thread. `servicers` are those of `duty.services`."""

    def __init__(
        self,
        engine: Engine,
        servicers: Mapping[str, WorkerServicer],
        duty: Duty,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._servicers = servicers
        self._duty = duty
        self._clock = clock
        self._serve()

    @property
    def live(self) -> int:
        """Requests taken on and not finished."""
        return sum(servicer.live for servicer in self._servicers.values())

    def change_role(self, role: str, why: str) -> bool:
        """A coordinator asks for a role; whether it is the worker's now.

        What the new role serves is taken at once. What only the old one did is refused from now on,
        and what runs of it goes on until it is done, or moved to another worker.
        """
        before = self._duty.role
        refused = self._duty.take(role, self._clock())
        if refused:
            log.info("stays %s and does not become %s (%s): %s", before, role, why, refused)
            return False
        if role != before:
            log.info("becomes %s, was %s: %s; %d requests here", role, before, why, self.live)
            self._serve()
        return True

    async def deliver(self) -> None:
        """Hands the engine's outputs to the servicers, each of which knows its requests.

        Raises EngineFailedError when there will be no more: a worker that can't generate must not
        look alive.
        """
        servicers = tuple(self._servicers.values())
        async for step in self._engine.outputs():
            for servicer in servicers:
                servicer.deliver(step.outputs)
        raise EngineFailedError("the engine stopped")

    async def drain(self, seconds: float) -> None:
        """Lets requests finish, move and be fetched for a while, then hands the rest back."""
        self._duty.leaving = True
        for servicer in self._servicers.values():
            servicer.drain(_LEAVING)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        # Leases end inside the engine (released, expired), which nothing announces: so it polls.
        while (self.live or self._engine.stats().leases) and loop.time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(DRAIN_POLL_SECONDS)
        if self.live:
            log.info("handing back %d requests that did not finish in %g s", self.live, seconds)
        for servicer in self._servicers.values():
            servicer.hand_back(_LEAVING)

    def _serve(self) -> None:
        """Opens what the role serves, and then closes the rest: something is open all the time."""
        role = self._duty.role
        closed = EngineFault(RoleChangedError.reason, f"this worker's role is {role} now")
        for name in SERVES[role]:
            self._servicers[name].open()
        for name in self._servicers.keys() - SERVES[role]:
            self._servicers[name].drain(closed)
