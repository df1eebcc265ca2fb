"""The phases of a sequence: every phase, every event, and where each leads."""

from __future__ import annotations

import enum


class Phase(enum.Enum):
    """Where a sequence stands. Admitted means: any but WAITING and ENDED."""

    WAITING = "waiting"
    """In the queue; holds no block."""
    FETCHING = "fetching"
    """Its blocks are being filled from another worker."""
    RUNNING = "running"
    """In the batch: some token's KV is still to be computed."""
    PARKED = "parked"
    """KV complete; the first token, which prefill gives, has not come."""
    RETURNING = "returning"
    """Preempted while fetching: its blocks are free once the fetch has stopped."""
    LEAVING = "leaving"
    """Ended while fetching: the same."""
    ENDED = "ended"
    """Holds nothing."""


class Event(enum.Enum):
    """What happens to a sequence."""

    ADMIT = "admit"
    """Blocks allocated; what is missing will be computed."""
    ADMIT_FETCH = "admit_fetch"
    """Blocks allocated; what is missing will be fetched."""
    FETCH_STOPPED = "fetch_stopped"
    """Nothing writes into its blocks from outside any more, for whatever reason."""
    PARK = "park"
    """KV complete, first token missing."""
    PROCEED = "proceed"
    """The first token came."""
    PREEMPT = "preempt"
    """Its blocks are needed by an older sequence."""
    END = "end"
    """Finished, cancelled or failed."""


_P, _E = Phase, Event

TRANSITIONS: dict[tuple[Phase, Event], Phase] = {
    (_P.WAITING, _E.ADMIT): _P.RUNNING,
    (_P.WAITING, _E.ADMIT_FETCH): _P.FETCHING,
    (_P.WAITING, _E.PROCEED): _P.WAITING,
    (_P.WAITING, _E.END): _P.ENDED,
    (_P.FETCHING, _E.FETCH_STOPPED): _P.RUNNING,
    (_P.FETCHING, _E.PROCEED): _P.FETCHING,
    (_P.FETCHING, _E.PREEMPT): _P.RETURNING,
    (_P.FETCHING, _E.END): _P.LEAVING,
    (_P.RUNNING, _E.PARK): _P.PARKED,
    (_P.RUNNING, _E.PROCEED): _P.RUNNING,
    (_P.RUNNING, _E.PREEMPT): _P.WAITING,
    (_P.RUNNING, _E.END): _P.ENDED,
    (_P.PARKED, _E.PROCEED): _P.RUNNING,
    (_P.PARKED, _E.PREEMPT): _P.WAITING,
    (_P.PARKED, _E.END): _P.ENDED,
    (_P.RETURNING, _E.FETCH_STOPPED): _P.WAITING,
    (_P.RETURNING, _E.PROCEED): _P.RETURNING,
    (_P.RETURNING, _E.END): _P.LEAVING,
    (_P.LEAVING, _E.FETCH_STOPPED): _P.ENDED,
}


def after(phase: Phase, event: Event) -> Phase:
    """The next phase. A pair that is not in the table is a bug: raises ValueError."""
    try:
        return TRANSITIONS[phase, event]
    except KeyError:
        raise ValueError(f"{event.value} makes no sense for a {phase.value} sequence") from None
