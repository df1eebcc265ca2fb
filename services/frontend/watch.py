"""Watches what workers owe one request, and gives up those that are silent for too long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from services.frontend.attempt import State
from services.frontend.awake import Awake
from services.frontend.events import Role, WorkerFailed
from services.frontend.patience import Debt, Patience, Verdict
from services.frontend.request import Request
from services.frontend.workers import Workers
from services.runtime.errors import WorkerSilentError

LEAST_SECONDS = 0.01
"""Between two looks."""


class Watch:
    """Looks at each debt when patience.py says so. On the event loop; `clock`: seconds."""

    def __init__(
        self,
        core: Request,
        workers: Workers,
        patience: Patience,
        awake: Awake,
        clock: Callable[[], float],
        feed: Callable[[WorkerFailed], None],
    ) -> None:
        self._core = core
        self._workers = workers
        self._patience = patience
        self._awake = awake
        self._clock = clock
        self._feed = feed
        self._loop = asyncio.get_running_loop()
        self._wait(clock() + patience.look_seconds)

    def stop(self) -> None:
        """Ends it."""
        self._timer.cancel()

    def _wait(self, at: float) -> None:
        self._timer = self._loop.call_later(at - self._clock(), self._look, at)

    def _look(self, due: float) -> None:
        self._awake.due(due)
        again_at = self._clock() + self._patience.look_seconds
        for debt in self._core.owing:
            verdict = self._judge(debt)
            again_at = min(again_at, verdict.again_at)
            if verdict.silent:
                error = WorkerSilentError(verdict.silent, worker=debt.worker.worker_id)
                away = verdict.unreachable
                self._feed(WorkerFailed(debt.attempt, debt.role, error, away, ended=False))
        if self._core.state is not State.ENDED:
            self._wait(max(again_at, self._clock() + LEAST_SECONDS))

    def _judge(self, debt: Debt) -> Verdict:
        address, workers = debt.worker.address, self._workers
        link = (workers.prefill if debt.role is Role.PREFILL else workers.decode)(address)
        verdict = self._patience.judge(debt, link.pulse.heard, self._awake.since, self._clock())
        if verdict.ping:
            link.pulse.ping()
        return verdict
