"""The settings of every process: names, units, defaults, bounds.

Values come from, weakest first: the defaults here, a TOML file, environment variables
(TANDEM_ENGINE__THREADS=2 for `threads` in [engine]), command-line flags. Unknown keys and bad
values stop the process. `tandem settings` prints them with where each came from.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Seconds = Annotated[float, Field(gt=0, le=31_536_000)]
Patience = Annotated[float, Field(ge=0.1, le=86_400)]
"""Seconds after which something is given up: no less than a busy machine may take, nor for ever."""
# A folder is named after it.
WorkerName = Annotated[str, Field(pattern=r"^([A-Za-z0-9_][A-Za-z0-9_.:@-]*)?$", max_length=128)]
Region = Annotated[str, Field(pattern=r"^[^=+,\s]+$")]
RoundTrip = Annotated[str, Field(pattern=r"^[^=+,\s]+=[^=+,\s]+=[0-9]+(\.[0-9]+)?$")]
TenantWeight = Annotated[
    str, Field(pattern=r"^[^=,\s]+=([1-9][0-9]*(\.[0-9]+)?|0\.[0-9]*[1-9][0-9]*)$")
]
TenantRegions = Annotated[str, Field(pattern=r"^[^=+,\s]+=([^=+,\s]+(\+[^=+,\s]+)*)?$")]
"""tenant=region+region; no region: nowhere."""
Address = Annotated[str, Field(pattern=r"^[^,\s]+:[0-9]+$", description="host:port")]


def _split(value: object) -> object:
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


Addresses = Annotated[tuple[Address, ...], BeforeValidator(_split)]
"""host:port of each; also as one text with commas."""


ANY_WORKER = "workers"
WeightsSource = Annotated[
    str, Field(pattern=r"^(workers|[^,\s]+:[0-9]+)$", description="host:port, or workers")
]
"""host:port, or ANY_WORKER."""

AnswerFormatName = Literal[
    "auto", "plain", "hermes", "llama", "deepseek_v3", "deepseek_v31", "kimi_k2"
]

AdapterPath = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}=[^,]+$")]
"""name=folder."""

ExpertCounts = Annotated[str, Field(pattern=r"^([1-9]\d{0,4}(/[1-9]\d{0,4}){5})?$")]
"""layers/logical/physical/groups/hosts/gpus."""

ResidencyRule = Annotated[str, Field(pattern=r"^[^=+,\s]+=[^=+,\s]+(\+[^=+,\s]+)*$")]
"""tenant=region+region, one region at least."""


def _text_metadata(name: str) -> str:
    if name.endswith("-bin"):
        raise ValueError("names that end with -bin are of bytes, and a tenant is text")
    return name


MetadataName = Annotated[str, Field(pattern=r"^[a-z0-9_.-]*$"), AfterValidator(_text_metadata)]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


class ServerSettings(_Section):
    """The gRPC server of a process."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(0, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    advertise: str = Field(
        "",
        description="host:port that others reach this process by; empty: host and port, with this "
        "machine's name where host is every address.",
    )
    max_message_bytes: int = Field(
        4 * 2**20, ge=2**16, description="Largest message taken; larger ones are refused."
    )
    drain_seconds: Seconds = Field(
        20.0, description="How long running requests may go on after SIGTERM."
    )
    allow_unauthenticated_remote: bool = Field(
        False,
        description="Listen beyond loopback although nothing authenticates callers yet.",
    )


class LogSettings(_Section):
    """What is logged. Prompts and generated text never are."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level.")
    format: Literal["text", "json"] = Field("text", description="For people or for programs.")


class ModelSettings(_Section):
    """The model served."""

    name: str = Field(
        "smollm2-135m-instruct",
        description="Name clients ask for; also a name of `tandem models` if path is empty.",
    )
    path: str = Field(
        "", description="Hugging Face folder or GGUF file; empty: the cached model of that name."
    )


class EngineSettings(_Section):
    """The embedded engine."""

    kind: Literal["torch", "scripted"] = Field("torch", description="Which engine.")
    device: str = Field("cpu", description="Device it computes on; today cpu.")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Weights, activations.")
    weights: Literal["dtype", "int4"] = Field(
        "dtype",
        description="Weights of linear layers; int4: quantized in groups of 32, for few requests "
        "at a time. Needs batch_invariant=false, dtype=bfloat16 and a model without experts.",
    )
    kv_dtype: Literal["fp8_e4m3", "bfloat16", "float32"] = Field(
        "fp8_e4m3", description="KV blocks; fp8 has one float32 scale a token and head."
    )
    batch_invariant: bool = Field(
        True,
        description="A sequence's numbers depend on nothing but the sequence. Exact resumption "
        "needs it.",
    )
    threads: int = Field(0, ge=0, description="CPU threads; 0: share of this machine's cores.")
    block_tokens: int = Field(32, ge=1, le=1024, description="Tokens a KV block holds.")
    kv_blocks: int = Field(
        0, ge=0, description="KV blocks in the pool; 0: as many as kv_memory_mib holds."
    )
    kv_memory_mib: int = Field(512, ge=1, description="Memory of the KV pool, MiB.")
    max_running: int = Field(32, ge=1, description="Requests in the batch at once.")
    max_waiting: int = Field(256, ge=0, description="Requests that may wait; more are refused.")
    chunk_tokens: int = Field(
        256, ge=1, description="Prompt tokens computed in one step at most (token budget)."
    )
    context_tokens: int = Field(0, ge=0, description="Context window; 0: the model's own.")
    ranks: int = Field(
        1,
        ge=1,
        le=1024,
        description="Data-parallel ranks, each a process with its own requests and KV pool, and "
        "with its share of the experts where the model has any. What is said here of the pool and "
        "of requests is of one rank; threads are shared among them.",
    )
    tensor_parallel: int = Field(
        1,
        ge=1,
        le=64,
        description="Processes that share every layer of the model, for prompts that one takes too "
        "long for: each computes some columns and heads, for the same requests. With ranks above "
        "1 not possible. Threads are shared among them; each has a copy of the KV pool.",
    )
    redundant_experts: int = Field(
        0,
        ge=0,
        le=4096,
        description="With engine.ranks: places a layer has beyond one for each expert, for second "
        "copies of busy ones. Places must divide evenly among the ranks.",
    )
    group_address: Annotated[str, Field(pattern=r"^([^,\s]+:[0-9]+)?$")] = Field(
        "",
        description="host:port at which the ranks of this worker (of tensor_parallel: from 1 on) "
        "meet it, for ranks on other hosts, each started there (`tandem serve rank`). Empty: they "
        "are started on this host.",
    )
    rank_silence_seconds: float = Field(
        20.0,
        ge=3,
        description="With engine.ranks or tensor_parallel: a rank that has said nothing for so "
        "long is lost, and the worker with it. One that lives says something every second.",
    )
    draft_tokens: int = Field(
        1,
        ge=0,
        le=8,
        description="Tokens drafted by multi-token prediction at most, where the model has a layer "
        "for it. 0: without that layer; then its KV is not in the blocks, so all workers of a "
        "model need it or none.",
    )
    adapters: Annotated[tuple[AdapterPath, ...], BeforeValidator(_split)] = Field(
        (),
        description="LoRA adapters loaded at the start, name=folder; folders are of PEFT's form, "
        "and relative to adapter_folder if that is set.",
    )
    adapter_folder: str = Field(
        "",
        description="Folder that adapters may be loaded from while the worker runs (`tandem "
        "adapters load`); nothing outside of it is read. Empty: none may be.",
    )
    max_adapters: int = Field(
        16, ge=0, description="LoRA adapters loaded at once, those that are leaving included."
    )
    max_adapter_rank: int = Field(64, ge=1, le=1024, description="Highest rank of an adapter.")
    adapter_memory_mib: int = Field(
        1024, ge=1, description="Memory of all adapters' weights together, MiB."
    )
    scripted_step_seconds: float = Field(
        0.0, ge=0, description="kind=scripted: how long a step takes."
    )
    scripted_draft_chance: float = Field(
        0.0,
        ge=0,
        le=1,
        description="kind=scripted: how probably a drafted token is right; 0: nothing is drafted.",
    )
    scripted_dp_ranks: int = Field(
        1,
        ge=1,
        le=1024,
        description="kind=scripted: data-parallel ranks that requests are booked on.",
    )
    scripted_experts: ExpertCounts = Field(
        "",
        description="kind=scripted: experts, as layers/logical/physical/groups/hosts/gpus; empty: "
        "none. Tokens are routed to them unevenly.",
    )


class KvSettings(_Section):
    """The KV hand-off."""

    transports: tuple[Literal["shm", "nixl", "ucx", "tcp"], ...] = Field(
        ("shm", "tcp"),
        min_length=1,
        description="Offered, best first: with RDMA, nixl before tcp. nixl and ucx need the "
        "package's extras of these names (pip install 'tandem-serving[nixl]').",
    )
    tcp_host: str = Field("", description="Address of the TCP data port; empty: server.host.")
    tcp_port: int = Field(0, ge=0, le=65535, description="TCP data port; 0 takes a free one.")
    lease_seconds: Patience = Field(
        30.0, description="A source keeps leased blocks this long after it last heard of them."
    )
    fetch_timeout_seconds: Patience = Field(
        300.0,
        description="A fetch that takes longer has failed. It counts from the request's start, so "
        "it has to cover the prompt's time in the prefill queue.",
    )
    stall_seconds: Patience = Field(
        15.0,
        description="A source that answers nothing, or takes longer for one read of at most 16 "
        "MiB, is given up.",
    )
    layers_per_piece: int = Field(
        8, ge=1, description="Layers that are offered, read and checked together."
    )
    recompute_max_tokens: int = Field(
        2048,
        ge=0,
        description="A decode worker whose fetch failed computes up to this many prompt tokens "
        "itself; beyond, the request is placed again.",
    )
    host_tier_mib: int = Field(
        0, ge=0, description="Host memory for KV blocks that the pool evicts, MiB; 0: none."
    )
    disk_tier_mib: int = Field(
        0,
        ge=0,
        description="Local disk for blocks that the pool, or the host tier, evicts, MiB; 0: none.",
    )
    disk_tier_folder: str = Field(
        "",
        description="Folder of the disk tier. Each worker takes a folder of its name in it, and "
        "finds its blocks there when it starts again. Workers on one disk need names of their own: "
        "without them they share their role's, and all but the first are refused with "
        "KV_TIER_UNUSABLE.",
    )
    prefix_fetch: bool = Field(
        True,
        description="A prompt's start is taken from another worker that holds it, where that is "
        "predicted to be faster than computing it.",
    )
    export_regions: tuple[Region, ...] = Field(
        (),
        description="Regions that KV blocks may go to besides worker.region. Empty: they stay in "
        "worker.region, or may go anywhere if that is empty too.",
    )
    tenant_regions: tuple[TenantRegions, ...] = Field(
        (),
        description="Regions that a tenant's KV blocks may go to, instead of what holds for all: "
        "tenant=region+region. Only these, and none if none is named.",
    )


class WeightsSettings(_Section):
    """Weights from running workers, and to them."""

    sources: Annotated[tuple[WeightsSource, ...], BeforeValidator(_split)] = Field(
        (),
        description="Where a model that is not here is fetched from at the start: host:port of "
        "workers that serve it, or workers: any that the coordinators know. Empty: nowhere.",
    )
    digest: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = Field(
        "",
        description="Digest of the folder to be fetched, as a fetch logs it; peers that have "
        "another are not asked. Empty: peers are believed, as long as they agree.",
    )
    wait_seconds: float = Field(
        60.0, ge=0, le=86_400, description="How long to wait for a worker that gives the model."
    )
    give: bool = Field(
        True, description="Give the model's files to other workers, from its folder here."
    )
    give_mib_s: float = Field(
        512.0,
        ge=0,
        description="MiB a second given at most, to all together, while requests run here; with "
        "none running there is no limit. 0: never any.",
    )
    tcp_port: int = Field(
        0, ge=0, le=65535, description="TCP port that weights are given on; 0 takes a free one."
    )


class WorkerSettings(_Section):
    """A worker's place in the cluster."""

    name: WorkerName = Field(
        "",
        description="Name in status and logs, and of its folder for the disk tier; empty: the "
        "role. Letters, digits and . _ : @ -, the first no dot.",
    )
    coordinator: Addresses = Field(
        ("127.0.0.1:7450",),
        description="host:port of each coordinator. With directory.etcd: of those to begin with, "
        "until etcd has answered; may be empty.",
    )
    region: str = Field(
        "",
        description="Label of the region, for placement and for where KV blocks may go. It is what "
        "a worker says of itself: nothing proves it.",
    )
    heartbeat_seconds: Seconds = Field(0.5, description="Between reports of load.")
    nvlink_domain: str = Field(
        "",
        description="Label of the NVLink domain that its GPUs are in: between workers with the "
        "same one KV goes over NVLink.",
    )
    cost: float = Field(
        0.0,
        ge=0,
        description="What it costs, in any unit that all workers share; 0: not told. Of workers "
        "that do equally well the cheaper one is taken.",
    )
    can_be: tuple[Literal["prefill", "decode", "both"], ...] = Field(
        (),
        description="Roles that the coordinator may change this worker's to while it runs; the one "
        "that it starts with is always allowed. Empty: it keeps that.",
    )
    role_min_seconds: Seconds = Field(
        60.0, description="A worker that has changed its role keeps it at least this long."
    )


class CoordinatorSettings(_Section):
    """Placement and membership."""

    lease_seconds: Seconds = Field(3.0, description="A worker not heard of for this long is gone.")
    worker_wait_seconds: float = Field(
        60.0,
        ge=0,
        description="When a model has lost its last decode worker, its requests wait this long for "
        "one to come back, and never beyond their deadlines, before they are refused. More than it "
        "takes to start a worker.",
    )
    queue_limit: int = Field(1024, ge=0, description="Requests that may wait for room.")
    queue_patience_seconds: Seconds = Field(
        30.0,
        description="Requests that waited this long have every other turn, whatever their priority "
        "and tenant.",
    )
    tenant_weights: tuple[TenantWeight, ...] = Field(
        (),
        description="Shares of tenants among those that wait, tenant=weight. Others have 1.",
    )
    ttft_seconds: float = Field(
        0.0,
        ge=0,
        description="Service level of requests that ask for none: one that can't have its first "
        "token in this time is refused at once. 0: none.",
    )
    itl_seconds: float = Field(
        0.0,
        ge=0,
        description="The same for the time between tokens: a request waits for a worker that is "
        "predicted to keep it. 0: none.",
    )
    region_round_trips: tuple[RoundTrip, ...] = Field(
        (),
        description="Round-trip times between regions, region=region=milliseconds. Others are "
        "taken for 60 ms apart.",
    )
    explain_decisions: int = Field(
        4096, ge=0, description="Decisions remembered for `tandem explain`."
    )
    local_prefill_tokens: int = Field(
        64,
        ge=0,
        description="Uncached prompts up to this long are computed on the decode worker.",
    )
    rebalance_seconds: float = Field(
        10.0,
        ge=0,
        description="A pool out of balance for this long has a worker change its role, if one may "
        "(worker.can_be); 0: never.",
    )
    expert_plan_seconds: float = Field(
        60.0,
        ge=0,
        description="Least time between two looks at where a worker's experts are; 0: they are "
        "left where they are.",
    )
    expert_tokens_each: float = Field(
        1000.0,
        gt=0,
        description="Tokens that experts must have had, on average, for their load to be believed.",
    )
    expert_share: float = Field(
        0.25,
        gt=0,
        le=1,
        description="Part of a step that grows with the load of the GPU with the busiest experts.",
    )


class FrontendSettings(_Section):
    """The public API."""

    coordinator: Addresses = Field(
        ("127.0.0.1:7450",), description="host:port of each coordinator, as worker.coordinator."
    )
    max_attempts: int = Field(
        5, ge=1, description="Placements of one request, workers dying, before it fails."
    )
    default_timeout_seconds: Seconds = Field(
        600.0, description="Deadline of a request whose client gave none."
    )
    silence_seconds: Patience = Field(
        2.0,
        description="A worker that owes something and answers nothing, pings included, for this "
        "long is lost for the request. One that answers and brings no token has 10 times what it "
        "took so far, and at least 2.5 times this.",
    )
    stall_seconds: Seconds = Field(
        30.0,
        description="What a worker has at most that answers and brings no token, beside the time "
        "that its prompt may take.",
    )
    default_max_tokens: int = Field(256, ge=1, description="max_tokens where the client gave none.")
    max_messages: int = Field(4096, ge=1, description="Longest conversation taken, in messages.")
    max_tools: int = Field(128, ge=1, description="Most functions taken with a conversation.")
    tools_bytes: int = Field(
        262_144, ge=1, description="Of these, most bytes of schemas and descriptions together."
    )
    max_choices: int = Field(
        128, ge=1, le=1024, description="Most answers to one request: n, times its prompts."
    )
    characters_per_token: int = Field(
        32,
        ge=1,
        description="Text with more characters than this for each token of the context window is "
        "refused before it is tokenized.",
    )
    answer_format: AnswerFormatName = Field(
        "auto",
        description="How the model writes calls of functions; auto: as its chat template does. "
        "plain: it has no functions. hermes also tells those of functions whose template has none.",
    )
    template_seconds: Seconds = Field(
        2.0, description="CPU time that rendering a conversation by the chat template may take."
    )
    guide_bytes: int = Field(
        65_536, ge=1, le=2**18, description="Longest guide (a JSON schema, say) taken."
    )
    guide_seconds: Seconds = Field(
        2.0, description="What compiling a guide may take before the request is refused."
    )
    region: str = Field("", description="Label of the region that this frontend is in.")
    tenant_metadata: MetadataName = Field(
        "",
        description="Request metadata by which a trusted proxy names the tenant, whose KV is then "
        "shared with nobody else's; requests without it are refused. Empty: all requests are of "
        "one nameless tenant.",
    )
    tenant_regions: tuple[ResidencyRule, ...] = Field(
        (),
        description="Regions that a tenant's requests may be computed in: tenant=region+region. "
        "Others anywhere.",
    )


class DirectorySettings(_Section):
    """Where processes find each other."""

    etcd: Addresses = Field(
        (),
        description="host:port of each member of an etcd cluster, in which coordinators, workers "
        "and frontends list themselves under leases. Empty: coordinators are those that "
        "worker.coordinator and frontend.coordinator name.",
    )
    cluster: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=128)] = Field(
        "default", description="Name of the cluster in etcd, where its keys are /tandem/NAME/..."
    )
    lease_seconds: int = Field(
        10,
        ge=2,
        le=3600,
        description="A process not heard of by etcd for this long is off the list.",
    )


class RankSettings(_Section):
    """A rank of a worker of several processes (engine.ranks), started by hand."""

    group: Annotated[str, Field(pattern=r"^([^,\s]+:[0-9]+)?$")] = Field(
        "", description="host:port of the worker, as its engine.group_address says."
    )
    number: int = Field(0, ge=0, le=1023, description="Which rank, from 0.")
    name: WorkerName = Field("", description="Name in logs; empty: rank-NUMBER.")


class CoordinatorProcess(_Section):
    """Everything `tandem serve coordinator` reads."""

    server: ServerSettings = ServerSettings(port=7450)
    log: LogSettings = LogSettings()
    directory: DirectorySettings = DirectorySettings()
    coordinator: CoordinatorSettings = CoordinatorSettings()


class FrontendProcess(_Section):
    """Everything `tandem serve frontend` reads."""

    server: ServerSettings = ServerSettings(port=7400)
    log: LogSettings = LogSettings()
    directory: DirectorySettings = DirectorySettings()
    model: ModelSettings = ModelSettings()
    frontend: FrontendSettings = FrontendSettings()


class RankProcess(_Section):
    """Everything that `tandem serve rank` reads; the rest it is told by the worker."""

    server: ServerSettings = ServerSettings()
    log: LogSettings = LogSettings()
    rank: RankSettings = RankSettings()


class WorkerProcess(_Section):
    """Everything that `tandem serve prefill`, `decode` and `both` read."""

    server: ServerSettings = ServerSettings()
    log: LogSettings = LogSettings()
    directory: DirectorySettings = DirectorySettings()
    model: ModelSettings = ModelSettings()
    worker: WorkerSettings = WorkerSettings()
    engine: EngineSettings = EngineSettings()
    kv: KvSettings = KvSettings()
    weights: WeightsSettings = WeightsSettings()
