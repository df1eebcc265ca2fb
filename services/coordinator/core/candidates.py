"""Who could take a request: the shortlist that a decision looks at, and who of it is out, and why.

A decision looks at some holders of the prompt's prefix and some of the least loaded workers, not at
every worker; only if none of these will do, at everyone with room.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from services.coordinator.core.explain import Considered
from services.coordinator.core.index import PrefixIndex
from services.coordinator.core.membership import Worker
from services.coordinator.core.messages import PlaceRequest, Role
from services.coordinator.core.pools import Side
from services.coordinator.core.predict import Predictor
from services.coordinator.core.regions import Regions
from services.coordinator.core.scoring import Candidate
from services.coordinator.core.sessions import Sessions

SHORTLIST = 8
"""Least loaded workers, and as many of each other kind at most, that a decision looks at."""

REJECTED = 4
"""Holders of the prefix that are out, and are remembered for the explanation."""


@dataclass(frozen=True, slots=True)
class View:
    """What decisions look at besides the pools."""

    index: PrefixIndex
    predictor: Predictor
    regions: Regions
    sessions: Sessions


@dataclass(slots=True)
class Field:
    """The candidates of one decision for one role, and those who are out."""

    candidates: list[Candidate] = field(default_factory=list)
    out: list[Considered] = field(default_factory=list)


def barred(worker: Worker, want: PlaceRequest) -> str:
    """Why a worker can't have the request, however long it waits; "" if it can."""
    if worker.worker_id in want.exclude_workers:
        return "it failed this request"
    if want.allowed_regions and worker.info.region not in want.allowed_regions:
        return f"region {worker.info.region or '(none)'} is not allowed"
    if not has_adapter(worker, want):
        return f"adapter {want.adapter} is not loaded"
    if want.context_tokens >= worker.capacity:
        return f"it holds at most {worker.capacity} tokens"
    return ""


def has_adapter(worker: Worker, want: PlaceRequest) -> bool:
    """Whether the LoRA adapter that is wanted is loaded, or none is wanted."""
    return not want.adapter or want.adapter in worker.load.stats.adapters


def full(worker: Worker, want: PlaceRequest) -> str:
    """Why a worker can't have the request now; "" if it can."""
    load = worker.load
    if not load.room:
        return f"no room: {load.requests} of {load.limit} requests"
    blocks = worker.info.blocks_for(want.context_tokens + 1)
    if not load.fits(blocks):
        return f"{load.fit_blocks} KV blocks free, {blocks} needed"
    return ""


def fits(worker: Worker, want: PlaceRequest) -> bool:
    """Whether it can have the request now."""
    return not barred(worker, want) and not full(worker, want)


def may_send(source: Worker, sink: Worker, want: PlaceRequest) -> bool:
    """Whether the source's rules let the tenant's KV go to the sink."""
    return source.info.may_send_to(sink.info, want.tenant)


def find(
    view: View,
    side: Side,
    role: Role,
    want: PlaceRequest,
    beside: Worker | None = None,
    *,
    whole: bool = False,
) -> Field:
    """Workers with room for the request: of the shortlist if it has any, else of the pool.

    Those that are avoided are left only where there is nobody else. `beside` is where the KV of a
    prompt is to go: another worker, which its rules let it go to.
    """

    def serves(worker: Worker) -> bool:
        if beside is None:
            return True
        return worker is not beside and may_send(worker, beside, want)

    found = Field()
    workers = {} if whole else _shortlist(view, side, role, want, found)
    workers = {n: w for n, w in workers.items() if serves(w)}
    usable = {n: w for n, w in workers.items() if not w.avoided}
    if not usable:
        those = side.with_adapter.get(want.adapter, {}).values() if want.adapter else side.roomy
        everyone = {w.worker_id: w for w in those if serves(w) and fits(w, want)}
        usable = {n: w for n, w in everyone.items() if not w.avoided} or everyone
    for worker in workers.values():
        if worker.worker_id not in usable:
            found.out.append(Considered(worker.worker_id, role, rejected=worker.avoided))
    cached = _cached_keys(view.index, want, usable)
    last = view.sessions.last(want.tenant, want.session)
    cheapest = min((w.info.cost for w in usable.values() if w.info.cost > 0), default=0.0)
    tokens = want.context_tokens
    for name, worker in usable.items():
        info = worker.info
        held = min(tokens, cached.get(name, 0) * info.block_tokens)
        one = Candidate(worker, tokens, held, info.blocks_for(tokens + 1), beside)
        one.round_trip_seconds = view.regions.round_trip(want.region, info.region)
        one.last_of_session = name == last
        one.cheapest = cheapest
        found.candidates.append(one)
    return found


def _shortlist(
    view: View, side: Side, role: Role, want: PlaceRequest, found: Field
) -> dict[str, Worker]:
    """Holders of the prefix, the session's worker, those with the adapter, the near, the idle."""
    some: dict[str, Worker] = {}

    def take(workers: Iterator[Worker], limit: int) -> None:
        for worker in islice((w for w in workers if fits(w, want)), limit):
            some[worker.worker_id] = worker

    for name in islice(_holders(view.index, want, side.bits), 4 * SHORTLIST):
        worker = side.up[name]
        why = barred(worker, want) or full(worker, want)
        if not why:
            some[name] = worker
            if len(some) == SHORTLIST:
                break
        elif len(found.out) < REJECTED:
            found.out.append(Considered(name, role, rejected=why))
    last = side.up.get(view.sessions.last(want.tenant, want.session))
    if last is not None:
        take(iter((last,)), 1)
    if want.adapter:
        loaded = side.with_adapter.get(want.adapter, {}).values()
        take(islice(loaded, 4 * SHORTLIST), SHORTLIST)
    for region in want.allowed_regions or {want.region}:
        if len(side.in_region) > 1 and region in side.in_region:
            take(islice(side.in_region[region], SHORTLIST), SHORTLIST)
    take(islice(side.roomy, SHORTLIST), SHORTLIST)
    return some


def _holders(index: PrefixIndex, want: PlaceRequest, among: int) -> Iterator[str]:
    """Workers of a set that hold some of the prefix, those that hold most of it first."""
    for keys, workers in index.reach(want.block_keys, among):
        if keys == 0:
            return
        yield from index.names(workers)


def _cached_keys(
    index: PrefixIndex, want: PlaceRequest, workers: dict[str, Worker]
) -> dict[str, int]:
    among = 0
    for worker in workers.values():
        among |= worker.bit
    return {
        name: keys
        for keys, some in index.reach(want.block_keys, among)
        if keys
        for name in index.names(some)
    }
