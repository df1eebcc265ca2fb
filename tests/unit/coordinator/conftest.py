"""A core and a few words to drive it with."""

from __future__ import annotations

import itertools

import pytest

from services.coordinator.core import messages as m
from services.coordinator.core.core import Core
from services.coordinator.core.rules import Rules

BLOCK = 16


def keys(count, start=0, family=0):
    """Keys of the blocks start..count of a prompt."""
    return tuple(
        bytes([family, *i.to_bytes(4, "big")]).ljust(16, b"\0") for i in range(start, count)
    )


class Cluster:
    """A settled core at time `now`, with workers by name."""

    def __init__(
        self,
        queue_limit=10,
        local=64,
        lease=3.0,
        settled=True,
        wait=0.0,
        draw=lambda: 0.0,
        **rules,
    ):
        self.now = 100.0
        self.core = Core(Rules(lease, queue_limit, local, wait, **rules), self.now, draw)
        self.streams: dict[str, int] = {}
        self.answers: dict[int, m.Command] = {}
        self.commands: list[m.Command] = []
        self.numbers = itertools.count(1)
        if settled:
            self.wait(lease, step=lease / 4)

    def do(self, event):
        """Hands an event to the core; what comes of it, and keeps answers by ticket."""
        commands = self.core.handle(event, self.now)
        for command in commands:
            if isinstance(command, m.AnswerPlacement | m.RefusePlacement):
                assert command.ticket not in self.answers, "answered twice"
                self.answers[command.ticket] = command
        self.core.check_integrity()
        self.commands += commands
        return commands

    def wait(self, seconds, step=0.1, beat=()):
        """Time passes; the workers in `beat` go on reporting what they last did."""
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.now = min(end, self.now + step)
            for name in beat:
                worker = self.core.members.get(name)
                self.do(m.WorkerHeartbeat(worker.stream, worker.load.stats))
            self.do(m.Tick())

    def worker(self, name, role=None, stream=None, stats=None, **info):
        """A worker says Hello; its role is the first word of its name."""
        role = role or m.Role(name.split("-")[0])
        fields = {
            "address": f"{name}:1",
            "model": "m",
            "kv_layout": "l",
            "block_tokens": BLOCK,
            "total_blocks": 512,
            "max_running": 8,
            "context_tokens": 4096,
            "numerics": "n",
            **info,
        }
        stream = self.streams[name] = stream or next(self.numbers)
        known = m.WorkerInfo(worker_id=name, role=role, **fields)
        stats = stats or m.WorkerStats(free_blocks=fields["total_blocks"])
        return self.do(m.WorkerHello(stream, known, stats))

    def beat(self, name, **stats):
        """A worker reports."""
        free = self.core.members.get(name).info.total_blocks
        stats = m.WorkerStats(**{"free_blocks": free, **stats})
        return self.do(m.WorkerHeartbeat(self.streams[name], stats))

    def holds(self, name, stored):
        """A worker sends a snapshot."""
        return self.do(m.WorkerKvEvents(self.streams[name], 1, True, tuple(stored)))

    def ask(self, tokens=128, *, request="", attempt=0, model="m", timeout=None, **more):
        """A frontend asks; the ticket."""
        ticket = next(self.numbers)
        prompt = more.pop("prompt", keys(tokens // BLOCK))
        want = m.PlaceRequest(
            request_id=request or f"r{ticket}",
            attempt=attempt,
            model=model,
            block_keys=prompt,
            context_tokens=tokens,
            max_tokens=more.pop("max_tokens", 100),
            exclude_workers=frozenset(more.pop("exclude", ())),
            kv_layout=more.pop("kv_layout", "l"),
            tenant=more.pop("tenant", ""),
            **more,
        )
        deadline = None if timeout is None else self.now + timeout
        self.do(m.PlaceRequested(ticket, want, deadline))
        return ticket

    def place(self, *args, **kwargs) -> m.Placement:
        """Asks, and has to be answered at once with a placement."""
        answer = self.answers.get(self.ask(*args, **kwargs))
        assert isinstance(answer, m.AnswerPlacement), answer
        return answer.placement

    def refuse(self, *args, **kwargs) -> m.Refusal:
        """Asks, and has to be refused at once."""
        answer = self.answers.get(self.ask(*args, **kwargs))
        assert isinstance(answer, m.RefusePlacement), answer
        return answer.refusal

    def placement(self, ticket) -> m.Placement:
        """The placement that a ticket has got."""
        answer = self.answers[ticket]
        assert isinstance(answer, m.AnswerPlacement), answer
        return answer.placement


@pytest.fixture
def cluster():
    return Cluster()


@pytest.fixture
def make_cluster():
    return Cluster


@pytest.fixture
def make_keys():
    return keys
