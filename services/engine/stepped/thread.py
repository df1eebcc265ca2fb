"""The step thread: commands in, steps, results out, until it is told to close and holds nothing."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

from services.engine.stepped.inbox import Close, Inbox
from services.engine.stepped.rounds import REST
from services.engine.stepped.step import Stepper, StepResult

log = logging.getLogger(__name__)


class StepThread:
    """Runs a Stepper. `post` is called on the thread with what each step brought.

    If the stepper breaks beyond one step, every live request fails and it goes on; if even that
    fails the thread ends, and `died` is called with the error. Where steps are taken with other
    ranks, whom a broken one leaves waiting, the thread ends at once.
    """

    def __init__(
        self,
        stepper: Stepper,
        inbox: Inbox,
        post: Callable[[StepResult], None],
        died: Callable[[Exception], None],
    ) -> None:
        self._stepper = stepper
        self._inbox = inbox
        self._post = post
        self._died = died
        self._thread = threading.Thread(target=self._run, name="engine-step", daemon=True)

    @property
    def current(self) -> bool:
        """Whether the caller runs on it."""
        return threading.current_thread() is self._thread

    def start(self) -> None:
        """Begins to step."""
        self._thread.start()

    def join(self) -> None:
        """Waits for the end, which Close in the inbox brings about."""
        self._thread.join()

    def _run(self) -> None:
        try:
            closing, last, rounds = False, REST, self._stepper.rounds
            while not last.over:
                leaving = closing and self._stepper.idle
                for command in self._inbox.take(wait=not (last.work or leaving or rounds.due)):
                    closing = closing or isinstance(command, Close)
                    with self._doubt():
                        self._stepper.apply(command)
                busy, last = last.work, REST
                with self._doubt():
                    plan = self._stepper.plan()
                    # Fetches begin before the model runs, not after.
                    self._tell()
                    leaving = closing and self._stepper.idle
                    if plan.work or busy or leaving or rounds.due:
                        last = self._stepper.run(plan, leaving=leaving)
                self._tell()
        except Exception as error:
            log.exception("the engine's step thread ends")
            self._died(error)

    @contextlib.contextmanager
    def _doubt(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self._stepper.rounds.shared:
                raise
            log.exception("the engine's books are in doubt; every request fails")
            self._stepper.fail_all(error)

    def _tell(self) -> None:
        result = self._stepper.take()
        if result:
            self._post(result)
