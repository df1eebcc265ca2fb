"""What goes into the core and what comes out of it: events, commands, and the values they carry.

All times are seconds on the caller's clock, which never goes back. Streams and tickets are numbers
that the caller gives, each used once.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvtransfer.policy import ExportPolicy


class Role(enum.Enum):
    """What a worker serves."""

    PREFILL = "prefill"
    DECODE = "decode"


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

    def may_send_to(self, other: WorkerInfo, tenant: str) -> bool:
        """Whether this worker would let a tenant's KV go to that one."""
        allowed = self.export_policy.allowed(tenant)
        return allowed is None or other.region in allowed

    def blocks_for(self, tokens: int) -> int:
        """KV blocks that hold this many tokens."""
        return -(-tokens // self.block_tokens)


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
    stored: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerDraining:
    """A worker wants no new requests."""

    stream: int


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


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed. Expected several times a lease."""


Event = (
    WorkerHello
    | WorkerHeartbeat
    | WorkerKvEvents
    | WorkerDraining
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
    UNKNOWN_MODEL = "UNKNOWN_MODEL"
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


Command = GrantLease | AskResync | DropWorker | AnswerPlacement | RefusePlacement
