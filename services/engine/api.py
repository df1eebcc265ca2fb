"""The Engine protocol: what a worker process asks of whatever runs the model.

Two kinds of engine must fit behind it: one that Tandem steps itself (torch) and one that batches
inside and is asked by request (TensorRT-LLM). So requests go in by plain calls, and everything
that comes of them leaves by one stream, one item an engine step. All methods are called on the
event loop's thread and return at once; the work happens elsewhere.

A request's life at an engine, prefill and decode apart:

    prefill worker:  prefill(request, hold)  -> StepOutput with the first token and a handle;
                     its KV stays under the lease `request.request_id` for `hold.seconds`
    decode worker:   decode(request, source) -> reserves, fetches blocks while prefill still runs
                     proceed(id, first)      -> joins the batch once the KV is complete
                     -> StepOutput after StepOutput, the last with a finish reason

With `source=None` decode computes the prompt itself, and every token comes from it. Whoever
computes a prompt may be told of a worker that holds its start (`prefix`), and decides whether to
take it from there.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvtransfer.layout import KvLayout
from kvtransfer.observe import Traffic
from kvtransfer.tiers.base import TierStats
from services.engine.adapters import Adapter, AdapterStatus


class FinishReason(enum.Enum):
    """Why a request ended at the engine."""

    STOP = "stop"
    """End-of-sequence or a stop token, which is the last of the request's tokens."""
    LENGTH = "length"
    """max_tokens, or the end of the context window."""
    CANCELLED = "cancelled"
    """By cancel()."""
    ERROR = "error"
    """See TokenOutput.error."""


class GuideKind(enum.Enum):
    """Forms that an output can be held to, as in generation.proto."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    GRAMMAR = "grammar"
    CHOICE = "choice"
    JSON_OBJECT = "json_object"
    FRAME = "frame"


@dataclass(frozen=True, slots=True)
class Guide:
    """A form that the output must have; `texts`: schema, expression, grammar, or the choices."""

    kind: GuideKind
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; meanings and ranges as in generation.proto, all validated."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int = 256
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    logprobs: int | None = None
    ignore_eos: bool = False
    guide: Guide | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit), ids ascending, each once."""


@dataclass(frozen=True, slots=True)
class Request:
    """One attempt at a generation request.

    `output_token_ids` came of earlier attempts: context now, output for penalties and limits.
    Randomness for the token at sequence index i depends on (sampling.seed, i) alone.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    output_token_ids: tuple[int, ...] = ()
    tenant: str = ""
    deadline_seconds: float | None = None
    """What is left until the client's deadline when the request comes in; None: no deadline."""
    dp_rank: int = 0
    """Data-parallel attention rank that takes it, below EngineInfo.dp_ranks."""
    adapter: str = ""
    """LoRA adapter to compute with, as name@digest; empty: none."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens known: KV is needed for each of them before the next can be sampled."""
        return self.prompt_token_ids + self.output_token_ids


@dataclass(frozen=True, slots=True)
class Hold:
    """How long a prefilled request's KV waits for its sink, seconds after the last touch."""

    seconds: float


@dataclass(frozen=True, slots=True)
class KvSource:
    """Where the KV of a request is or will be: a worker's KvTransferService and a lease there."""

    worker_id: str
    address: str
    lease_id: str


@dataclass(frozen=True, slots=True)
class KvPrefix:
    """A worker that holds the KV of a prompt's first `tokens` tokens, as far as is known."""

    worker_id: str
    address: str
    tokens: int


@dataclass(frozen=True, slots=True)
class FirstTokens:
    """What prefill found: the token(s) after the prompt, and the engine's opaque handle."""

    token_ids: tuple[int, ...]
    handle: bytes = b""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one generated token and of its strongest rivals, (id, logprob) each."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class PrefixReport:
    """What was done about a prefix that another worker holds; fields as in generation.proto."""

    worker_id: str
    tokens: int
    fetch_seconds: float
    compute_seconds: float
    seconds: float
    reason: str


@dataclass(frozen=True, slots=True)
class KvReport:
    """What was done about one request's prompt KV; fields as in generation.proto."""

    transport: str = ""
    bytes: int = 0
    blocks: int = 0
    seconds: float = 0.0
    exposed_seconds: float = 0.0
    cached_tokens: int = 0
    computed_tokens: int = 0
    corrupt_blocks: int = 0
    lost: str = ""
    why: str = ""
    prefix: PrefixReport | None = None


@dataclass(frozen=True, slots=True)
class EngineFault:
    """Why the engine gave a request up: a reason code of docs/errors.md, words, values."""

    reason: str
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """What one step brought for one request.

    After an output with a finish reason the engine holds nothing for the request, except the
    lease of a finished prefill. A finished prefill has finish_reason None if decode should go on,
    `prefill_done` True, and the handle that decode needs.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: EngineFault | None = None
    kv: KvReport | None = None
    prefill_done: bool = False
    handle: bytes = b""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Everything one engine step brought; request-level engines coalesce what came together."""

    outputs: tuple[TokenOutput, ...]


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """How experts can be placed; fields as in coordinator.proto."""

    layers: int
    logical: int
    physical: int
    groups: int
    hosts: int
    gpus: int
    expert_bytes: int


@dataclass(frozen=True, slots=True)
class ExpertMap:
    """Logical expert in each place: layers x physical, row by row; `plan` it came of."""

    physical_to_logical: tuple[int, ...]
    plan: int = 0


@dataclass(frozen=True, slots=True)
class ExpertMove:
    """One copy of an expert's weights; fields as in coordinator.proto."""

    layer: int
    expert: int
    from_place: int
    to_place: int


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What does not change while the engine lives."""

    model: str
    layout: KvLayout
    context_tokens: int
    total_blocks: int
    max_running: int
    vocabulary: int
    eos_token_ids: tuple[int, ...]
    numerics: str
    """Digest of the results of a fixed computation: equal means equal bits in batch-invariant
    mode. Empty if the engine is not batch-invariant."""
    dp_ranks: int = 1
    kv_transports: tuple[str, ...] = ()
    """Offered, best first."""
    kv_not_offered: Mapping[str, str] = field(default_factory=dict)
    """Transports that were asked for and can't be offered: why not."""
    experts: ExpertShape | None = None
    """None: not a mixture of experts, or they can't be moved."""


@dataclass(frozen=True, slots=True)
class RankStats:
    """One data-parallel attention rank; fields as in coordinator.proto."""

    running: int = 0
    waiting: int = 0
    free_blocks: int = 0
    kv_tokens: int = 0
    queued_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What changes; fields as WorkerStats in coordinator.proto."""

    running: int = 0
    waiting: int = 0
    free_blocks: int = 0
    held_blocks: int = 0
    cached_blocks: int = 0
    queued_tokens: int = 0
    prefill_tokens_per_second: float = 0.0
    step_seconds: float = 0.0
    finished: int = 0
    preempted: int = 0
    corrupt_blocks: int = 0
    leases: int = 0
    kv_bytes: Mapping[str, int] = field(default_factory=dict)
    kv_traffic: tuple[Traffic, ...] = ()
    kv_refused: int = 0
    leases_expired: int = 0
    kv_tiers: tuple[TierStats, ...] = ()
    ranks: tuple[RankStats, ...] = ()
    """Empty: one rank, which the figures above are of."""
    adapters: tuple[str, ...] = ()
    """LoRA adapters that requests are taken with, as name@digest; the present one of a name first.
    """
    expert_tokens: tuple[int, ...] = ()
    """Tokens routed to each logical expert since start, layers x logical, row by row."""
    expert_map: ExpertMap | None = None
    """Where experts are now; None: it has none that can be moved."""
    draft_tokens: int = 0
    """Tokens drafted by multi-token prediction since start."""
    accepted_tokens: int = 0
    """Of these, how many were generated."""
    decode_steps: int = 0
    """Steps of one sequence that generated since start."""


@dataclass(frozen=True, slots=True)
class KvEvents:
    """Changes of the prefix cache, in order; `snapshot`: `stored` and `lower` are all there is.

    A key is in one of the three lists.
    """

    stored: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()
    snapshot: bool = False
    lower: tuple[bytes, ...] = ()
    """Only in a tier under the pool from now on."""


class Engine(Protocol):
    """See the module's docstring. Request ids are unique among live requests."""

    @property
    def info(self) -> EngineInfo:
        """Valid after start()."""

    async def start(self) -> None:
        """Loads and warms up; the engine can serve when this returns."""

    async def close(self) -> None:
        """Cancels what runs, frees everything, ends outputs()."""

    def prefill(self, request: Request, hold: Hold, prefix: KvPrefix | None = None) -> None:
        """Queues a prompt.

        Raises EngineOverloadedError, AdapterNotLoadedError, InvalidRequestError if it can't fit.
        """

    def decode(
        self, request: Request, source: KvSource | None, prefix: KvPrefix | None = None
    ) -> None:
        """Queues a request to generate for. Raises as prefill() does."""

    def proceed(self, request_id: str, first: FirstTokens) -> None:
        """Gives a request that decode() took with a source its first tokens. Unknown: ignored."""

    def cancel(self, request_id: str) -> None:
        """Ends a request, without another output, and frees what it holds, leases included.

        Unknown ids are ignored.
        """

    def update_experts(self, plan: ExpertMap, moves: Sequence[ExpertMove]) -> None:
        """Copies experts until they are where the plan says, between two steps, all or none.

        The moves of one layer are one exchange: all are read before one is written. It is done when
        stats() tells the plan's map; no token is changed by it. Raises InvalidRequestError for a
        plan that is not newer than the present map, for moves that don't lead from that to the
        plan's, and in an engine without experts.
        """

    async def load_adapter(self, name: str, path: str) -> Adapter:
        """Takes in a LoRA adapter from below engine.adapter_folder; requests may have it then.

        One of the same name is replaced: see adapters.py. Raises InvalidRequestError,
        UnsupportedAdapterError, AdapterLimitError.
        """

    def unload_adapter(self, name: str) -> Sequence[AdapterStatus]:
        """Takes no new requests with it; it is gone when those that have it have ended.

        Raises UnknownAdapterError.
        """

    def adapters(self) -> Sequence[AdapterStatus]:
        """All that are held, those that leave included."""

    def outputs(self) -> AsyncIterator[StepOutput]:
        """All that comes of requests. One consumer."""

    def kv_events(self) -> AsyncIterator[KvEvents]:
        """Starts with a snapshot; then changes, coalesced. Each call is a reader of its own."""

    def stats(self) -> EngineStats:
        """Now."""

    def check_integrity(self) -> None:
        """Proves the pool's books (free + cached + held = total); raises AssertionError."""
