"""The coordinators as a frontend sees them, as services/frontend/{replicas,coordinator}.py do."""

from __future__ import annotations

import math

from services.frontend.coordinator import EMPTY_VIEW, PATIENCE_SECONDS
from services.frontend.replicas import (
    FIRST_PAUSE_SECONDS,
    HOME_SECONDS,
    LAST_PAUSE_SECONDS,
    LATE_SECONDS,
    PING_AFTER_SECONDS,
    PING_SECONDS,
)
from services.runtime.errors import CoordinatorUnavailableError, DeadlineError
from tests.simulation.cluster_net import Stream


class Replica:
    """One coordinator: whether it is there, and the calls to it."""

    def __init__(self, replicas, place):
        self.replicas, self.frontend, self.place = replicas, replicas.frontend, place
        self.up, self.up_since = True, -math.inf
        self.heard_at = -math.inf
        self.calls: dict[PlaceCall, None] = {}
        self._looking = False

    def ask(self, call):
        coordinator = self.frontend.world.coordinators[self.place]
        self.calls[call] = None
        self.look()
        stream = Stream(self.frontend, coordinator, lambda: self.broken(call, stream))
        left = max(0.001, call.deadline - self.frontend.net.now)
        stream.send(1, coordinator.place, stream, call, call.want, left)
        return stream

    def answered(self, call):
        self.calls.pop(call, None)
        self.hear()

    def broken(self, call, stream):
        self.calls.pop(call, None)
        self.lose()
        call.away(stream)

    def hear(self):
        self.heard_at = self.frontend.net.now
        if not self.up:
            self.up, self.up_since = True, self.heard_at

    def lose(self):
        self.frontend.net.count["coordinators found away"] += self.up
        self.up = False
        self.look()

    # Whether it is there, while that matters

    def look(self):
        if not self._looking:
            self._looking = True
            self._watch(FIRST_PAUSE_SECONDS)

    def _watch(self, pause):
        if not self.calls and self.up:
            self._looking = False
        elif self.up:
            now = self.frontend.net.now
            self.frontend.after(PING_AFTER_SECONDS, self._quiet, now)
        else:
            self.frontend.after(pause, self._ping, min(2 * pause, LAST_PAUSE_SECONDS))

    def _quiet(self, began):
        slept = self.frontend.net.now - began
        if self.heard_at < began and slept < PING_AFTER_SECONDS + LATE_SECONDS:
            self._ping(FIRST_PAUSE_SECONDS)
        else:
            self._watch(FIRST_PAUSE_SECONDS)

    def _ping(self, pause):
        frontend, net = self.frontend, self.frontend.net
        coordinator, asked = frontend.world.coordinators[self.place], net.now
        net.datagram(frontend, coordinator, net.datagram, coordinator, frontend, self.hear)
        frontend.after(PING_SECONDS, self._pinged, asked, pause)

    def _pinged(self, asked, pause):
        late = self.frontend.net.now - asked >= PING_SECONDS + LATE_SECONDS
        if self.heard_at < asked and not late:
            self.lose()
            if any(r.up for r in self.replicas.all):
                for call in list(self.calls):
                    call.stream.end(by=0)
                    self.broken(call, call.stream)
        self._watch(pause)


class Replicas:
    """All of them, in this frontend's order."""

    def __init__(self, frontend):
        self.frontend = frontend
        places = frontend.world.coordinator_places
        self.all = [Replica(self, p) for p in frontend.world.random.sample(places, len(places))]
        self._asked = None

    def pick(self, tried=()):
        some = [r for r in self.all if r.up] or self.all
        left = [r for r in some if r not in tried]
        if not left:
            return None
        first, asked = left[0], self._asked
        if asked in left and self.frontend.net.now - first.up_since < HOME_SECONDS:
            return asked
        if not tried:
            self._asked = first
        return first

    def told(self, placed_by, report):
        """Whom a report is for."""
        up = [r for r in self.all if r.up]
        if report.unreachable:
            return up
        if placed_by is not None and placed_by.up:
            return [placed_by]
        return up[:1] if report.failed_worker else []


class PlaceCall:
    """A placement asked for until there is an answer, of one coordinator after the other."""

    def __init__(self, live, number, want):
        self.live, self.number, self.want = live, number, want
        self.frontend, self.net = live.frontend, live.net
        self.deadline = live.deadline
        self.replica: Replica | None = None
        self.stream: Stream | None = None
        self.over = False
        self._tried: list[Replica] = []
        self._failure = None
        self._pause = 0.05
        self._give_up: float | None = None
        self._next()

    def _next(self):
        """Asks one, and the next if that one is away or knows nobody."""
        self.replica = self.frontend.replicas.pick(self._tried)
        if self.replica is None:
            self._again()
        else:
            self._tried.append(self.replica)
            self.stream = self.replica.ask(self)

    def placed(self, placement):
        if not self.over:
            self.replica.answered(self)
            self._close()
            self.live.placed(self.number, placement, self.replica)

    def refused(self, error):
        if self.over:
            return
        self.replica.answered(self)
        self.stream.end(by=0)
        if error.reason in EMPTY_VIEW:
            self._failure = error
            self._next()
        else:
            self._unplaced(error)

    def away(self, stream):
        """Its coordinator is."""
        if self.over or stream is not self.stream:
            return
        if self.net.now >= self.deadline:
            self._unplaced(DeadlineError("the deadline passed while the coordinator was asked"))
            return
        if self._failure is None or self._failure.reason not in EMPTY_VIEW:
            self._failure = CoordinatorUnavailableError("the coordinator can't be reached")
        self._next()

    def _again(self):
        """All were asked."""
        now, error = self.net.now, self._failure
        if self._give_up is None:
            self._give_up = min(self.deadline, now + PATIENCE_SECONDS)
        up = [r for r in self.frontend.replicas.all if r.up]
        young = any(now - r.up_since < PATIENCE_SECONDS for r in up)
        may = error.reason not in EMPTY_VIEW or young
        if not may or now + self._pause >= self._give_up:
            self._unplaced(error)
            return
        self._tried, self._failure = [], None
        self.frontend.after(self._pause, self._retry)
        self._pause = min(2 * self._pause, 0.5)

    def _retry(self):
        if not self.over:
            self._next()

    def _unplaced(self, error):
        self._close()
        self.live.unplaced(self.number, error)

    def cancel(self):
        if not self.over:
            self._close()

    def _close(self):
        self.over = True
        if self.replica is not None:
            self.replica.calls.pop(self, None)
        if self.stream is not None:
            self.stream.end(by=0)
