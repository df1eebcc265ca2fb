"""Requests that wait for room: in which order they are tried, and who goes when it is full.

A lane for each model. In a lane, in this order:

1. Higher priority.
2. Within a priority, the tenant that was served least (fairness.py).
3. Within a tenant, first come, first served. Not the earliest deadline: with more requests than can
   be served in time, that serves first those that are about to be late anyhow, until all are; and
   who set none would starve. Deadlines are looked after by refusing: before the queue what can't be
   met (predict.py), in it what is past.

A request with a LoRA adapter that no worker with room has loaded is passed over, as if it were not
there: others wait for other workers, and take nothing that it could have.

Two exceptions, each with its bound:

- No starvation: every other turn is for those that have waited `patience` seconds, oldest first,
  whatever their priority and tenant. So with room for one request at a time, at a rate of r a
  second, each is placed within patience + (2 n + 2) / r of its coming, n being those of its lane
  that came before it. (If every turn were theirs, it would be n / r; but then, as soon as waits are
  longer than `patience`, and that is when fairness matters, who sends most would be served most. As
  it is, tenants are charged for these turns, and the other turns make up for them.)
- No blocking by the head: `LOOKAHEAD` requests in order are tried, so one that fits overtakes those
  that don't (a long prompt, or one that may not use the workers with room). Each can be overtaken
  `MAX_OVERTAKEN` times; then those behind it wait with it.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice, takewhile

from services.coordinator.core.fairness import Charge, Fairness, Line
from services.coordinator.core.messages import PlaceRequest
from services.coordinator.core.pace import Pace
from services.coordinator.core.ranking import Ranking

LOOKAHEAD = 8
"""Requests of a lane that are tried when room appears. Half of them at most are of one tenant, if
several wait, and half are those that waited too long, if there are any."""

MAX_OVERTAKEN = 16

PATIENCE_SECONDS = 30.0

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

    @property
    def line(self) -> Line:
        """Whom its tenant is weighed against."""
        return Line(self.request.model, self.request.priority)


Open = Callable[[str], bool]
"""Whether a worker with room may have the LoRA adapter loaded; "" is none, which all have."""


def all_open(adapter: str) -> bool:
    """Where nothing is known of workers."""
    return True


Entries = OrderedDict[int, Waiting]
"""Requests by ticket, first come first."""


@dataclass(slots=True)
class _Level:
    """Requests of one lane and priority."""

    line: Line
    tenants: dict[str, Entries] = field(default_factory=dict)
    size: int = 0


@dataclass(slots=True)
class _Lane:
    """Requests for one model."""

    entries: Entries = field(default_factory=OrderedDict)
    levels: dict[int, _Level] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    """The negatives of the levels' priorities, ascending."""
    old_first: bool = True
    """Whose turn it is: that of those who waited too long?"""


class Queue:
    """Of `limit` requests over all lanes. `weights`: of tenants, as in `Fairness`.

    A request is added when it comes, whether or not it will have to wait, so that nobody passes
    those who do; and taken when it is placed. Each operation costs O(log n).
    """

    def __init__(
        self,
        limit: int,
        patience: float = PATIENCE_SECONDS,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.limit = limit
        self.fairness = Fairness(weights)
        self._patience = patience
        self._entries: dict[int, Waiting] = {}
        self._lanes: dict[str, _Lane] = {}
        self._paces: dict[str, Pace] = {}
        """By model, of those for which somebody was placed."""
        self._now = float("-inf")
        """The latest time that was told."""
        self._deadlines: Ranking[int] = Ranking()
        self._crowds: dict[int, Ranking[str]] = {}
        """By priority, over all lanes: tenants by how many places they take."""
        self._crowd: dict[tuple[int, str], Entries] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def lanes(self) -> list[str]:
        """Models that requests wait for."""
        return list(self._lanes)

    def lane(self, model: str) -> Iterator[Waiting]:
        """Requests for a model, first come first."""
        lane = self._lanes.get(model)
        return iter(lane.entries.values() if lane else ())

    def waiting(self, model: str) -> int:
        """Requests for a model."""
        lane = self._lanes.get(model)
        return len(lane.entries) if lane else 0

    def ahead(self, entry: Waiting) -> int:
        """Requests that are before one that was just added whatever becomes of counters.

        These are those of higher priority, and its tenant's own; those of other tenants may come
        before it or not.
        """
        lane = self._lanes[entry.request.model]
        priority = entry.request.priority
        higher = takewhile(lambda p: -p > priority, lane.order)
        own = lane.levels[priority].tenants[entry.request.tenant]
        return sum(lane.levels[-p].size for p in higher) + len(own) - 1

    def wait_seconds(self, entry: Waiting) -> float:
        """How long one that was just added waits at least; 0: not known.

        Until so many of those before it are gone, as fast as ever lately, that it may overtake the
        rest; but no longer than until it goes ahead by its age.
        """
        pace = self._paces.get(entry.request.model)
        if pace is None:
            return 0.0
        return min(self._patience, pace.least_seconds(self.ahead(entry) - LOOKAHEAD + 1))

    def add(self, entry: Waiting) -> None:
        """Puts a request in its place. There may be one too many now: see `push_out`."""
        want = entry.request
        self._now = max(self._now, entry.since)
        lane = self._lanes.setdefault(want.model, _Lane())
        level = lane.levels.get(want.priority)
        if level is None:
            level = lane.levels[want.priority] = _Level(entry.line)
            insort(lane.order, -want.priority)
        own = level.tenants.get(want.tenant)
        if own is None:
            own = level.tenants[want.tenant] = OrderedDict()
            self.fairness.join(level.line, want.tenant)
        level.size += 1
        own[entry.ticket] = lane.entries[entry.ticket] = self._entries[entry.ticket] = entry
        if entry.deadline is not None:
            self._deadlines.put(entry.ticket, entry.deadline)
        self._crowd.setdefault((want.priority, want.tenant), OrderedDict())[entry.ticket] = entry
        self._count(want.priority, want.tenant)

    def remove(self, ticket: int) -> Waiting | None:
        """Takes a request out, wherever it stands; None if it is not here."""
        entry = self._entries.get(ticket)
        if entry is None:
            return None
        pace = self._paces.get(entry.request.model)
        if pace is not None and entry.since < self._now:
            pace.count(self._now)
        self._drop(entry)
        return entry

    def _drop(self, entry: Waiting) -> None:
        ticket, want = entry.ticket, entry.request
        del self._entries[ticket]
        lane = self._lanes[want.model]
        level = lane.levels[want.priority]
        own = level.tenants[want.tenant]
        del own[ticket], lane.entries[ticket]
        level.size -= 1
        if not own:
            del level.tenants[want.tenant]
            self.fairness.leave(level.line, want.tenant)
        if not level.size:
            del lane.levels[want.priority]
            lane.order.remove(-want.priority)
        if not lane.entries:
            del self._lanes[want.model]
        self._deadlines.discard(ticket)
        del self._crowd[want.priority, want.tenant][ticket]
        self._count(want.priority, want.tenant)

    def head(self, model: str, now: float, is_open: Open = all_open) -> list[Waiting]:
        """Requests whose turn it can be, in order: the first one, and those that may overtake.

        Those whose adapter is not open are passed over, one by one.
        """
        self._now = max(self._now, now)
        lane = self._lanes.get(model)
        if lane is None:
            return []
        may = (e for e in self._old(lane, now) if is_open(e.request.adapter))
        old = list(islice(may, LOOKAHEAD // 2))
        first = chain(old, self._fair(lane, is_open))
        if not lane.old_first:
            first = chain(islice(self._fair(lane, is_open), LOOKAHEAD - len(old)), old)
        some: dict[int, Waiting] = {}
        for entry in first:
            some.setdefault(entry.ticket, entry)
            if entry.overtaken >= MAX_OVERTAKEN or len(some) == LOOKAHEAD:
                break
        return list(some.values())

    def may_try(self, entry: Waiting, now: float, is_open: Open = all_open) -> bool:
        """Whether a request that was just added may be tried at once.

        Those before it were tried when room appeared, so if it fits, it overtakes them.
        """
        return self.waiting(entry.request.model) == 1 or entry in self.head(
            entry.request.model, now, is_open
        )

    def take(self, ticket: int, now: float, is_open: Open = all_open) -> Waiting | None:
        """Takes a request out that is placed; those before it have been overtaken."""
        entry = self._entries.get(ticket)
        if entry is None:
            return None
        lane = self._lanes[entry.request.model]
        alone = len(lane.entries) == 1
        if not alone or entry.since < now:
            self._paces.setdefault(entry.request.model, Pace(now)).count(now)
        for other in () if alone else self.head(entry.request.model, now, is_open):
            if other is entry:
                break
            other.overtaken += 1
        if not lane.old_first:
            lane.old_first = True
        elif self._is_old(entry, now):
            lane.old_first = False
        self._drop(entry)
        return entry

    def charge(self, entry: Waiting, prompt_tokens: int) -> Charge:
        """Counts a request that was taken for its tenant: so many tokens are to be computed."""
        want = entry.request
        return self.fairness.charge(entry.line, want.tenant, prompt_tokens, want.max_tokens)

    def settle(self, charge: Charge, computed_tokens: int, generated_tokens: int) -> None:
        """Counts what a request was really served, instead of its charge."""
        self.fairness.settle(charge, computed_tokens, generated_tokens)

    def push_out(self, newcomer: Waiting) -> Waiting | None:
        """Takes out one request if there is one too many; tells which one.

        Of the lowest priority, of the tenant that takes most places (by its weight), the latest. Of
        equals it is the newcomer.
        """
        if len(self) <= self.limit:
            return None
        want = newcomer.request
        lowest = min(self._crowds)
        crowd = self._crowds[lowest].first()[0]
        if want.priority == lowest and self._share(lowest, want.tenant) >= self._share(
            lowest, crowd
        ):
            return self.remove(newcomer.ticket)
        return self.remove(next(reversed(self._crowd[lowest, crowd])))

    def late(self, now: float) -> list[Waiting]:
        """Takes out the requests whose deadline has passed."""
        self._now = max(self._now, now)
        return [e for t in self._deadlines.pop_through(now) if (e := self.remove(t)) is not None]

    def _old(self, lane: _Lane, now: float) -> Iterator[Waiting]:
        return takewhile(lambda e: self._is_old(e, now), lane.entries.values())

    def _is_old(self, entry: Waiting, now: float) -> bool:
        return now - entry.since >= self._patience

    def _fair(self, lane: _Lane, is_open: Open) -> Iterator[Waiting]:
        for negative in lane.order:
            level = lane.levels[-negative]
            each = LOOKAHEAD // 2 if len(level.tenants) > 1 else LOOKAHEAD
            for tenant in self._tenants(level):
                own = level.tenants[tenant].values()
                yield from islice((e for e in own if is_open(e.request.adapter)), each)

    def _tenants(self, level: _Level) -> Iterator[str]:
        """In order. More than LOOKAHEAD are looked for only if these have nothing that is open."""
        first = self.fairness.next(level.line, LOOKAHEAD)
        yield from first
        if len(level.tenants) > len(first):
            yield from self.fairness.next(level.line, len(level.tenants))[len(first) :]

    def _count(self, priority: int, tenant: str) -> None:
        """The number of a tenant's places has changed."""
        crowds = self._crowds.setdefault(priority, Ranking())
        if self._crowd[priority, tenant]:
            crowds.put(tenant, -self._share(priority, tenant))
            return
        del self._crowd[priority, tenant]
        crowds.discard(tenant)
        if not len(crowds):
            del self._crowds[priority]

    def _share(self, priority: int, tenant: str) -> float:
        return len(self._crowd[priority, tenant]) / self.fairness.weight(tenant)

    def check_integrity(self) -> None:
        """Every view shows the same requests; raises AssertionError."""
        assert len(self) <= self.limit
        lanes = [e for lane in self._lanes.values() for e in lane.entries.values()]
        levels = [level for lane in self._lanes.values() for level in lane.levels.values()]
        owned = [e for level in levels for own in level.tenants.values() for e in own.values()]
        crowds = [e for crowd in self._crowd.values() for e in crowd.values()]
        here = sorted(self._entries)
        for some in (lanes, owned, crowds):
            assert sorted(e.ticket for e in some) == here
        for level in levels:
            assert level.size == sum(len(own) for own in level.tenants.values())
            assert set(self.fairness.next(level.line, len(self) + 1)) == set(level.tenants)


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
