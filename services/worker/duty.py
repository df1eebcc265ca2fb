"""Which role a worker has, and whether it takes another. Pure.

Coordinators ask, each on its own view and perhaps several at once; the worker decides. Rules:

 1. It takes only roles that its operator allows.
 2. After a change it keeps its role for a while, so that nobody can make it flap.
 3. One that leaves takes none.
 4. What serves a role is in SERVES. A role that the worker has is no change: it is told again.
"""

from __future__ import annotations

from dataclasses import dataclass

SERVES: dict[str, tuple[str, ...]] = {
    "prefill": ("prefill",),
    "decode": ("decode",),
    "both": ("prefill", "decode"),
}
"""The services that take requests in each role."""


@dataclass(slots=True)
class Duty:
    """A worker's role. `now` is seconds of a clock that never goes back."""

    role: str
    can_be: frozenset[str]
    """Roles that it may have; its first one is among them in any case."""
    min_seconds: float
    """From one change to the next, at least."""
    leaving: bool = False
    _changed: float | None = None

    def __post_init__(self) -> None:
        self.can_be |= {self.role}

    @property
    def services(self) -> tuple[str, ...]:
        """All that may be wanted of it while it lives."""
        return tuple(s for s in SERVES["both"] if any(s in SERVES[role] for role in self.can_be))

    def take(self, role: str, now: float) -> str:
        """Takes a role. Returns why not, if it does not."""
        if role == self.role:
            return ""
        if self.leaving:
            return "it is shutting down"
        if role not in self.can_be:
            return f"worker.can_be allows {', '.join(sorted(self.can_be))}"
        if self._changed is not None and now - self._changed < self.min_seconds:
            return (
                f"it changed {now - self._changed:.1f} s ago; worker.role_min_seconds is "
                f"{self.min_seconds:g}"
            )
        self.role, self._changed = role, now
        return ""
