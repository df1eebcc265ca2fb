"""What a worker has to do, as far as is known: its last report, and what was decided since.

A placement is load from the moment it is decided, long before the worker can report it; else
everything placed between two reports would pile up on whoever looked idlest in the last one. So a
placement books its share, on one of the worker's ranks, and the booking counts until

- the attempt ends (its frontend says so), or
- a report covers it: one that arrives `SETTLE_SECONDS` or more after the booking, by when the
  request has reached the worker and is in the worker's own figures.

Nothing else need happen, so a frontend that dies leaves no booking behind. An attempt that ends
after its booking was covered is credited against the last report, until the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter

from services.coordinator.core.messages import WorkerInfo, WorkerStats
from services.coordinator.core.ranks import (
    NOMINAL_STEP,
    Rank,
    StepCost,
    best,
    imbalance,
    rank_stats,
    ranks_of,
)

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
    rank: int = 0


@dataclass(slots=True)
class Load:
    """A worker's load. The figures that decisions read include bookings and credits.

    They are sums over its ranks. A request has to fit one of them: that is what `fits` says.
    """

    info: WorkerInfo
    stats: WorkerStats
    bookings: dict[AttemptId, Booking] = field(default_factory=dict)
    ranks: list[Rank] = field(init=False)
    limit: int = field(init=False)
    """Requests that it may have; see Rank."""
    requests: int = field(init=False)
    """Running, waiting, or on their way."""
    room: int = field(init=False)
    """Requests that it may still get."""
    free_blocks: int = field(init=False)
    """KV blocks that nobody has or is about to take."""
    fit_blocks: int = field(init=False)
    """Most KV blocks that one more request may need; 0: no rank has room."""
    queued_tokens: int = field(init=False)
    """Prompt tokens to compute before a new prompt's turn comes."""
    imbalance: float = field(init=False)
    """The slowest rank's step over the mean, at least 1. A step costs its slowest rank."""
    _turn: int = 0
    _refused: bool = False

    def __post_init__(self) -> None:
        self.ranks = ranks_of(self.info, self.stats)
        self.limit = sum(rank.limit for rank in self.ranks)
        self._sum_up()

    def fits_shape(self, info: WorkerInfo) -> bool:
        """Whether the books can go on for what says to be the same worker."""
        shape = attrgetter("dp_ranks", "total_blocks", "max_running", "block_tokens")
        return bool(shape(self.info) == shape(info))

    def fits(self, blocks: int) -> bool:
        """Whether some rank has room for a request that needs so many KV blocks, at least 1."""
        return blocks <= self.fit_blocks

    def choose_rank(self, blocks: int, cost: StepCost = NOMINAL_STEP) -> int | None:
        """The rank whose step is shortest with such a request on it; None if none fits it.

        That is also where the request makes the worker's steps least longer, since they are as long
        as the longest. It costs the same on each. Of equals: fewest prompt tokens queued, then in
        turn.
        """
        return self._best(
            blocks, lambda rank: (cost.seconds(rank.requests, rank.kv_tokens), rank.queued_tokens)
        )

    def prompt_rank(self, blocks: int) -> int | None:
        """The rank where a prompt's turn comes soonest: fewest prompt tokens queued, then batch."""
        return self._best(blocks, lambda rank: (rank.queued_tokens, rank.requests))

    def _best(self, blocks: int, price: Callable[[Rank], tuple[float, float]]) -> int | None:
        if not self.fits(blocks):
            return None
        return 0 if len(self.ranks) == 1 else best(self.ranks, blocks, self._turn, price)

    def book(self, attempt: AttemptId, booking: Booking) -> None:
        """Counts a decision. A second one for the same attempt takes the first one's place."""
        self._remove(attempt)
        self.bookings[attempt] = booking
        self._turn = (booking.rank + 1) % len(self.ranks)
        rank = self.ranks[booking.rank]
        rank.book(booking.blocks, booking.tokens)
        rank.sum_up()
        self._sum_up()

    def drop(self, attempt: AttemptId) -> bool:
        """No longer counts a decision; tells whether it was still counted."""
        counted = self._remove(attempt)
        self._sum_up()
        return counted

    def credit(self, blocks: int, rank: int = 0) -> None:
        """An attempt that the last report covers ended."""
        of = self.ranks[rank]
        of.ended += 1
        of.ended_blocks += blocks
        of.sum_up()
        self._sum_up()

    def refuse(self) -> None:
        """The worker refused a request: it has no room until its next report."""
        self._refused = True
        self._sum_up()

    def report(self, stats: WorkerStats, now: float) -> None:
        """Takes a new report, and drops the bookings that it covers."""
        self.stats, self._refused = stats, False
        # Bookings stand in the order they were made.
        for attempt, booking in list(self.bookings.items()):
            if now - booking.made < SETTLE_SECONDS:
                break
            self._remove(attempt)
        for rank, of in zip(self.ranks, rank_stats(self.info, stats), strict=True):
            rank.report(of)
            rank.sum_up()
        self._sum_up()

    def _remove(self, attempt: AttemptId) -> bool:
        booking = self.bookings.pop(attempt, None)
        if booking is None:
            return False
        rank = self.ranks[booking.rank]
        rank.book(booking.blocks, booking.tokens, -1)
        rank.sum_up()
        return True

    def _sum_up(self) -> None:
        self.requests = self.room = self.free_blocks = self.fit_blocks = self.queued_tokens = 0
        for rank in self.ranks:
            self.requests += rank.requests
            self.room += rank.room
            self.free_blocks += rank.free_blocks
            self.queued_tokens += rank.queued_tokens
            if rank.room and rank.free_blocks > self.fit_blocks:
                self.fit_blocks = rank.free_blocks
        if self._refused:
            self.room = self.fit_blocks = 0
        self.imbalance = 1.0 if len(self.ranks) == 1 else imbalance(self.ranks, NOMINAL_STEP)

    def check_integrity(self) -> None:
        """The sums are those of the bookings; raises AssertionError."""
        for number, rank in enumerate(self.ranks):
            here = [b for b in self.bookings.values() if b.rank == number]
            assert rank.booked == len(here)
            assert rank.booked_blocks == sum(b.blocks for b in here)
            assert rank.booked_tokens == sum(b.tokens for b in here)
