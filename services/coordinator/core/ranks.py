"""The data-parallel attention ranks of one worker, each with a batch and a KV pool of its own.

A request lives on one rank. The ranks of a worker meet in every layer, where tokens are exchanged
with the experts, so a step costs what it costs the slowest rank: a request belongs where the step
is shortest, and a worker whose ranks are uneven is slower than its mean load says.

Figures of a whole worker split evenly: of `max_running` requests a rank runs the n-th part, rounded
up, and of `total_blocks` KV blocks it has the n-th part, rounded down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from services.coordinator.core.messages import RankStats, WorkerInfo, WorkerStats


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds that a decode step takes a rank: base, and for each request and token of KV."""

    base: float
    request: float
    kv_token: float

    def seconds(self, requests: float, kv_tokens: float) -> float:
        """With so many requests in the batch, which have KV for so many tokens together."""
        return self.base + self.request * requests + self.kv_token * kv_tokens


NOMINAL_STEP = StepCost(18.3e-3, 0.338e-3, 2.85e-8)
"""DeepSeek V3 on H100 in EP64 (a fit to NVIDIA aiconfigurator's data). Ranks are only compared with
each other, so what counts is that a request weighs as much as 12,000 tokens of KV do."""


@dataclass(slots=True)
class Rank:
    """One rank's load: its last report, what was decided since, and what ended since."""

    limit: int
    """Requests that it may have: its batch, and a quarter more that prepare to join.

    With none of those, a place in the batch that falls free would stay empty for as long as a
    prompt takes.
    """
    total_blocks: int
    block_tokens: int
    stats: RankStats
    booked: int = 0
    booked_blocks: int = 0
    booked_tokens: int = 0
    ended: int = 0
    ended_blocks: int = 0
    requests: int = field(init=False)
    """Running, waiting, or on their way."""
    room: int = field(init=False)
    """Requests that it may still get."""
    free_blocks: int = field(init=False)
    """KV blocks that nobody has or is about to take."""
    kv_tokens: int = field(init=False)
    """Tokens that there is KV for, or soon will be."""
    queued_tokens: int = field(init=False)
    """Prompt tokens to compute before a new prompt's turn comes."""

    def __post_init__(self) -> None:
        self.sum_up()

    def book(self, blocks: int, tokens: int, sign: int = 1) -> None:
        """Counts a request with its KV blocks and prompt tokens, or with -1 no longer does."""
        self.booked += sign
        self.booked_blocks += sign * blocks
        self.booked_tokens += sign * tokens

    def report(self, stats: RankStats) -> None:
        """Takes a new report, in which whatever ended before it has ended."""
        self.stats, self.ended, self.ended_blocks = stats, 0, 0

    def sum_up(self) -> None:
        """Brings the figures up to date."""
        stats = self.stats
        known = max(0, stats.running + stats.waiting - self.ended)
        self.requests = known + self.booked
        self.room = max(0, self.limit - self.requests)
        moved = self.booked_blocks - self.ended_blocks
        self.free_blocks = max(0, min(stats.free_blocks - moved, self.total_blocks))
        self.kv_tokens = max(0, stats.kv_tokens + moved * self.block_tokens)
        self.queued_tokens = stats.queued_tokens + self.booked_tokens


def ranks_of(info: WorkerInfo, stats: WorkerStats) -> list[Rank]:
    """A worker's ranks as it says Hello."""
    batch = -(-info.max_running // info.dp_ranks)
    limit = batch + max(1, batch // 4)
    return [Rank(limit, info.rank_blocks, info.block_tokens, of) for of in rank_stats(info, stats)]


def rank_stats(info: WorkerInfo, stats: WorkerStats) -> Sequence[RankStats]:
    """What each rank reports. A worker that reports no ranks is taken to load them evenly."""
    count = info.dp_ranks
    if len(stats.ranks) == count:
        return stats.ranks
    used = max(0, info.total_blocks - stats.free_blocks) * info.block_tokens
    if count == 1:
        free, queued = stats.free_blocks, stats.queued_tokens
        return (RankStats(stats.running, stats.waiting, free, used, queued),)
    whole = (stats.running, stats.waiting, stats.free_blocks, used, stats.queued_tokens)
    # The first ones have what does not divide.
    return [RankStats(*(-(-(n - i) // count) if n > i else 0 for n in whole)) for i in range(count)]


def best(
    ranks: Sequence[Rank], blocks: int, first: int, price: Callable[[Rank], tuple[float, float]]
) -> int | None:
    """The rank of least price of those with room for a request of `blocks`; None if none has it.

    Of equals the first one from `first` on.
    """
    count = len(ranks)
    found, least = None, (0.0, 0.0)
    for turn in range(count):
        number = (first + turn) % count
        rank = ranks[number]
        if rank.room == 0 or rank.free_blocks < blocks:
            continue
        asked = price(rank)
        if found is None or asked < least:
            found, least = number, asked
    return found


def imbalance(ranks: Sequence[Rank], cost: StepCost) -> float:
    """The slowest rank's step over the mean, at least 1: what uneven ranks cost the worker."""
    seconds = [cost.seconds(rank.requests, rank.kv_tokens) for rank in ranks]
    return max(seconds) * len(seconds) / sum(seconds)
