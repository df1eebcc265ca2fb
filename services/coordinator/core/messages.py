"""What goes into the core and what comes out of it: events, commands, and the values they carry.

All times are seconds on the caller's clock, which never goes back. Streams and tickets are numbers
that the caller gives, each used once.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvtransfer.policy import ExportPolicy


class Role(enum.Enum):
    """What a worker serves."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"

    @property
    def prefills(self) -> bool:
        """Whether it runs prompts for others."""
        return self is not Role.DECODE

    @property
    def decodes(self) -> bool:
        """Whether it generates."""
        return self is not Role.PREFILL


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """How a worker's experts can be placed; fields as in coordinator.proto."""

    layers: int
    logical: int
    physical: int
    groups: int
    hosts: int
    gpus: int
    expert_bytes: int


@dataclass(frozen=True, slots=True)
class ExpertMap:
    """Logical expert in each place: layers x physical, row by row."""

    physical_to_logical: tuple[int, ...]
    plan: int = 0


@dataclass(frozen=True, slots=True)
class ExpertMove:
    """One copy of an expert's weights, from a place to another of the same layer."""

    layer: int
    expert: int
    from_place: int
    to_place: int


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What does not change while a worker lives; fields as in coordinator.proto."""

    worker_id: str
    role: Role
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
    """Where its KV may go. The worker itself enforces it."""
    kv_transports: tuple[str, ...] = ()
    kv_not_offered: Mapping[str, str] = field(default_factory=dict)
    can_be: tuple[Role, ...] = ()
    nvlink_domain: str = ""
    cost: float = 0.0
    kv_block_bytes: int = 0
    experts: ExpertShape | None = None

    def may_send_to(self, other: WorkerInfo, tenant: str) -> bool:
        """Whether this worker would let a tenant's KV go to that one."""
        allowed = self.export_policy.allowed(tenant)
        return allowed is None or other.region in allowed

    @property
    def rank_blocks(self) -> int:
        """KV blocks of each data-parallel rank: a request has to fit one."""
        return self.total_blocks // self.dp_ranks

    def blocks_for(self, tokens: int) -> int:
        """KV blocks that hold this many tokens."""
        return -(-tokens // self.block_tokens)


@dataclass(frozen=True, slots=True)
class RankStats:
    """One data-parallel attention rank; fields as in coordinator.proto."""

    running: int = 0
    waiting: int = 0
    free_blocks: int = 0
    kv_tokens: int = 0
    queued_tokens: int = 0


@dataclass(frozen=True, slots=True)
class KvRate:
    """What was fetched over one transport since start."""

    transport: str
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """What changes; fields as in coordinator.proto."""

    running: int = 0
    waiting: int = 0
    free_blocks: int = 0
    queued_tokens: int = 0
    prefill_tokens_per_second: float = 0.0
    step_seconds: float = 0.0
    held_blocks: int = 0
    cached_blocks: int = 0
    finished: int = 0
    corrupt_blocks: int = 0
    preempted: int = 0
    kv_bytes: Mapping[str, int] = field(default_factory=dict)
    leases: int = 0
    kv_refused: int = 0
    leases_expired: int = 0
    kv_traffic: tuple[object, ...] = ()
    """As it came: it is handed on to whoever asks for the status, and means nothing here."""
    kv_tiers: tuple[object, ...] = ()
    """The same."""
    kv_rates: tuple[KvRate, ...] = ()
    """What of kv_traffic means something here."""
    ranks: tuple[RankStats, ...] = ()
    adapters: tuple[str, ...] = ()
    expert_tokens: tuple[int, ...] = ()
    expert_map: ExpertMap | None = None
    draft_tokens: int = 0
    accepted_tokens: int = 0
    decode_steps: int = 0


@dataclass(frozen=True, slots=True)
class PlaceRequest:
    """A request that wants workers; fields as in coordinator.proto."""

    request_id: str
    attempt: int
    model: str
    block_keys: tuple[bytes, ...]
    context_tokens: int
    max_tokens: int
    exclude_workers: frozenset[str] = frozenset()
    frontend_id: str = ""
    kv_layout: str = ""
    tenant: str = ""
    priority: int = 0
    session: str = ""
    adapter: str = ""
    region: str = ""
    allowed_regions: frozenset[str] = frozenset()
    ttft_seconds: float = 0.0
    itl_seconds: float = 0.0


# Events: what happened.


@dataclass(frozen=True, slots=True)
class WorkerHello:
    """A worker opened a stream, and says who it is."""

    stream: int
    info: WorkerInfo
    stats: WorkerStats


@dataclass(frozen=True, slots=True)
class WorkerHeartbeat:
    """A worker reports its load."""

    stream: int
    stats: WorkerStats


@dataclass(frozen=True, slots=True)
class WorkerKvEvents:
    """A worker's prefix cache changed; `snapshot` means `stored` is all there is."""

    stream: int
    sequence: int
    snapshot: bool
    stored: Sequence[bytes] = ()
    removed: Sequence[bytes] = ()
    lower: Sequence[bytes] = ()
    """Only in a tier under the pool from now on."""


@dataclass(frozen=True, slots=True)
class WorkerDraining:
    """A worker wants no new requests."""

    stream: int


@dataclass(frozen=True, slots=True)
class WorkerRoleChanged:
    """A worker serves something else from now on."""

    stream: int
    role: Role


@dataclass(frozen=True, slots=True)
class StreamLost:
    """A worker's stream broke or ended."""

    stream: int


@dataclass(frozen=True, slots=True)
class PlaceRequested:
    """A frontend asks; `deadline` is a time on the caller's clock, None for none."""

    ticket: int
    request: PlaceRequest
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class PlaceCancelled:
    """A frontend no longer waits for the answer to this ticket."""

    ticket: int


@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """A frontend tells how an attempt ended; fields as ReportRequest in coordinator.proto."""

    request_id: str
    attempt: int
    failed_worker: str = ""
    failure: str = ""
    unreachable: bool = False
    generated_tokens: int = 0
    ttft_seconds: float = 0.0
    computed_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed. Expected several times a lease."""


Event = (
    WorkerHello
    | WorkerHeartbeat
    | WorkerKvEvents
    | WorkerDraining
    | WorkerRoleChanged
    | StreamLost
    | PlaceRequested
    | PlaceCancelled
    | AttemptEnded
    | Tick
)


# Commands: what the caller has to do.


@dataclass(frozen=True, slots=True)
class GrantLease:
    """Tell the worker that it is in, and for how long after each of its messages."""

    stream: int
    seconds: float


@dataclass(frozen=True, slots=True)
class AskResync:
    """Ask the worker for a snapshot of its KV keys."""

    stream: int


@dataclass(frozen=True, slots=True)
class AskRole:
    """Ask the worker to serve something else."""

    stream: int
    role: Role
    why: str


@dataclass(frozen=True, slots=True)
class AskExperts:
    """Ask the worker to move experts."""

    stream: int
    plan: ExpertMap
    moves: tuple[ExpertMove, ...]
    why: str


@dataclass(frozen=True, slots=True)
class DropWorker:
    """The worker is forgotten: end its stream."""

    stream: int
    worker_id: str
    why: str


@dataclass(frozen=True, slots=True)
class Chosen:
    """A worker picked for a request."""

    worker_id: str
    address: str
    cached_tokens: int
    dp_rank: int = 0


@dataclass(frozen=True, slots=True)
class Holder:
    """A worker that holds the first `tokens` tokens of a request, more than who computes it."""

    worker_id: str
    address: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request goes. No prefill: the decode worker computes the prompt."""

    decode: Chosen
    prefill: Chosen | None
    reasons: tuple[str, ...]
    prefix: Holder | None = None
    ttft_seconds: float = 0.0
    """As predicted, from the decision on; 0: nothing is measured yet."""
    itl_seconds: float = 0.0
    """The same."""


@dataclass(frozen=True, slots=True)
class AnswerPlacement:
    """The request of this ticket goes there; it waited for `queued_seconds`."""

    ticket: int
    placement: Placement
    queued_seconds: float


class Reason(enum.Enum):
    """Why a placement is refused: codes of docs/errors.md."""

    NO_WORKERS = "NO_WORKERS"
    OVERLOADED = "OVERLOADED"
    SLO_UNATTAINABLE = "SLO_UNATTAINABLE"
    UNKNOWN_MODEL = "UNKNOWN_MODEL"
    UNKNOWN_ADAPTER = "UNKNOWN_ADAPTER"
    DEADLINE = "DEADLINE"
    INVALID_REQUEST = "INVALID_REQUEST"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not placed. INVALID_REQUEST has field, value and allowed in metadata."""

    reason: Reason
    message: str
    retry_seconds: float = 1.0
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RefusePlacement:
    """The request of this ticket is not placed."""

    ticket: int
    refusal: Refusal


Command = (
    GrantLease | AskResync | AskRole | AskExperts | DropWorker | AnswerPlacement | RefusePlacement
)
