"""What an error of a worker or of the coordinator means for the request it hit."""

from __future__ import annotations

from services.runtime.errors import NoWorkersError, TandemError, by_reason

FINAL = frozenset(
    {
        *("INVALID_REQUEST", "DUPLICATE_REQUEST", "UNKNOWN_MODEL", "UNKNOWN_ADAPTER", "DEADLINE"),
        *("GUIDE_FAILED", "ADAPTER_FAILED"),
    }
)
"""Another worker would say the same: it is the request, and says nothing of who ran it."""

FULL = frozenset({"ENGINE_OVERLOADED", "ROLE_CHANGED"})
"""The worker is well, and will do once it has room, or for the other half of the work: the
coordinator knows to wait for that."""

LEAVING = frozenset({"DRAINING"})
"""The worker goes, as was meant to be: that is nobody's failure."""

REFUSALS = 10
"""By workers that are full or leave, which weigh as much as one failure: two coordinators may give
the same room away, and each learns it from the worker, once a heartbeat."""

SOURCE = frozenset(
    {"KV_SOURCE_LOST", "LAYOUT_MISMATCH", "NO_TRANSPORT", "KV_REGION_DENIED", "KV_WRONG_TENANT"}
)
"""Said by a decode worker of the prefill worker that it was to fetch from. Where the fault is with
the two together, one has to go, and a prompt is the cheaper to move."""


def is_final(error: TandemError) -> bool:
    """No other placement can help."""
    return error.reason in FINAL


def excludes(error: TandemError) -> bool:
    """The worker is not to be used for this request again."""
    return error.reason not in FULL


def weighs(error: TandemError) -> bool:
    """It counts as a failure, of which a request survives few."""
    return error.reason not in FULL | LEAVING


def blames_source(error: TandemError) -> bool:
    """A decode worker's error that is about the attempt's prefill worker."""
    return error.reason in SOURCE


def given_up(error: TandemError, attempts: int) -> TandemError:
    """The last attempt's error, which is now the request's.

    That one worker leaves is nothing to a client: to it, no worker was there for long enough.
    """
    message = f"{error.message} (the last of {attempts} placements)"
    reason = NoWorkersError.reason if error.reason in LEAVING else error.reason
    told = by_reason(reason, message, {**error.metadata, "attempts": str(attempts)})
    told.code = error.code
    return told


def no_more_workers(error: TandemError, last: TandemError | None) -> TandemError:
    """The coordinator's refusal, with what led to it where attempts went before."""
    if last is None or error.reason != NoWorkersError.reason:
        return error
    message = f"{error.message}; the last attempt ended with {last.reason}: {last.message}"
    return by_reason(error.reason, message, error.metadata)
