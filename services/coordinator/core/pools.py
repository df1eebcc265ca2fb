"""Workers that can work together: one model, one KV layout. Kept in order of load.

A decision looks at some holders of the prompt's prefix and at some of the least loaded workers,
not at every worker; so it costs the same with fifty workers and with a thousand. To that end a pool
keeps the workers that have room on coarse levels of load. A worker that gets a request goes to the
end of its level, so that equals take turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from services.coordinator.core.membership import Standing, Worker
from services.coordinator.core.messages import Role

LEVELS = 16


def level(worker: Worker) -> int | None:
    """How loaded a worker is, 0 (idle) to LEVELS - 1; None if it has no room.

    Decode: the fuller of batch and KV pool. Prefill: its queue, on a logarithmic scale from 64
    tokens on, since queues have no natural end.
    """
    load = worker.load
    if load.room == 0 or load.free_blocks == 0:
        return None
    if worker.info.role is Role.PREFILL:
        return min(LEVELS - 1, (load.queued_tokens // 64).bit_length())
    batch = load.requests / load.limit
    memory = 1 - load.free_blocks / worker.info.total_blocks
    return min(LEVELS - 1, int(LEVELS * max(batch, memory)))


class LoadOrder:
    """Workers with room, by level of load."""

    def __init__(self) -> None:
        self._levels: list[dict[str, Worker]] = [{} for _ in range(LEVELS)]
        self._at: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._at)

    def put(self, worker: Worker, *, turn: bool = False) -> None:
        """Its load may have changed; `turn`: it had its turn, others of its level are next."""
        now = level(worker)
        if now == self._at.get(worker.worker_id) and not turn:
            return
        self.discard(worker)
        if now is not None:
            self._levels[now][worker.worker_id] = worker
            self._at[worker.worker_id] = now

    def discard(self, worker: Worker) -> None:
        """It is not to be found here any more."""
        before = self._at.pop(worker.worker_id, None)
        if before is not None:
            del self._levels[before][worker.worker_id]

    def __iter__(self) -> Iterator[Worker]:
        """Least loaded first."""
        for workers in self._levels:
            yield from workers.values()


@dataclass(slots=True)
class Side:
    """The workers of a pool that have one role."""

    present: dict[str, Worker] = field(default_factory=dict)
    """All but those that drain."""
    up: dict[str, Worker] = field(default_factory=dict)
    """Those that may get requests."""
    bits: int = 0
    """`up` as a set of the index."""
    roomy: LoadOrder = field(default_factory=LoadOrder)
    """Those of `up` that have room."""

    def put(self, worker: Worker, *, turn: bool = False) -> None:
        """Takes a worker in, or takes note of its standing and load."""
        if worker.standing in (Standing.UP, Standing.SUSPECT):
            self.present[worker.worker_id] = worker
        else:
            self.present.pop(worker.worker_id, None)
        if worker.standing is Standing.UP:
            self.up[worker.worker_id] = worker
            self.bits |= worker.bit
            self.roomy.put(worker, turn=turn)
        else:
            self.up.pop(worker.worker_id, None)
            self.bits &= ~worker.bit
            self.roomy.discard(worker)


@dataclass(slots=True)
class Pool:
    """Workers of one model and KV layout."""

    model: str
    kv_layout: str
    prefill: Side = field(default_factory=Side)
    decode: Side = field(default_factory=Side)

    def side(self, role: Role) -> Side:
        """Its workers of a role."""
        return self.prefill if role is Role.PREFILL else self.decode

    @property
    def empty(self) -> bool:
        """Whether nobody is here but workers that drain."""
        return not self.prefill.present and not self.decode.present


class Pools:
    """All pools, by model."""

    def __init__(self) -> None:
        self._pools: dict[str, dict[str, Pool]] = {}

    def put(self, worker: Worker, *, turn: bool = False) -> None:
        """Takes a worker in, or takes note of its standing and load; see Side.put."""
        info = worker.info
        layouts = self._pools.setdefault(info.model, {})
        pool = layouts.get(info.kv_layout)
        if pool is None:
            pool = layouts[info.kv_layout] = Pool(info.model, info.kv_layout)
        pool.side(info.role).put(worker, turn=turn)
        if pool.empty:
            del layouts[info.kv_layout]
        if not layouts:
            del self._pools[info.model]

    def models(self) -> list[str]:
        """Models served, by name."""
        return sorted(self._pools)

    def of(self, model: str, kv_layout: str = "") -> list[Pool]:
        """The pools of a model: that of the layout first, then those with most decode workers."""
        return sorted(
            self._pools.get(model, {}).values(),
            key=lambda p: (p.kv_layout != kv_layout, -len(p.decode.up), p.kv_layout),
        )

    def all(self) -> list[Pool]:
        """Every pool, by model."""
        return [pool for model in self.models() for pool in self.of(model)]
