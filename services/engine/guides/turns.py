"""Who may compile a guide next: so many at a time, and nobody's many before another's one.

Purely: what is done is `take` and `done`, what comes of it are calls of `begin`.

1. At most `places` are at work, of one tenant at most all but one: so no tenant alone keeps others
   waiting.
2. A free place goes to the one of those who wait for whom the fewest were begun; of equal ones to
   who came first. A tenant's own go in order of arrival.
3. A tenant for whom nothing waits or is at work is forgotten. One that comes anew counts as if it
   had had as many begun as the one with the fewest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Tenant:
    waiting: deque[Callable[[], None]] = field(default_factory=deque)
    at_work: int = 0
    begun: int = 0


class Turns:
    """Single-threaded."""

    def __init__(self, places: int) -> None:
        """Two at least."""
        self._free = places
        self._most = places - 1
        self._tenants: dict[str, _Tenant] = {}

    def take(self, tenant: str, begin: Callable[[], None]) -> None:
        """Calls `begin` when it is this one's turn; done() must follow."""
        of = self._tenants.get(tenant)
        if of is None:
            of = self._tenants[tenant] = _Tenant()
            # As if it had been here: neither before everybody, nor behind.
            of.begun = min((t.begun for t in self._tenants.values() if t is not of), default=0)
        of.waiting.append(begin)
        self._go_on()

    def drop(self, tenant: str, begin: Callable[[], None]) -> bool:
        """Whether it was still waiting: it waits no more."""
        of = self._tenants.get(tenant)
        if of is None or begin not in of.waiting:
            return False
        of.waiting.remove(begin)
        self._forget(tenant)
        return True

    def done(self, tenant: str) -> None:
        """One that was begun is over."""
        self._tenants[tenant].at_work -= 1
        self._free += 1
        self._forget(tenant)
        self._go_on()

    def _go_on(self) -> None:
        while self._free:
            may = [t for t in self._tenants.values() if t.waiting and t.at_work < self._most]
            if not may:
                return
            of = min(may, key=lambda t: t.begun)
            of.begun += 1
            of.at_work += 1
            self._free -= 1
            of.waiting.popleft()()

    def _forget(self, tenant: str) -> None:
        of = self._tenants[tenant]
        if not of.waiting and not of.at_work:
            del self._tenants[tenant]
