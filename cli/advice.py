"""What a person can do about each error; shown by the command and printed into docs/errors.md."""

from __future__ import annotations

from services.runtime.client import CallFailedError

ADVICE = {
    "INVALID_REQUEST": "Change the field that the message names; it says what is allowed.",
    "UNKNOWN_MODEL": "Ask for a model that is served: `tandem status`, or ListModels, names them.",
    "UNKNOWN_ADAPTER": "Ask for one that the message names, or load it: `tandem adapters load`.",
    "ADAPTER_NOT_LOADED": "Nothing: the request is placed again.",
    "ADAPTER_FAILED": "Ask without the adapter, and have who trained it look at its weights: they "
    "take the model beyond what numbers can hold.",
    "ADAPTER_LIMIT": "Unload another adapter (`tandem adapters unload`), or raise the setting that "
    "the message names.",
    "UNSUPPORTED_ADAPTER": "The message names the file and key; docs/models.md says which LoRA "
    "adapters can be served.",
    "DUPLICATE_REQUEST": "Give every request its own request_id, or none.",
    "NO_WORKERS": "Start a worker of the role that is named, or wait until it is back. Then retry.",
    "COORDINATOR_UNAVAILABLE": "Check that the coordinator runs where frontend.coordinator and "
    "worker.coordinator say. Then retry.",
    "WORKER_LOST": "Retry. It is seen only when a request lost workers more often than "
    "frontend.max_attempts allows: their logs say why they died.",
    "WORKER_SILENT": "Retry. It is seen only when that befell a request more often than "
    "frontend.max_attempts allows: workers are starved or hang. If they are only slow, raise "
    "frontend.silence_seconds.",
    "KV_SOURCE_LOST": "Retry. If it comes back, look for a prefill worker that dies, or raise "
    "kv.fetch_timeout_seconds or kv.lease_seconds.",
    "DRAINING": "Retry: another process takes the request.",
    "ROLE_CHANGED": "Nothing: the request is placed again.",
    "ENGINE_FAILED": "Retry. The worker's log has the cause.",
    "OVERLOADED": "Wait as long as RetryInfo says and retry, send less, or add workers "
    "(coordinator.queue_limit is how many may wait).",
    "SLO_UNATTAINABLE": "Wait as long as RetryInfo says and retry, ask for less, or add workers: "
    "the message says what was predicted.",
    "ENGINE_OVERLOADED": "Retry later, or give the workers more room: engine.kv_memory_mib, "
    "engine.max_running, engine.max_waiting.",
    "GUIDE_FAILED": "Make the guide simpler; the message says where it could not be followed. A "
    "grammar with rules that never end, or that reads one text in many ways, does this.",
    "DEADLINE": "Allow more time, or ask for fewer tokens.",
    "CANCELLED": "Nothing: the client wanted it.",
    "OUT_OF_BLOCKS": "Give the worker more KV memory: engine.kv_memory_mib or engine.kv_blocks.",
    "LEASE_LOST": "Nothing: the request is placed again. Raise kv.lease_seconds if it is frequent.",
    "BLOCKS_NOT_HELD": "Nothing: the sink computes or fetches the blocks elsewhere.",
    "KV_TOO_MANY_FETCHES": "Add prefill workers, or blocks to their pools: so many fetches are "
    "served at once that the source can't keep books of more.",
    "KV_WRONG_TENANT": "Nothing, if tenants are kept apart as they should be: the prompt is "
    "computed. Otherwise a worker passes the wrong tenant on.",
    "KV_REGION_DENIED": "Nothing: the prompt is computed, or the request placed again. To let "
    "blocks go there, change kv.export_regions or kv.tenant_regions of the source, or the sink's "
    "worker.region.",
    "INVALID_FETCH": "A bug of the sink; please report it with the message.",
    "LAYOUT_MISMATCH": "Start all workers of a model with the same model, engine.kv_dtype and "
    "engine.block_tokens; the message names what differs.",
    "NO_TRANSPORT": "Give both sides a transport in common: kv.transports, kv.tcp_host.",
    "TRANSPORT_FAILED": "Nothing: the request is placed again. Look at the network between the "
    "workers if it is frequent.",
    "TRANSPORT_UNUSABLE": "Check what the message says is missing, or take the transport out of "
    "kv.transports.",
    "CORRUPT_BLOCK": "Nothing: the block was not used and is computed again. If it is frequent, "
    "suspect memory or network.",
    "KV_TIER_UNUSABLE": "Give the worker a folder of its own with room for kv.disk_tier_mib, or "
    "turn the disk tier off (0).",
    "WEIGHTS_NOT_GIVEN": "Name workers in weights.sources that serve this model and give it "
    "(weights.give).",
    "WEIGHTS_DIFFER": "Say which of the digests named is meant (weights.digest), or move away what "
    "is here under the model's name.",
    "WEIGHTS_INVALID": "A bug of the peer that is named, or no peer of ours; please report it.",
    "WEIGHTS_LOST": "The message says of each worker what is wrong with it. Start again when one "
    "gives the model: what has come is kept.",
    "KV_ERROR": "Update both sides: one reported an error that the other does not know.",
    "MODEL_NOT_FOUND": "`tandem models fetch` brings the models it knows; for another one set "
    "model.path.",
    "MODEL_FILE": "Fetch or copy the model again. If it is whole, Tandem can't serve its kind: the "
    "message says what it lacks.",
    "MODEL_FETCH": "Check that pip can reach its index, or fetch the model elsewhere and set "
    "model.path.",
    "MODEL_SPACE": "Free disk space, or set XDG_CACHE_HOME to a folder on another disk.",
    "UNSUPPORTED_MODEL": "The message names the key; docs/engine.md says what the embedded engine "
    "computes.",
    "NOT_BATCH_INVARIANT": "Set engine.batch_invariant=false, and do without exact resumption.",
    "INTERNAL": "A bug. The log of the process that answered has more under the incident id; "
    "please report both.",
}


def explain(error: CallFailedError) -> str:
    """A failed call in words for the terminal."""
    if error.unreachable:
        why = error.message.rpartition(": ")[2]  # gRPC says where and how at length
        return (
            f"no server at {error.address} ({why}); start a cluster with `tandem up`, or say "
            "where it is"
        )
    name = error.reason or error.code
    advice = ADVICE.get(error.reason, "")
    return f"{error.message} ({name})" + (f"\n{advice}" if advice else "")
