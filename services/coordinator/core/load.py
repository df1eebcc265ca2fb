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
    """A worker's load. Requests, blocks and tokens include bookings and credits."""

    info: WorkerInfo
    stats: WorkerStats
    bookings: dict[AttemptId, Booking] = field(default_factory=dict)
    booked_blocks: int = 0
    booked_tokens: int = 0
    credit_requests: int = 0
    credit_blocks: int = 0
    refused: bool = False
    """The worker refused a request since its last report: it has no room, whatever that said."""

    @property
    def requests(self) -> int:
        """Running, waiting, or on their way."""
        known = max(0, self.stats.running + self.stats.waiting - self.credit_requests)
        return known + len(self.bookings)

    @property
    def room(self) -> int:
        """Requests that it may still get."""
        return 0 if self.refused else max(0, self.limit - self.requests)

    @property
    def limit(self) -> int:
        """Requests that it may have: its batch, and a quarter more that prepare to join.

        With none of those, a place in the batch that falls free would stay empty for as long as
        a prompt takes.
        """
        return self.info.max_running + max(1, self.info.max_running // 4)

    @property
    def free_blocks(self) -> int:
        """KV blocks that nobody has or is about to take."""
        free = self.stats.free_blocks + self.credit_blocks - self.booked_blocks
        return max(0, min(free, self.info.total_blocks))

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens to compute before a new prompt's turn comes."""
        return self.stats.queued_tokens + self.booked_tokens

    def book(self, attempt: AttemptId, booking: Booking) -> None:
        """Counts a decision. A second one for the same attempt takes the first one's place."""
        self.drop(attempt)
        self.bookings[attempt] = booking
        self.booked_blocks += booking.blocks
        self.booked_tokens += booking.tokens

    def drop(self, attempt: AttemptId) -> bool:
        """No longer counts a decision; tells whether it was still counted."""
        booking = self.bookings.pop(attempt, None)
        if booking is None:
            return False
        self.booked_blocks -= booking.blocks
        self.booked_tokens -= booking.tokens
        return True

    def credit(self, blocks: int) -> None:
        """An attempt that the last report covers ended."""
        self.credit_requests += 1
        self.credit_blocks += blocks

    def report(self, stats: WorkerStats, now: float) -> None:
        """Takes a new report, and drops the bookings that it covers."""
        self.stats, self.refused = stats, False
        self.credit_requests = self.credit_blocks = 0
        # Bookings stand in the order they were made.
        for attempt, booking in list(self.bookings.items()):
            if now - booking.made < SETTLE_SECONDS:
                break
            self.drop(attempt)

    def check_integrity(self) -> None:
        """The sums are those of the bookings; raises AssertionError."""
        assert self.booked_blocks == sum(b.blocks for b in self.bookings.values())
        assert self.booked_tokens == sum(b.tokens for b in self.bookings.values())
