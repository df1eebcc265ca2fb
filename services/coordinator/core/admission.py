"""Requests that wait for room, and the refusal of those for which there is no place to wait.

A lane for each model, first in first out, with one exception: a request that fits may overtake
those few at the head that don't (a long prompt, or one that may not use the workers with room),
each of which can be overtaken `MAX_OVERTAKEN` times. So one huge prompt does not stop everyone,
and is not starved either.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from services.coordinator.core.messages import PlaceRequest

LOOKAHEAD = 8
"""Requests at the head of a lane that are tried when room appears."""

MAX_OVERTAKEN = 16

RATE_SECONDS = 10.0
"""Time over which the rate of placements is averaged."""


@dataclass(slots=True, eq=False)
class Waiting:
    """A request in the queue."""

    ticket: int
    request: PlaceRequest
    since: float
    deadline: float | None
    overtaken: int = 0

    def late(self, now: float) -> bool:
        """Whether its deadline has passed."""
        return self.deadline is not None and self.deadline <= now


@dataclass(slots=True)
class Queue:
    """Bounded over all lanes together."""

    limit: int
    _lanes: dict[str, OrderedDict[int, Waiting]] = field(default_factory=dict)
    _lane_of: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._lane_of)

    @property
    def full(self) -> bool:
        """Whether there is no place to wait."""
        return len(self) >= self.limit

    def lanes(self) -> list[str]:
        """Models that requests wait for."""
        return list(self._lanes)

    def add(self, entry: Waiting) -> None:
        """Puts a request at the end of its lane."""
        model = entry.request.model
        self._lanes.setdefault(model, OrderedDict())[entry.ticket] = entry
        self._lane_of[entry.ticket] = model

    def remove(self, ticket: int) -> Waiting | None:
        """Takes a request out, wherever it stands; None if it is not here."""
        model = self._lane_of.pop(ticket, None)
        if model is None:
            return None
        lane = self._lanes[model]
        entry = lane.pop(ticket)
        if not lane:
            del self._lanes[model]
        return entry

    def overtake(self, ticket: int) -> Waiting | None:
        """Takes a request out that gets its turn; those before it have been overtaken."""
        for entry in self.lane(self._lane_of.get(ticket, "")):
            if entry.ticket == ticket:
                break
            entry.overtaken += 1
        return self.remove(ticket)

    def lane(self, model: str) -> Iterator[Waiting]:
        """Requests for a model, first come first."""
        return iter(self._lanes.get(model, {}).values())

    def head(self, model: str) -> list[Waiting]:
        """Requests whose turn it can be: the first one, and those that may overtake."""
        some = []
        for entry in islice(self.lane(model), LOOKAHEAD):
            some.append(entry)
            if entry.overtaken >= MAX_OVERTAKEN:
                break
        return some

    def open_to_newcomers(self, model: str) -> bool:
        """Whether a request that comes now may be tried at once, before those that wait."""
        waiting = len(self._lanes.get(model, ()))
        return waiting < LOOKAHEAD and all(e.overtaken < MAX_OVERTAKEN for e in self.lane(model))

    def newcomer_placed(self, model: str) -> None:
        """A request that never waited was placed: all that wait were overtaken."""
        for entry in self.lane(model):
            entry.overtaken += 1

    def late(self, now: float) -> list[Waiting]:
        """Requests whose deadline has passed."""
        return [e for lane in self._lanes.values() for e in lane.values() if e.late(now)]


@dataclass(slots=True)
class PlacementRate:
    """Placements a second, an exponential average; tells how long a queue will take."""

    _at: float
    _sum: float = 0.0

    def count(self, now: float) -> None:
        """A request was placed."""
        self._decay(now)
        self._sum += 1 / RATE_SECONDS

    def retry_seconds(self, waiting: int, now: float) -> float:
        """When to try again, with so many waiting: once half of them are placed. 1 to 30 s."""
        self._decay(now)
        return min(30.0, max(1.0, waiting / 2 / self._sum)) if self._sum > 0 else 1.0

    def _decay(self, now: float) -> None:
        self._sum *= math.exp(-max(0.0, now - self._at) / RATE_SECONDS)
        self._at = now
