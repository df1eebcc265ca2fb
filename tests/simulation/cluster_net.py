"""Time, processes and the network between them, from one seed.

A heap of timed events and one random generator, so that a seed replays exactly. A process that is
stalled (stopped, starved, its clock jumping) does nothing until it goes on, and then everything at
once and in order; a dead one does nothing any more. What processes say goes over streams, as over
gRPC: in order, late, and never lost without the stream breaking, of which each end learns by
itself.
"""

from __future__ import annotations

import heapq
import itertools
import random

KEEPALIVE_SECONDS = 1.0
"""Silence after which one end of a stream takes the other for gone."""


class Process:
    """Something that runs, and ends for good. `host`: what partitions cut."""

    def __init__(self, net, name):
        self.net, self.name = net, name
        self.alive = True
        self.stalled_until = 0.0
        self.held: list = []
        self.streams: dict[Stream, None] = {}

    def after(self, delay, action, *args):
        """A timer of this process: void if it dies, late if it stalls."""
        self.net.push(self.net.now + delay, self, action, args)

    def die(self, *, silently=False):
        """kill -9; `silently`: its host goes, so nobody hears of it but by silence."""
        self.alive = False
        for stream in list(self.streams):
            stream.broken_at(self, KEEPALIVE_SECONDS if silently else 0.0)

    def stall(self, seconds):
        self.stalled_until = max(self.stalled_until, self.net.now + seconds)
        for stream in list(self.streams):
            self.net.push(
                self.net.now + KEEPALIVE_SECONDS, None, self._missed, (stream, self.stalled_until)
            )

    def hold(self, action, args):
        """Until it goes on."""
        if not self.held:
            self.net.push(self.stalled_until, None, self._go_on, ())
        self.held.append((action, args))

    def _go_on(self):
        if self.stalled_until > self.net.now:
            self.net.push(self.stalled_until, None, self._go_on, ())
            return
        held, self.held = self.held, []
        for action, args in held:
            if self.alive:
                action(*args)

    def _missed(self, stream, until):
        """Keepalive pings to a process that does not run find nobody."""
        if self.alive and until - self.net.now > 1e-9:
            stream.broken_at(self, 0.0)


class Stream:
    """A call from one process to another, messages either way. Sides: 0 called, 1 was called."""

    __slots__ = ("arrived", "doomed", "ends", "lost", "net", "open")

    def __init__(self, caller, server, lost):
        """`lost`: what the caller does when the stream breaks or the other side ends it."""
        net = self.net = caller.net
        self.ends = (caller, server)
        self.open = [True, True]
        self.arrived = [0.0, 0.0]
        self.lost = [lost, None]
        self.doomed = False
        caller.streams[self] = server.streams[self] = None
        if not server.alive:
            self.broken_at(server, 0.0)
        elif net.cut_for(caller, server) or server.stalled_until - net.now > KEEPALIVE_SECONDS:
            self.doomed = True
            self.broken_at(server, KEEPALIVE_SECONDS)
        elif net.storm and net.random.random() < net.loss:
            net.push(net.now + net.random.uniform(0, 0.2), None, self.break_off, ())

    def send(self, side, action, *args):
        """Has that side act, in the order of sending."""
        if not self.open[1 - side] or self.doomed:
            return
        net = self.net
        at = max(net.now + net.latency(*self.ends), self.arrived[side])
        self.arrived[side] = at
        net.push(at, self.ends[side], self._deliver, (side, action, args))

    def end(self, by):
        """One side ends it; the other learns of that after all that was said before."""
        if not self.open[by]:
            return
        self._shut(by)
        other, net = 1 - by, self.net
        if not self.doomed:
            at = max(net.now + net.latency(*self.ends), self.arrived[other])
            self.arrived[other] = at
            net.push(at, self.ends[other], self._lose, (other,))

    def break_off(self):
        """It breaks: both sides learn of it, each in its time; what was on its way is lost."""
        if self.open == [True, True]:
            self.net.count["streams broken"] += 1
        self.doomed = True
        for side in (0, 1):
            delay = self.net.random.uniform(0, 0.05)
            self.net.push(self.net.now + delay, self.ends[side], self._lose, (side,))

    def broken_at(self, process, delay):
        """That end is gone: the other learns of it."""
        side = 0 if self.ends[0] is process else 1
        net = self.net
        at = max(net.now + delay + net.latency(*self.ends), self.arrived[1 - side])
        if self.ends[side].alive:
            net.push(at, self.ends[side], self._lose, (side,))
        net.push(at, self.ends[1 - side], self._lose, (1 - side,))

    def _deliver(self, side, action, args):
        if self.open[side] and not self.doomed:
            action(*args)

    def _lose(self, side):
        if self.open[side]:
            self._shut(side)
            if self.lost[side] is not None:
                self.lost[side]()

    def _shut(self, side):
        self.open[side] = False
        if not self.open[1 - side] or not self.ends[1 - side].alive:
            self.ends[0].streams.pop(self, None)
            self.ends[1].streams.pop(self, None)


class Net:
    """The clock, the heap, chance, and what is cut off from what."""

    def __init__(self, seed, trace):
        self.seed = seed
        self.random = random.Random(seed)
        self.now = 0.0
        self.storm = True
        self.delay = self.random.choice([0.001, 0.004, 0.03])
        self.loss = self.random.choice([0.0, 0.0, 0.02, 0.1])
        self.count = Counts()
        self.events = 0
        self.trace: list[str] | None = [] if trace else None
        self._cuts: dict[tuple[str, str], float] = {}
        self._heap: list = []
        self._numbers = itertools.count(1)

    def push(self, time, process, action, args):
        """Actions of equal times come in the order they were asked for."""
        heapq.heappush(self._heap, (time, next(self._numbers), process, action, args))

    def at(self, delay, action, *args):
        """Something that happens to the world, not in a process."""
        self.push(self.now + delay, None, action, args)

    def run(self, until):
        """Plays what is due before that time, to which the clock then points."""
        heap = self._heap
        while heap and heap[0][0] < until:
            self.now, _, process, action, args = heapq.heappop(heap)
            if process is not None:
                if not process.alive:
                    continue
                if process.stalled_until > self.now or process.held:
                    process.hold(action, args)
                    continue
            self.events += 1
            action(*args)
        self.now = until

    def note(self, *words):
        """For the trace."""
        if self.trace is not None:
            self.trace.append(f"{self.now:8.4f} " + " ".join(str(w) for w in words))

    def number(self):
        """Each once."""
        return next(self._numbers)

    # The network

    def latency(self, a, b):
        """Of one message; some are late, and those across a cut wait for its end."""
        draw = self.random.random()
        seconds = self.delay * (20 * draw if draw > 0.98 and self.storm else draw)
        return seconds + self.cut_for(a, b)

    def cut_for(self, a, b):
        """Seconds for which two processes can't reach each other."""
        if not self._cuts:
            return 0.0
        return max(0.0, self._cuts.get((a.name, b.name), 0.0) - self.now)

    def cut(self, a, b, seconds):
        """Nothing passes between two processes; beyond KEEPALIVE_SECONDS their streams break."""
        self._cuts[a.name, b.name] = self._cuts[b.name, a.name] = self.now + seconds
        for stream in list(a.streams):
            if b in stream.ends and seconds > KEEPALIVE_SECONDS:
                self.push(self.now + KEEPALIVE_SECONDS, None, stream.break_off, ())

    def datagram(self, caller, server, action, *args):
        """A call whose answer nobody waits for; may be lost."""
        if self.cut_for(caller, server) > KEEPALIVE_SECONDS:
            return
        if self.storm and self.random.random() < self.loss:
            self.count["messages lost"] += 1
            return
        self.push(self.now + self.latency(caller, server), server, action, args)


class Counts(dict):
    """How often things happened."""

    def __missing__(self, key):
        return 0

    def add(self, other):
        for key, number in other.items():
            self[key] = self[key] + number
