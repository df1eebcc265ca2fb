"""Who a worker is, as it tells coordinators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvtransfer.policy import ExportPolicy
from services.engine.api import ExpertShape
from services.engine.wire import rules_to, shape_to
from tandem.coordinator.v1 import coordinator_pb2 as pb

ROLES = {
    "prefill": pb.WORKER_ROLE_PREFILL,
    "decode": pb.WORKER_ROLE_DECODE,
    "both": pb.WORKER_ROLE_BOTH,
}
ROLE_NAMES = {number: name for name, number in ROLES.items()}


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """What does not change while the worker lives; fields as WorkerInfo in coordinator.proto."""

    worker_id: str
    role: str
    address: str
    model: str
    kv_layout: str
    block_tokens: int
    total_blocks: int
    max_running: int
    context_tokens: int
    host: str = ""
    region: str = ""
    numerics: str = ""
    dp_ranks: int = 1
    pid: int = 0
    export_policy: ExportPolicy = field(default_factory=ExportPolicy)
    kv_transports: tuple[str, ...] = ()
    kv_not_offered: Mapping[str, str] = field(default_factory=dict)
    can_be: tuple[str, ...] = ()
    """Roles that it can change to; `role` is the one that it begins with."""
    experts: ExpertShape | None = None
    nvlink_domain: str = ""
    cost: float = 0.0
    kv_block_bytes: int = 0


def info_to(me: WorkerIdentity, role: str) -> pb.WorkerInfo:
    """For a Hello of a worker that serves `role` now."""
    return pb.WorkerInfo(
        worker_id=me.worker_id,
        role=ROLES[role],
        address=me.address,
        model=me.model,
        kv_layout=me.kv_layout,
        block_tokens=me.block_tokens,
        total_blocks=me.total_blocks,
        max_running=me.max_running,
        context_tokens=me.context_tokens,
        host=me.host,
        region=me.region,
        numerics=me.numerics,
        dp_ranks=me.dp_ranks,
        pid=me.pid,
        export_rules=rules_to(me.export_policy),
        kv_transports=me.kv_transports,
        kv_not_offered=me.kv_not_offered,
        can_be=[ROLES[role] for role in me.can_be],
        experts=None if me.experts is None else shape_to(me.experts),
        nvlink_domain=me.nvlink_domain,
        cost=me.cost,
        kv_block_bytes=me.kv_block_bytes,
    )
