"""What a worker has to do, as far as is known: its last report, and what was decided since.

A placement is load from the moment it is decided, long before the worker can report it; else
everything placed between two reports would pile up on whoever looked idlest in the last one. So a
placement books its share, and the booking counts until

- the attempt ends (its frontend says so), or
- a report covers it: one that arrives `SETTLE_SECONDS` or more after the booking, by when the
  request has reached the worker and is in the worker's own figures.

Nothing else need happen, so a frontend that dies leaves no booking behind. An attempt that ends
after its booking was covered is credited against the last report, until the next one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from services.coordinator.core.messages import WorkerInfo, WorkerStats

SETTLE_SECONDS = 0.2
"""From a decision to the request being in the worker's figures: two network hops and an engine
step. Too short counts a request not at all for one heartbeat, too long counts it twice."""

AttemptId = tuple[str, int]
"""Public request id and number of the attempt."""


@dataclass(frozen=True, slots=True)
class Booking:
    """One request's share of a worker, from a decision."""

    made: float
    blocks: int
    """KV blocks for its context."""
    tokens: int
    """Prompt tokens to compute."""


@dataclass(slots=True)
class Load:
    """A worker's load. The figures that decisions read include bookings and credits."""

    info: WorkerInfo
    stats: WorkerStats
    bookings: dict[AttemptId, Booking] = field(default_factory=dict)
    limit: int = field(init=False)
    """Requests that it may have: its batch, and a quarter more that prepare to join.

    With none of those, a place in the batch that falls free would stay empty for as long as a
    prompt takes.
    """
    requests: int = field(init=False)
    """Running, waiting, or on their way."""
    room: int = field(init=False)
    """Requests that it may still get."""
    free_blocks: int = field(init=False)
    """KV blocks that nobody has or is about to take."""
    queued_tokens: int = field(init=False)
    """Prompt tokens to compute before a new prompt's turn comes."""
    _booked_blocks: int = 0
    _booked_tokens: int = 0
    _credit_requests: int = 0
    _credit_blocks: int = 0
    _refused: bool = False

    def __post_init__(self) -> None:
        self.limit = self.info.max_running + max(1, self.info.max_running // 4)
        self._sum_up()

    def book(self, attempt: AttemptId, booking: Booking) -> None:
        """Counts a decision. A second one for the same attempt takes the first one's place."""
        self._remove(attempt)
        self.bookings[attempt] = booking
        self._booked_blocks += booking.blocks
        self._booked_tokens += booking.tokens
        self._sum_up()

    def drop(self, attempt: AttemptId) -> bool:
        """No longer counts a decision; tells whether it was still counted."""
        counted = self._remove(attempt)
        self._sum_up()
        return counted

    def credit(self, blocks: int) -> None:
        """An attempt that the last report covers ended."""
        self._credit_requests += 1
        self._credit_blocks += blocks
        self._sum_up()

    def refuse(self) -> None:
        """The worker refused a request: it has no room until its next report."""
        self._refused = True
        self._sum_up()

    def report(self, stats: WorkerStats, now: float) -> None:
        """Takes a new report, and drops the bookings that it covers."""
        self.stats, self._refused = stats, False
        self._credit_requests = self._credit_blocks = 0
        # Bookings stand in the order they were made.
        for attempt, booking in list(self.bookings.items()):
            if now - booking.made < SETTLE_SECONDS:
                break
            self._remove(attempt)
        self._sum_up()

    def _remove(self, attempt: AttemptId) -> bool:
        booking = self.bookings.pop(attempt, None)
        if booking is None:
            return False
        self._booked_blocks -= booking.blocks
        self._booked_tokens -= booking.tokens
        return True

    def _sum_up(self) -> None:
        stats = self.stats
        known = max(0, stats.running + stats.waiting - self._credit_requests)
        self.requests = known + len(self.bookings)
        self.room = 0 if self._refused else max(0, self.limit - self.requests)
        free = stats.free_blocks + self._credit_blocks - self._booked_blocks
        self.free_blocks = max(0, min(free, self.info.total_blocks))
        self.queued_tokens = stats.queued_tokens + self._booked_tokens

    def check_integrity(self) -> None:
        """The sums are those of the bookings; raises AssertionError."""
        assert self._booked_blocks == sum(b.blocks for b in self.bookings.values())
        assert self._booked_tokens == sum(b.tokens for b in self.bookings.values())
