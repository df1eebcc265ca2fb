"""Who is there. A worker is in from its Hello until its stream breaks or its lease ends.

Rules, numbered as in the table:
 1. A Hello makes a worker a member. From a member it renews the lease, on the new stream.
 2. Any message renews the lease; a suspect that is heard of is trusted again.
 3. A frontend that could not reach a worker makes it suspect: nothing is placed on it.
 4. Draining is for good: a worker id is one process, and a process drains only to end.
 5. A broken stream, an ended lease, or another worker at its address end a membership.
Pairs that the table lacks change nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from services.coordinator.core.feed import KvFeed
from services.coordinator.core.load import Load
from services.coordinator.core.messages import Role, WorkerInfo


class Standing(enum.Enum):
    """What a worker may be used for."""

    UP = "gets requests"
    SUSPECT = "gets none until it is heard of again"
    DRAINING = "gets none, for good"
    GONE = "not a member"


class Signal(enum.Enum):
    """What is learned of a worker."""

    HELLO = enum.auto()
    HEARD = enum.auto()
    UNREACHABLE = enum.auto()
    DRAIN = enum.auto()
    LOST = enum.auto()


TABLE: dict[tuple[Standing, Signal], Standing] = {
    (Standing.GONE, Signal.HELLO): Standing.UP,  # 1
    (Standing.UP, Signal.HELLO): Standing.UP,  # 1
    (Standing.SUSPECT, Signal.HELLO): Standing.UP,  # 1, 2
    (Standing.DRAINING, Signal.HELLO): Standing.DRAINING,  # 1, 4
    (Standing.UP, Signal.HEARD): Standing.UP,  # 2
    (Standing.SUSPECT, Signal.HEARD): Standing.UP,  # 2
    (Standing.DRAINING, Signal.HEARD): Standing.DRAINING,  # 2, 4
    (Standing.UP, Signal.UNREACHABLE): Standing.SUSPECT,  # 3
    (Standing.UP, Signal.DRAIN): Standing.DRAINING,  # 4
    (Standing.SUSPECT, Signal.DRAIN): Standing.DRAINING,  # 4
    (Standing.UP, Signal.LOST): Standing.GONE,  # 5
    (Standing.SUSPECT, Signal.LOST): Standing.GONE,  # 5
    (Standing.DRAINING, Signal.LOST): Standing.GONE,  # 5
}


def after(standing: Standing, signal: Signal) -> Standing:
    """The standing after a signal."""
    return TABLE.get((standing, signal), standing)


@dataclass(slots=True, eq=False)
class Worker:
    """A member, and all that is known of it."""

    info: WorkerInfo
    stream: int
    load: Load
    feed: KvFeed
    bit: int
    """Its place in the index's sets of workers."""
    heard: float
    """When its last message came."""
    expires: float
    """When its lease ends."""
    standing: Standing = Standing.GONE
    picked: int = 0
    """Number of the last placement that it got; 0 before the first."""
    avoided: str = ""
    """Why it gets only what nobody else can take; empty: it does not."""
    capacity: int = field(init=False)
    """Most tokens of one request that it can hold."""

    def __post_init__(self) -> None:
        info = self.info
        self.capacity = min(info.context_tokens, info.rank_blocks * info.block_tokens)

    @property
    def worker_id(self) -> str:
        """Its id."""
        return self.info.worker_id

    def take_role(self, role: Role) -> None:
        """It serves something else from now on."""
        self.info = self.load.info = replace(self.info, role=role)

    def signal(self, signal: Signal) -> bool:
        """Moves along the table; tells whether the standing has changed."""
        before, self.standing = self.standing, after(self.standing, signal)
        return self.standing is not before


class Members:
    """Workers by id, by stream and by address; each of the three names one at most."""

    def __init__(self) -> None:
        self._by_id: dict[str, Worker] = {}
        self._by_stream: dict[int, Worker] = {}
        self._by_address: dict[str, Worker] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._by_id.values())

    def get(self, worker_id: str) -> Worker | None:
        """The member of that id."""
        return self._by_id.get(worker_id)

    def on_stream(self, stream: int) -> Worker | None:
        """The member that this stream belongs to; None if it has been superseded."""
        return self._by_stream.get(stream)

    def at_address(self, address: str) -> Worker | None:
        """The member that listens there."""
        return self._by_address.get(address)

    def add(self, worker: Worker) -> None:
        """Takes a member whose id, stream and address nobody has."""
        self._by_id[worker.worker_id] = worker
        self._by_stream[worker.stream] = worker
        self._by_address[worker.info.address] = worker

    def remove(self, worker: Worker) -> None:
        """Forgets a member."""
        del self._by_id[worker.worker_id]
        del self._by_stream[worker.stream]
        del self._by_address[worker.info.address]

    def expired(self, now: float) -> list[Worker]:
        """Members whose lease has ended."""
        return [w for w in self._by_id.values() if w.expires <= now]
