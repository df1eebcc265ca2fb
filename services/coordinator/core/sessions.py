"""Which worker had a session's last request. Bounded: the session unused for longest goes first."""

from __future__ import annotations

from collections import OrderedDict

LIMIT = 1 << 16


class Sessions:
    """By tenant and session."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._last: OrderedDict[tuple[str, str], str] = OrderedDict()

    def last(self, tenant: str, session: str) -> str:
        """The worker's id; empty if there is none, or none is remembered."""
        return self._last.get((tenant, session), "") if session else ""

    def note(self, tenant: str, session: str, worker_id: str) -> None:
        """The session's next request would best go there."""
        if session:
            self._last[tenant, session] = worker_id
            self._last.move_to_end((tenant, session))
            if len(self._last) > self._limit:
                self._last.popitem(last=False)
