"""Between generated messages and the core's dataclasses. What a peer sends is checked here."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict
from typing import cast

from kvtransfer.policy import ExportPolicy
from services.coordinator.core import messages as m
from services.coordinator.core.core import Core
from services.coordinator.core.membership import Standing, Worker
from services.coordinator.core.packed import PackedKeys
from services.coordinator.core.pools import Pool
from services.runtime.errors import (
    DeadlineError,
    InvalidRequestError,
    NoWorkersError,
    OverloadedError,
    SloUnattainableError,
    TandemError,
    UnknownAdapterError,
    UnknownModelError,
)
from tandem.coordinator.v1 import coordinator_pb2 as pb
from tandem.generation.v1 import generation_pb2

KEY_BYTES = 16
MOST_RANKS = 1024
"""Data-parallel ranks of a worker."""
MOST_PLACES = 1 << 18
"""Places for experts in all layers of a worker: several times what the largest models have."""
STEP_SECONDS = (1e-6, 1e4)
"""What an engine's step may take."""
MOST_COUNT = 1 << 40
"""Of requests, blocks or tokens."""
NAME_BYTES = 256
MOST_NAMES = 1024
"""In a list of workers or regions."""

_PLACE_NAMES = ("request_id", "session", "tenant", "adapter", "region", "model", "frontend_id")
_LOADS = ("running", "waiting", "free_blocks", "queued_tokens")
_RANK_COUNTS = ("running", "waiting", "free_blocks", "kv_tokens", "queued_tokens")

_ROLES = {
    pb.WORKER_ROLE_PREFILL: m.Role.PREFILL,
    pb.WORKER_ROLE_DECODE: m.Role.DECODE,
    pb.WORKER_ROLE_BOTH: m.Role.BOTH,
}
WIRE_ROLES = {role: number for number, role in _ROLES.items()}

_NAMES = ("worker_id", "address", "model", "kv_layout")
_COUNTS = ("block_tokens", "total_blocks", "max_running", "context_tokens")


def _name(field: str, value: str) -> str:
    """A short word of a peer, which may end up in a log or on a terminal."""
    if len(value.encode()) > NAME_BYTES:
        raise InvalidRequestError(field, f"{len(value)} characters", f"at most {NAME_BYTES} bytes")
    if not value.isascii() or not value.isprintable():
        for character in value:
            if unicodedata.category(character).startswith("C"):
                raise InvalidRequestError(field, ascii(value), "no control characters")
    return value


def _adapters_from(values: Sequence[str]) -> tuple[str, ...]:
    """Each once, in order."""
    if len(values) > MOST_NAMES:
        raise InvalidRequestError("stats.adapters", f"{len(values)}", f"at most {MOST_NAMES}")
    return tuple(dict.fromkeys(_name("stats.adapters", value) for value in values))


def _names_from(field: str, values: Sequence[str]) -> frozenset[str]:
    if len(values) > MOST_NAMES:
        raise InvalidRequestError(field, f"{len(values)} entries", f"at most {MOST_NAMES}")
    return frozenset(_name(field, value) for value in values)


def hello_from(stream: int, hello: pb.Hello) -> m.WorkerHello:
    """Raises InvalidRequestError naming the field that makes the worker unusable."""
    info = hello.info
    if info.role not in _ROLES:
        raise InvalidRequestError("hello.info.role", info.role, "prefill, decode or both")
    for field in _NAMES:
        if not getattr(info, field):
            raise InvalidRequestError(f"hello.info.{field}", "", "must not be empty")
    for field in (*_NAMES, "region", "host", "nvlink_domain"):
        _name(f"hello.info.{field}", getattr(info, field))
    for field in _COUNTS:
        if getattr(info, field) < 1:
            raise InvalidRequestError(f"hello.info.{field}", 0, "at least 1")
    if info.dp_ranks > min(MOST_RANKS, info.total_blocks):
        allowed = f"at most {MOST_RANKS}, and one for each of {info.total_blocks} KV blocks"
        raise InvalidRequestError("hello.info.dp_ranks", info.dp_ranks, allowed)
    known = m.WorkerInfo(
        worker_id=info.worker_id,
        role=_ROLES[info.role],
        address=info.address,
        model=info.model,
        kv_layout=info.kv_layout,
        block_tokens=info.block_tokens,
        total_blocks=info.total_blocks,
        max_running=info.max_running,
        context_tokens=info.context_tokens,
        host=info.host,
        region=info.region,
        numerics=info.numerics,
        dp_ranks=max(1, info.dp_ranks),
        pid=info.pid,
        export_policy=_policy_from(info),
        kv_transports=tuple(info.kv_transports),
        kv_not_offered=dict(info.kv_not_offered),
        can_be=tuple(_ROLES[role] for role in info.can_be if role in _ROLES),
        nvlink_domain=info.nvlink_domain,
        cost=_within("hello.info.cost", info.cost, 1e-9, 1e9),
        kv_block_bytes=info.kv_block_bytes,
        experts=_shape_from(info.experts) if info.HasField("experts") else None,
    )
    return m.WorkerHello(stream, known, stats_from(hello.stats))


def _shape_from(shape: pb.ExpertShape) -> m.ExpertShape:
    known = m.ExpertShape(
        layers=shape.layers,
        logical=shape.logical,
        physical=shape.physical,
        groups=shape.groups,
        hosts=shape.hosts,
        gpus=shape.gpus,
        expert_bytes=shape.expert_bytes,
    )
    for field in ("layers", "logical", "physical", "groups", "hosts", "gpus"):
        if getattr(known, field) < 1:
            raise InvalidRequestError(f"hello.info.experts.{field}", 0, "at least 1")
    if known.physical < known.logical or known.physical % known.gpus:
        allowed = f"a multiple of gpus ({known.gpus}), and no less than logical ({known.logical})"
        raise InvalidRequestError("hello.info.experts.physical", known.physical, allowed)
    if known.layers * known.physical > MOST_PLACES:
        allowed = f"at most {MOST_PLACES} in all {known.layers} layers together"
        raise InvalidRequestError("hello.info.experts.physical", known.physical, allowed)
    for field, part in (("logical", known.groups), ("gpus", known.hosts)):
        if getattr(known, field) % part:
            allowed = f"a multiple of {part}"
            raise InvalidRequestError(f"hello.info.experts.{field}", getattr(known, field), allowed)
    return known


def _finite(field: str, value: float) -> float:
    """A number of a peer that decisions may reckon with."""
    if not 0 <= value < math.inf:
        raise InvalidRequestError(field, value, "a finite number, not negative")
    return value


def _within(field: str, value: float, least: float, most: float) -> float:
    """The same, of what is measured: 0 for not measured, or in a range that is possible."""
    if value != 0 and not least <= value <= most:
        raise InvalidRequestError(field, value, f"0, or {least:g} to {most:g}")
    return value


def _count(field: str, value: int) -> int:
    if not 0 <= value <= MOST_COUNT:
        raise InvalidRequestError(field, value, f"at most {MOST_COUNT}")
    return value


def _rank_from(rank: pb.RankStats) -> m.RankStats:
    figures = {name: _count(f"stats.ranks.{name}", getattr(rank, name)) for name in _RANK_COUNTS}
    return m.RankStats(**figures)


def _policy_from(info: pb.WorkerInfo) -> ExportPolicy:
    rules = info.export_rules
    return ExportPolicy(
        export_regions=tuple(rules.regions.names),
        tenant_regions={t: tuple(regions.names) for t, regions in rules.tenant_regions.items()},
    )


def _rules_to(policy: ExportPolicy) -> pb.ExportRules | None:
    regions, tenants = policy.export_regions, policy.tenant_regions
    if not regions and not tenants:
        return None
    return pb.ExportRules(
        regions=pb.Regions(names=regions) if regions else None,
        tenant_regions={tenant: pb.Regions(names=names) for tenant, names in tenants.items()},
    )


def stats_from(stats: pb.WorkerStats) -> m.WorkerStats:
    """A worker's load. Raises InvalidRequestError naming a figure that can't be."""
    for name in _LOADS:
        _count(f"stats.{name}", getattr(stats, name))
    return m.WorkerStats(
        running=stats.running,
        waiting=stats.waiting,
        free_blocks=stats.free_blocks,
        queued_tokens=stats.queued_tokens,
        prefill_tokens_per_second=_within(
            "stats.prefill_tokens_per_second", stats.prefill_tokens_per_second, 1e-6, 1e9
        ),
        step_seconds=_within("stats.step_seconds", stats.step_seconds, *STEP_SECONDS),
        held_blocks=stats.held_blocks,
        cached_blocks=stats.cached_blocks,
        finished=stats.finished,
        corrupt_blocks=stats.corrupt_blocks,
        preempted=stats.preempted,
        kv_bytes=dict(stats.kv_bytes),
        leases=stats.leases,
        kv_refused=stats.kv_refused,
        leases_expired=stats.leases_expired,
        kv_traffic=tuple(stats.kv_traffic),
        kv_tiers=tuple(stats.kv_tiers),
        kv_rates=tuple(
            m.KvRate(
                t.transport, t.bytes, _within("stats.kv_traffic.seconds", t.seconds, 1e-9, 1e9)
            )
            for t in stats.kv_traffic
            if t.transport and not t.peer
        ),
        ranks=tuple(map(_rank_from, stats.ranks)),
        adapters=_adapters_from(stats.adapters),
        expert_tokens=tuple(stats.expert_tokens),
        expert_map=_map_from(stats.expert_map) if stats.HasField("expert_map") else None,
        draft_tokens=stats.draft_tokens,
        accepted_tokens=stats.accepted_tokens,
        decode_steps=stats.decode_steps,
    )


def _map_from(message: pb.ExpertMap) -> m.ExpertMap:
    return m.ExpertMap(tuple(message.physical_to_logical), message.plan)


def report_from(stream: int, message: pb.RegisterRequest) -> m.Event:
    """Any message of a Register stream but the first; raises InvalidRequestError."""
    kind = message.WhichOneof("message")
    if kind == "hello":
        return hello_from(stream, message.hello)
    if kind == "heartbeat":
        return m.WorkerHeartbeat(stream, stats_from(message.heartbeat.stats))
    if kind == "draining":
        return m.WorkerDraining(stream)
    if kind == "kv_events":
        events = message.kv_events
        stored, removed, lower = (_packed(events, x) for x in ("stored", "removed", "lower"))
        return m.WorkerKvEvents(stream, events.sequence, events.snapshot, stored, removed, lower)
    if kind == "role_changed":
        role = message.role_changed.role
        if role not in _ROLES:
            raise InvalidRequestError("role_changed.role", role, "prefill, decode or both")
        return m.WorkerRoleChanged(stream, _ROLES[role])
    allowed = "one of hello, heartbeat, kv_events, draining, role_changed"
    raise InvalidRequestError("message", None, allowed)


def command_to(
    command: m.GrantLease | m.AskResync | m.AskRole | m.AskExperts, coordinator_id: str
) -> pb.RegisterResponse:
    """What a worker is told."""
    if isinstance(command, m.AskResync):
        return pb.RegisterResponse(resync=pb.Resync())
    if isinstance(command, m.AskRole):
        role = WIRE_ROLES[command.role]
        return pb.RegisterResponse(change_role=pb.ChangeRole(role=role, why=command.why))
    if isinstance(command, m.AskExperts):
        return pb.RegisterResponse(expert_plan=_plan_to(command))
    accepted = pb.Accepted(
        lease_ms=max(1, round(command.seconds * 1e3)), coordinator_id=coordinator_id
    )
    return pb.RegisterResponse(accepted=accepted)


def _plan_to(command: m.AskExperts) -> pb.ExpertPlan:
    plan = command.plan
    return pb.ExpertPlan(
        plan=plan.plan,
        map=pb.ExpertMap(physical_to_logical=plan.physical_to_logical, plan=plan.plan),
        moves=[
            pb.ExpertMove(
                layer=move.layer,
                expert=move.expert,
                from_place=move.from_place,
                to_place=move.to_place,
            )
            for move in command.moves
        ],
        why=command.why,
    )


def place_from(request: pb.PlaceRequest) -> m.PlaceRequest:
    """Raises InvalidRequestError naming the field."""
    if not request.request_id:
        raise InvalidRequestError("request_id", "", "must not be empty")
    for field in _PLACE_NAMES:
        _name(field, getattr(request, field))
    if request.context_tokens < 1:
        raise InvalidRequestError("context_tokens", 0, "at least 1")
    _check_keys("block_keys", keys := tuple(request.block_keys))
    if len(keys) > request.context_tokens:
        raise InvalidRequestError(
            "block_keys", f"{len(keys)} keys", f"one a block of {request.context_tokens} tokens"
        )
    return m.PlaceRequest(
        request_id=request.request_id,
        attempt=request.attempt,
        model=request.model,
        block_keys=keys,
        context_tokens=request.context_tokens,
        max_tokens=request.max_tokens,
        exclude_workers=_names_from("exclude_workers", request.exclude_workers),
        frontend_id=request.frontend_id,
        kv_layout=request.kv_layout,
        tenant=request.tenant,
        priority=request.priority,
        session=request.session,
        adapter=request.adapter,
        region=request.region,
        allowed_regions=_names_from("allowed_regions", request.allowed_regions),
        ttft_seconds=_finite("ttft_seconds", request.ttft_seconds),
        itl_seconds=_finite("itl_seconds", request.itl_seconds),
    )


def place_to(answer: m.AnswerPlacement, coordinator_id: str) -> pb.PlaceResponse:
    """The decision."""
    placement = answer.placement
    return pb.PlaceResponse(
        prefill=None if placement.prefill is None else _chosen_to(placement.prefill),
        decode=_chosen_to(placement.decode),
        reasons=placement.reasons,
        queued_seconds=answer.queued_seconds,
        prefix=None if placement.prefix is None else _prefix_to(placement.prefix),
        predicted_ttft_seconds=placement.ttft_seconds,
        predicted_itl_seconds=placement.itl_seconds,
        coordinator_id=coordinator_id,
    )


def _prefix_to(holder: m.Holder) -> generation_pb2.KvPrefix:
    return generation_pb2.KvPrefix(
        worker_id=holder.worker_id, address=holder.address, tokens=holder.tokens
    )


def ended_from(request: pb.ReportRequest) -> m.AttemptEnded:
    """How an attempt ended."""
    return m.AttemptEnded(
        request_id=request.request_id,
        attempt=request.attempt,
        failed_worker=request.failed_worker,
        failure=request.failure,
        unreachable=request.unreachable,
        generated_tokens=request.generated_tokens,
        ttft_seconds=_within("ttft_seconds", request.ttft_seconds, 1e-9, 1e9),
        computed_tokens=request.computed_tokens,
    )


def refusal_to(refusal: m.Refusal) -> TandemError:
    """The error that answers a Place call."""
    metadata = dict(refusal.metadata)
    if refusal.reason is m.Reason.INVALID_REQUEST:
        return InvalidRequestError(metadata["field"], metadata["value"], metadata["allowed"])
    if refusal.reason is m.Reason.NO_WORKERS:
        return NoWorkersError(refusal.message, retry_seconds=refusal.retry_seconds, **metadata)
    if refusal.reason is m.Reason.OVERLOADED:
        return OverloadedError(refusal.message, retry_seconds=refusal.retry_seconds, **metadata)
    if refusal.reason is m.Reason.SLO_UNATTAINABLE:
        seconds = refusal.retry_seconds
        return SloUnattainableError(refusal.message, retry_seconds=seconds, **metadata)
    if refusal.reason is m.Reason.UNKNOWN_MODEL:
        return UnknownModelError(refusal.message, **metadata)
    if refusal.reason is m.Reason.UNKNOWN_ADAPTER:
        return UnknownAdapterError(refusal.message, **metadata)
    return DeadlineError(refusal.message, **metadata)


def models_to(core: Core) -> pb.GetModelsResponse:
    """The models served, and how to hash prompts for them."""
    return pb.GetModelsResponse(models=[_model_to(pool) for pool in core.pools.all()])


def status_to(core: Core, coordinator_id: str, now: float) -> pb.GetStatusResponse:
    """The cluster as the core sees it."""
    workers = sorted(core.members, key=lambda worker: worker.worker_id)
    return pb.GetStatusResponse(
        coordinator_id=coordinator_id,
        workers=[_worker_to(worker, core, now) for worker in workers],
        queued=len(core.desk.queue),
        placed=core.desk.placed,
        refused={reason.value: count for reason, count in core.desk.refused.items()},
        uptime_seconds=now - core.started,
        kv_bytes_gone=core.kv_bytes_gone,
    )


def _packed(events: pb.KvEvents, field: str) -> PackedKeys:
    raw: bytes = getattr(events, field)
    try:
        return PackedKeys(raw)
    except ValueError:
        raise InvalidRequestError(
            f"kv_events.{field}", f"{len(raw)} bytes", f"keys of {KEY_BYTES} bytes each"
        ) from None


def _check_keys(field: str, keys: tuple[bytes, ...]) -> None:
    if not {*map(len, keys)} <= {KEY_BYTES}:
        wrong = next(len(key) for key in keys if len(key) != KEY_BYTES)
        raise InvalidRequestError(field, f"a key of {wrong} bytes", f"keys have {KEY_BYTES}")


def _chosen_to(chosen: m.Chosen) -> pb.PlacedWorker:
    return pb.PlacedWorker(
        worker_id=chosen.worker_id,
        address=chosen.address,
        cached_tokens=chosen.cached_tokens,
        dp_rank=chosen.dp_rank,
    )


def _model_to(pool: Pool) -> pb.ServedModel:
    workers = [*pool.prefill.present.values(), *pool.decode.present.values()]
    return pb.ServedModel(
        model=pool.model,
        kv_layout=pool.kv_layout,
        block_tokens=workers[0].info.block_tokens,
        context_tokens=min(worker.info.context_tokens for worker in workers),
        prefill_workers=len(pool.prefill.present),
        decode_workers=len(pool.decode.present),
        adapters=_adapters_to(pool),
        numerics=sorted({w.info.numerics for w in workers} - {""}),
    )


def _adapters_to(pool: Pool) -> list[pb.ServedAdapter]:
    """Those of decode workers: a prompt can be computed there, but generation nowhere else."""
    found: dict[str, pb.ServedAdapter] = {}
    for worker in pool.decode.present.values():
        names = set()
        for adapter_id in worker.load.stats.adapters:
            served = found.setdefault(adapter_id, pb.ServedAdapter(id=adapter_id))
            served.decode_workers += 1
            name = adapter_id.partition("@")[0]
            served.current_workers += name not in names
            names.add(name)
    return [found[adapter_id] for adapter_id in sorted(found)]


def _worker_to(worker: Worker, core: Core, now: float) -> pb.WorkerStatus:
    info, stats = worker.info, worker.load.stats
    experts = core.experts.status(worker.worker_id)
    return pb.WorkerStatus(
        info=pb.WorkerInfo(
            worker_id=info.worker_id,
            role=WIRE_ROLES[info.role],
            address=info.address,
            model=info.model,
            kv_layout=info.kv_layout,
            block_tokens=info.block_tokens,
            total_blocks=info.total_blocks,
            max_running=info.max_running,
            context_tokens=info.context_tokens,
            host=info.host,
            region=info.region,
            numerics=info.numerics,
            dp_ranks=info.dp_ranks,
            pid=info.pid,
            export_rules=_rules_to(info.export_policy),
            kv_transports=info.kv_transports,
            kv_not_offered=info.kv_not_offered,
            can_be=[WIRE_ROLES[role] for role in info.can_be],
            nvlink_domain=info.nvlink_domain,
            cost=info.cost,
            kv_block_bytes=info.kv_block_bytes,
            experts=None if info.experts is None else pb.ExpertShape(**asdict(info.experts)),
        ),
        stats=pb.WorkerStats(
            running=stats.running,
            waiting=stats.waiting,
            free_blocks=stats.free_blocks,
            queued_tokens=stats.queued_tokens,
            prefill_tokens_per_second=stats.prefill_tokens_per_second,
            step_seconds=stats.step_seconds,
            held_blocks=stats.held_blocks,
            cached_blocks=stats.cached_blocks,
            finished=stats.finished,
            corrupt_blocks=stats.corrupt_blocks,
            preempted=stats.preempted,
            kv_bytes=stats.kv_bytes,
            leases=stats.leases,
            kv_refused=stats.kv_refused,
            leases_expired=stats.leases_expired,
            kv_traffic=cast("tuple[pb.KvTraffic, ...]", stats.kv_traffic),
            kv_tiers=cast("tuple[pb.KvTier, ...]", stats.kv_tiers),
            ranks=[pb.RankStats(**asdict(rank)) for rank in stats.ranks],
            adapters=stats.adapters,
            draft_tokens=stats.draft_tokens,
            accepted_tokens=stats.accepted_tokens,
            decode_steps=stats.decode_steps,
        ),
        draining=worker.standing is Standing.DRAINING,
        avoided=worker.avoided,
        silent_seconds=max(0.0, now - worker.heard),
        known_blocks=core.index.known_blocks(worker.worker_id),
        experts=None if experts is None else pb.ExpertStatus(**asdict(experts)),
    )
