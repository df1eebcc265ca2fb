"""Workers that can work together: one model, one KV layout. Kept in order of load.

A pool has two sides, one for each half of a request's work; a worker of role BOTH is on both.

A decision looks at some holders of the prompt's prefix and at some of the least loaded workers,
not at every worker; so it costs the same with fifty workers and with a thousand. To that end a pool
keeps the workers that have room on coarse levels of load. A worker that gets a request goes to the
end of its level, so that equals take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from services.coordinator.core.membership import Standing, Worker
from services.coordinator.core.messages import Role

LEVELS = 16
AVOIDED = LEVELS
"""The level after the last: workers that get what nobody else can take."""


def prefill_level(worker: Worker) -> int:
    """Its queue, on a logarithmic scale from 64 tokens on, since queues have no natural end."""
    return min(LEVELS - 1, (worker.load.queued_tokens // 64).bit_length())


def decode_level(worker: Worker) -> int:
    """The fuller of batch and KV pool, linearly."""
    load = worker.load
    batch = load.requests / load.limit
    memory = 1 - load.free_blocks / worker.info.total_blocks
    return min(LEVELS - 1, int(LEVELS * max(batch, memory)))


class LoadOrder:
    """Workers with room, by level of load: 0 is idle."""

    def __init__(self, level: Callable[[Worker], int]) -> None:
        self.level = level
        self._levels: list[dict[str, Worker]] = [{} for _ in range(LEVELS + 1)]
        self._at: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._at)

    def put(self, worker: Worker, *, turn: bool = False) -> None:
        """Its load may have changed; `turn`: it had its turn, others of its level are next."""
        now = self._of(worker)
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
        """Least loaded first; those that are avoided come last."""
        for workers in self._levels:
            yield from workers.values()

    def _of(self, worker: Worker) -> int | None:
        if worker.load.fit_blocks == 0:
            return None
        return AVOIDED if worker.avoided else self.level(worker)


@dataclass(slots=True)
class Side:
    """The workers of a pool that do one half of the work."""

    roomy: LoadOrder
    """Those of `up` that have room."""
    present: dict[str, Worker] = field(default_factory=dict)
    """All but those that drain."""
    up: dict[str, Worker] = field(default_factory=dict)
    """Those that may get requests."""
    bits: int = 0
    """`up` as a set of the index."""
    in_region: dict[str, LoadOrder] = field(default_factory=dict)
    """`roomy` by region, if there are several."""
    with_adapter: dict[str, dict[str, Worker]] = field(default_factory=dict)
    """Those of `up` that have a LoRA adapter loaded, by adapter."""
    roles: dict[Role, int] = field(default_factory=dict)
    """How many of `up` have each role."""
    numerics: dict[str, int] = field(default_factory=dict)
    """How many of `up` have each numerics."""
    _adapters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _role_of: dict[str, Role] = field(default_factory=dict)

    def put(self, worker: Worker, *, here: bool, turn: bool = False) -> None:
        """Takes note of a worker's standing and load; `here`: its role is on this side."""
        if here and worker.standing in (Standing.UP, Standing.SUSPECT):
            self.present[worker.worker_id] = worker
        else:
            self.present.pop(worker.worker_id, None)
        if here and worker.standing is Standing.UP:
            self.up[worker.worker_id] = worker
            self.bits |= worker.bit
            self.roomy.put(worker, turn=turn)
            self._near(worker.info.region).put(worker, turn=turn)
            self._note_adapters(worker, worker.load.stats.adapters)
            self._note_role(worker, worker.info.role)
        else:
            self.up.pop(worker.worker_id, None)
            self.bits &= ~worker.bit
            self.roomy.discard(worker)
            self._near(worker.info.region).discard(worker)
            self._note_adapters(worker, ())
            self._note_role(worker, None)

    def _note_role(self, worker: Worker, role: Role | None) -> None:
        before = self._role_of.get(worker.worker_id)
        if before is role:
            return
        numerics = worker.info.numerics
        if before is not None:
            self.roles[before] -= 1
            self.numerics[numerics] -= 1
            if not self.numerics[numerics]:
                del self.numerics[numerics]
            del self._role_of[worker.worker_id]
        if role is not None:
            self.roles[role] = self.roles.get(role, 0) + 1
            self.numerics[numerics] = self.numerics.get(numerics, 0) + 1
            self._role_of[worker.worker_id] = role

    def _near(self, region: str) -> LoadOrder:
        order = self.in_region.get(region)
        if order is None:
            order = self.in_region[region] = LoadOrder(self.roomy.level)
        return order

    def _note_adapters(self, worker: Worker, adapters: tuple[str, ...]) -> None:
        adapters = tuple(dict.fromkeys(adapters))
        before = self._adapters.get(worker.worker_id, ())
        if before == adapters:
            return
        for name in before:
            del self.with_adapter[name][worker.worker_id]
            if not self.with_adapter[name]:
                del self.with_adapter[name]
        for name in adapters:
            self.with_adapter.setdefault(name, {})[worker.worker_id] = worker
        if adapters:
            self._adapters[worker.worker_id] = adapters
        else:
            del self._adapters[worker.worker_id]


@dataclass(slots=True)
class Pool:
    """Workers of one model and KV layout."""

    model: str
    kv_layout: str
    prefill: Side = field(default_factory=lambda: Side(LoadOrder(prefill_level)))
    decode: Side = field(default_factory=lambda: Side(LoadOrder(decode_level)))
    leaving: dict[str, Worker] = field(default_factory=dict)
    """Those that drain. They get nothing, but what they hold can be fetched while they last."""
    leaving_bits: int = 0
    """`leaving` as a set of the index."""

    def side(self, role: Role) -> Side:
        """Those that run prompts, or those that generate."""
        return self.prefill if role is Role.PREFILL else self.decode

    def put(self, worker: Worker, *, turn: bool = False) -> None:
        """Takes note of a worker's role, standing and load, on both sides."""
        role = worker.info.role
        self.prefill.put(worker, here=role.prefills, turn=turn)
        self.decode.put(worker, here=role.decodes, turn=turn)
        if worker.standing is Standing.DRAINING:
            self.leaving[worker.worker_id] = worker
            self.leaving_bits |= worker.bit
        elif self.leaving.pop(worker.worker_id, None) is not None:
            self.leaving_bits &= ~worker.bit

    @property
    def holders(self) -> int:
        """The workers that KV can be fetched from, as a set of the index."""
        return self.prefill.bits | self.decode.bits | self.leaving_bits

    def holder(self, worker_id: str) -> Worker:
        """One of them."""
        sides = (self.decode.up, self.prefill.up, self.leaving)
        return next(side[worker_id] for side in sides if worker_id in side)

    @property
    def empty(self) -> bool:
        """Whether nobody is here but workers that drain."""
        return not self.prefill.present and not self.decode.present


class Pools:
    """All pools, by model."""

    def __init__(self) -> None:
        self._pools: dict[str, dict[str, Pool]] = {}

    def put(self, worker: Worker, *, turn: bool = False) -> None:
        """Takes a worker in, or takes note of its role, standing and load."""
        info = worker.info
        layouts = self._pools.setdefault(info.model, {})
        pool = layouts.get(info.kv_layout)
        if pool is None:
            pool = layouts[info.kv_layout] = Pool(info.model, info.kv_layout)
        pool.put(worker, turn=turn)
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
