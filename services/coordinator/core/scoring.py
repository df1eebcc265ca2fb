"""How good a worker is for a request: each scorer looks at one thing, from 0 (bad) to 1 (good).

A worker's score is the weighted sum. Weights say what one thing is worth in terms of another: an
empty batch against a full one is worth a fully cached prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from services.coordinator.core.membership import Worker
from services.coordinator.core.messages import WorkerInfo

NOMINAL_TOKENS_PER_SECOND = 1000.0
"""Prefill rate taken for a worker that has measured none, where none of its peers has either."""


@dataclass(slots=True)
class Candidate:
    """A worker that could take a request."""

    worker: Worker
    context_tokens: int
    """Tokens that KV is needed for."""
    cached_tokens: int
    """Of these, how many it holds already."""
    blocks: int
    """KV blocks that the request takes there."""
    tokens_per_second: float = NOMINAL_TOKENS_PER_SECOND
    """How fast it computes prompts."""
    beside: Worker | None = None
    """The worker that its KV goes to."""

    @property
    def uncached_tokens(self) -> int:
        """Tokens to compute: at least the last one, whose logits are wanted."""
        return max(1, self.context_tokens - self.cached_tokens)


Scorer = Callable[[Candidate], float]


def batch_room(candidate: Candidate) -> float:
    """The part of the batch (and of the places for those about to join it) that is free."""
    return candidate.worker.load.room / candidate.worker.load.limit


def block_room(candidate: Candidate) -> float:
    """The part of the KV pool that is still free with the request in it."""
    worker = candidate.worker
    return max(0, worker.load.free_blocks - candidate.blocks) / worker.info.total_blocks


def cached_prefix(candidate: Candidate) -> float:
    """The part of the context whose KV need not move or be computed."""
    return min(1.0, candidate.cached_tokens / candidate.context_tokens)


def prompt_seconds(candidate: Candidate) -> float:
    """Seconds until the prompt is done: what is queued before it, then its uncached part."""
    tokens = candidate.worker.load.queued_tokens + candidate.uncached_tokens
    return tokens / candidate.tokens_per_second


def promptness(candidate: Candidate) -> float:
    """1 if the prompt is done at once, 1/2 if in a second, 1/3 if in two."""
    return 1 / (1 + prompt_seconds(candidate))


def nearness(candidate: Candidate) -> float:
    """1 if the KV stays on the host, 1/2 if in the region, else 0."""
    if candidate.beside is None:
        return 0.0
    return closeness(candidate.worker.info, candidate.beside.info)


def closeness(here: WorkerInfo, there: WorkerInfo) -> float:
    """1 for one host, 1/2 for one region, else 0."""
    if here.host and here.host == there.host:
        return 1.0
    return 0.5 if here.region == there.region else 0.0


Weights = Sequence[tuple[Scorer, float]]

DECODE: Weights = ((batch_room, 1.0), (block_room, 0.5), (cached_prefix, 1.0))
PREFILL: Weights = ((promptness, 1.0), (nearness, 0.02))


def score(candidate: Candidate, weights: Weights) -> float:
    """The weighted sum."""
    total = 0.0
    for scorer, weight in weights:
        total += weight * scorer(candidate)
    return total


def pick(candidates: Iterable[Candidate], weights: Weights, draw: Callable[[], float]) -> Candidate:
    """The best of at least one candidate.

    Of equals, those with fewest bookings; of these, two are drawn and the one that was picked
    longer ago wins, so that coordinators with the same view do not all pick the same worker.
    `draw` gives numbers in [0, 1).
    """
    scored = [(score(c, weights), c) for c in candidates]
    best = max(s for s, _ in scored)
    equals = [c for s, c in scored if best - s < 1e-9]
    fewest = min(len(c.worker.load.bookings) for c in equals)
    equals = [c for c in equals if len(c.worker.load.bookings) == fewest]
    if len(equals) == 1:
        return equals[0]
    first = equals.pop(int(draw() * len(equals)))
    second = equals[int(draw() * len(equals))]
    return min(first, second, key=lambda c: c.worker.picked)
