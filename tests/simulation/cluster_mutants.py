"""Rules of the system, each of which can be taken away, to see that the simulation misses it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

from kvtransfer.leases import LeaseTable
from services.coordinator.core.admission import Queue
from services.coordinator.core.core import Core
from services.coordinator.core.desk import Desk
from services.coordinator.core.fairness import Fairness
from services.coordinator.core.load import Load
from services.coordinator.core.pools import Side
from services.engine.stepped.scheduler import Scheduler
from services.engine.stepped.step import Stepper
from services.frontend import request as frontend_request
from services.frontend.events import DecodeOutput
from services.frontend.request import Request

Mutant = Callable[[], contextlib.AbstractContextManager[object]]


def _late_tokens():
    """The frontend takes tokens of attempts that are over."""
    handle = Request.handle

    def anybody(self, event, now):
        if isinstance(event, DecodeOutput) and event.attempt != self.course.number:
            event = DecodeOutput(self.course.number, event.token_ids, event.logprobs)
        return handle(self, event, now)

    return mock.patch.object(Request, "handle", anybody)


def _no_cancel():
    """The frontend does not tell a worker that an attempt is over."""
    leave = Request._leave

    def quietly(self, course):
        return [c for c in leave(self, course) if not isinstance(c, frontend_request.CancelDecode)]

    return mock.patch.object(Request, "_leave", quietly)


def _context_forgotten():
    """A request that is placed again does not take the tokens along that it has."""
    return mock.patch.object(Request, "output", property(lambda self: self.taken.tokens[:-1]))


def _blocks_kept():
    """A worker does not give back the blocks of a request that is cancelled."""
    drop = Scheduler._drop

    def careless(self, sequence):
        if sequence.outputs > 3 and sequence.phase.name == "ENDED":
            sequence.blocks = sequence.blocks[:-1]
        drop(self, sequence)

    return mock.patch.object(Scheduler, "_drop", careless)


def _block_shared():
    """A worker gives a block away that is in use."""
    drop = Scheduler._drop

    def twice(self, sequence):
        blocks = list(sequence.blocks[-1:])
        drop(self, sequence)
        for block in blocks:
            if self._pool._pool.references(block):
                self._pool.release([block])

    return mock.patch.object(Scheduler, "_drop", twice)


def _lease_for_ever():
    """A lease does not expire."""
    return mock.patch.object(LeaseTable, "due", return_value=[])


def _booking_kept():
    """The coordinator does not release a booking, whatever is reported."""
    return mock.patch.object(Load, "_remove", return_value=None)


def _drainers_chosen():
    """The coordinator places requests on workers that leave."""
    put = Side.put

    def anyhow(self, worker, *, here, turn=False):
        if worker.standing.name != "DRAINING":
            put(self, worker, here=here, turn=turn)

    return mock.patch.object(Side, "put", anyhow)


def _queue_forgotten():
    """Nobody in the queue is served before its deadline."""
    return mock.patch.object(Desk, "serve")


def _events_lost():
    """A worker's changes of its prefix cache are taken for older than they are."""
    kv_events = Core._kv_events

    def deaf(self, event, now):
        if event.sequence % 7:
            kv_events(self, event, now)

    return mock.patch.object(Core, "_kv_events", deaf)


def _overfull():
    """A worker runs more than it may."""
    return mock.patch.object(Scheduler, "_may_admit", lambda self, left: bool(self._waiting))


def _preempted_forgotten():
    """A preempted sequence goes on with the blocks it no longer has."""
    return mock.patch.object(Stepper, "_end")


def _unfair():
    """Tenants are not charged for what they are served."""
    return mock.patch.object(Fairness, "_add")


def _impatient():
    """Waiting for long gives nobody a turn."""
    return mock.patch.object(Queue, "_is_old", return_value=False)


MUTANTS: dict[str, Mutant] = {
    "late tokens dropped": _late_tokens,
    "cancels": _no_cancel,
    "context": _context_forgotten,
    "blocks freed": _blocks_kept,
    "blocks owned": _block_shared,
    "lease expiry": _lease_for_ever,
    "bookings released": _booking_kept,
    "draining respected": _drainers_chosen,
    "queue served": _queue_forgotten,
    "resynchronization": _events_lost,
    "batch bound": _overfull,
    "ends": _preempted_forgotten,
    "fairness": _unfair,
    "turns of those who waited": _impatient,
}


OF_SATURATED = frozenset({"fairness", "turns of those who waited"})
"""Rules that only full queues need."""


@contextlib.contextmanager
def without(rule: str) -> Iterator[None]:
    """The system lacks a rule within this block."""
    with MUTANTS[rule]():
        yield
