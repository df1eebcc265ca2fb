"""How good a worker is for a request: each scorer looks at one thing, from 0 (bad) to 1 (good).

A worker's score is the weighted sum. Weights say what one thing is worth in terms of another: an
empty batch against a full one is worth a fully cached prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.coordinator.core.membership import Worker
from services.coordinator.core.paths import Path
from services.coordinator.core.predict import Forecast, Prompt

HALF_RTT_SECONDS = 0.05
"""Round trip to the frontend that is worth half of none."""

HALF_ITL_SECONDS = 0.05
"""Time between tokens that is worth half of none: about a person's reading speed, twice over."""

NEAR = {Path.HOST: 1.0, Path.NVLINK: 0.9, Path.RDMA: 0.6, Path.TCP: 0.3, Path.FAR: 0.0}
"""How direct each path is."""

EQUAL = 0.01
"""Scores that differ by no more count as equal: it is less than what they rest on is worth."""


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
    beside: Worker | None = None
    """The worker that its KV goes to."""
    rank: int = 0
    """Data-parallel rank that would take it."""
    prompt_seconds: float = 0.0
    """Until the prompt is done there: what is queued before it, then its uncached part."""
    transfer_seconds: float = 0.0
    """What moving the KV to `beside` adds."""
    itl_seconds: float = 0.0
    """Between tokens, with the request in the batch; 0: not measured."""
    round_trip_seconds: float = 0.0
    """To the frontend that asks."""
    last_of_session: bool = False
    """It had the session's last request."""
    cheapest: float = 0.0
    """What the cheapest worker of the pool costs."""
    prompt: Prompt | None = None
    """What it would compute."""
    known_seconds: float = 0.0
    """`prompt_seconds` if it rests on something measured, else 0."""
    path: Path | None = None
    """The way of its KV to `beside`."""

    @property
    def uncached_tokens(self) -> int:
        """Tokens to compute: at least the last one, whose logits are wanted."""
        return max(1, self.context_tokens - self.cached_tokens)

    @property
    def forecast(self) -> Forecast:
        """Of the first token, if it computes the prompt."""
        return Forecast(self.prompt, prompt_seconds=self.known_seconds)


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


def promptness(candidate: Candidate) -> float:
    """1 if the prompt is done at once, 1/2 if in a second, 1/3 if in two."""
    return 1 / (1 + candidate.prompt_seconds)


def handover(candidate: Candidate) -> float:
    """1 if the KV is there at once, 1/2 if moving it adds a second."""
    return 1 / (1 + candidate.transfer_seconds)


def nearness(candidate: Candidate) -> float:
    """How direct the way to the decode worker is: see NEAR."""
    return 0.0 if candidate.path is None else NEAR[candidate.path]


def swiftness(candidate: Candidate) -> float:
    """1 if tokens follow at once (or nothing is measured), 1/2 if every 50 ms."""
    return 1 / (1 + candidate.itl_seconds / HALF_ITL_SECONDS)


def evenness(candidate: Candidate) -> float:
    """Mean over slowest rank: ranks step together, so a step costs its slowest one."""
    return 1 / max(1.0, candidate.worker.load.imbalance)


def closeness(candidate: Candidate) -> float:
    """1 in the frontend's region, 1/2 if it is 50 ms away."""
    return 1 / (1 + candidate.round_trip_seconds / HALF_RTT_SECONDS)


def affinity(candidate: Candidate) -> float:
    """1 for the worker that had the session's last request, else 0."""
    return 1.0 if candidate.last_of_session else 0.0


def thrift(candidate: Candidate) -> float:
    """What the cheapest worker costs over what this one does; 1 where costs are not told."""
    cost = candidate.worker.info.cost
    return candidate.cheapest / cost if cost > 0 and candidate.cheapest > 0 else 1.0


Weights = Sequence[tuple[Scorer, float]]

DECODE: Weights = (
    (batch_room, 1.0),
    (block_room, 0.5),
    (cached_prefix, 1.0),
    (swiftness, 0.25),
    (evenness, 0.25),
    (closeness, 0.5),
    (affinity, 0.2),
    (thrift, 0.2),
)
PREFILL: Weights = (
    (promptness, 1.0),
    (handover, 0.25),
    (nearness, 0.02),
    (thrift, 0.05),
)


def score(candidate: Candidate, weights: Weights) -> list[float]:
    """What each scorer adds to the candidate's score, in the order of the weights."""
    return [weight * scorer(candidate) for scorer, weight in weights]


def pick(
    scored: Sequence[tuple[float, Candidate]], draw: Callable[[], float]
) -> tuple[float, Candidate]:
    """The best of at least one candidate, with its score.

    Of equals, those with fewest bookings; of these, two are drawn and the one that was picked
    longer ago wins, so that coordinators with the same view do not all pick the same worker.
    `draw` gives numbers in [0, 1).
    """
    best = max(total for total, _ in scored)
    equals = [one for one in scored if best - one[0] <= EQUAL]
    if len(equals) == 1:
        return equals[0]
    fewest = min(len(c.worker.load.bookings) for _, c in equals)
    equals = [one for one in equals if len(one[1].worker.load.bookings) == fewest]
    if len(equals) == 1:
        return equals[0]
    first = equals.pop(int(draw() * len(equals)))
    second = equals[int(draw() * len(equals))]
    return min(first, second, key=lambda one: one[1].worker.picked)
