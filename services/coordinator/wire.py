"""Between generated messages and the core's dataclasses. What a peer sends is checked here."""

from __future__ import annotations

from typing import cast

from kvtransfer.policy import ExportPolicy
from services.coordinator.core import messages as m
from services.coordinator.core.core import Core
from services.coordinator.core.membership import Standing, Worker
from services.coordinator.core.pools import Pool
from services.runtime.errors import (
    DeadlineError,
    InvalidRequestError,
    NoWorkersError,
    OverloadedError,
    TandemError,
    UnknownModelError,
)
from tandem.coordinator.v1 import coordinator_pb2 as pb
from tandem.generation.v1 import generation_pb2

KEY_BYTES = 16

_ROLES = {pb.WORKER_ROLE_PREFILL: m.Role.PREFILL, pb.WORKER_ROLE_DECODE: m.Role.DECODE}
_WIRE_ROLES = {role: number for number, role in _ROLES.items()}

_NAMES = ("worker_id", "address", "model", "kv_layout")
_COUNTS = ("block_tokens", "total_blocks", "max_running", "context_tokens")


def hello_from(stream: int, hello: pb.Hello) -> m.WorkerHello:
    """Raises InvalidRequestError naming the field that makes the worker unusable."""
    info = hello.info
    if info.role not in _ROLES:
        raise InvalidRequestError("hello.info.role", info.role, "prefill or decode")
    for field in _NAMES:
        if not getattr(info, field):
            raise InvalidRequestError(f"hello.info.{field}", "", "must not be empty")
    for field in _COUNTS:
        if getattr(info, field) < 1:
            raise InvalidRequestError(f"hello.info.{field}", 0, "at least 1")
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
    )
    return m.WorkerHello(stream, known, stats_from(hello.stats))


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
    """A worker's load."""
    return m.WorkerStats(
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
        kv_bytes=dict(stats.kv_bytes),
        leases=stats.leases,
        kv_refused=stats.kv_refused,
        leases_expired=stats.leases_expired,
        kv_traffic=tuple(stats.kv_traffic),
        kv_tiers=tuple(stats.kv_tiers),
    )


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
        _check_keys("kv_events.stored", stored := tuple(events.stored))
        _check_keys("kv_events.removed", removed := tuple(events.removed))
        return m.WorkerKvEvents(stream, events.sequence, events.snapshot, stored, removed)
    raise InvalidRequestError("message", None, "one of hello, heartbeat, kv_events, draining")


def command_to(command: m.GrantLease | m.AskResync, coordinator_id: str) -> pb.RegisterResponse:
    """What a worker is told."""
    if isinstance(command, m.AskResync):
        return pb.RegisterResponse(resync=pb.Resync())
    accepted = pb.Accepted(
        lease_ms=max(1, round(command.seconds * 1e3)), coordinator_id=coordinator_id
    )
    return pb.RegisterResponse(accepted=accepted)


def place_from(request: pb.PlaceRequest) -> m.PlaceRequest:
    """Raises InvalidRequestError naming the field."""
    if not request.request_id:
        raise InvalidRequestError("request_id", "", "must not be empty")
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
        exclude_workers=frozenset(request.exclude_workers),
        frontend_id=request.frontend_id,
        kv_layout=request.kv_layout,
        tenant=request.tenant,
    )


def place_to(answer: m.AnswerPlacement) -> pb.PlaceResponse:
    """The decision."""
    placement = answer.placement
    return pb.PlaceResponse(
        prefill=None if placement.prefill is None else _chosen_to(placement.prefill),
        decode=_chosen_to(placement.decode),
        reasons=placement.reasons,
        queued_seconds=answer.queued_seconds,
        prefix=None if placement.prefix is None else _prefix_to(placement.prefix),
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
    if refusal.reason is m.Reason.UNKNOWN_MODEL:
        return UnknownModelError(refusal.message, **metadata)
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
        queued=len(core.queue),
        placed=core.placed,
        refused={reason.value: count for reason, count in core.refused.items()},
        uptime_seconds=now - core.started,
    )


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
    )


def _worker_to(worker: Worker, core: Core, now: float) -> pb.WorkerStatus:
    info, stats = worker.info, worker.load.stats
    return pb.WorkerStatus(
        info=pb.WorkerInfo(
            worker_id=info.worker_id,
            role=_WIRE_ROLES[info.role],
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
        ),
        draining=worker.standing is Standing.DRAINING,
        silent_seconds=max(0.0, now - worker.heard),
        known_blocks=core.index.known_blocks(worker.worker_id),
    )
