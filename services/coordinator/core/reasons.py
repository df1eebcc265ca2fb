"""What a decision says of itself, and what two workers may do with each other's KV."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from services.coordinator.core.candidates import barred, full, may_send
from services.coordinator.core.membership import Worker
from services.coordinator.core.messages import Holder, PlaceRequest
from services.coordinator.core.pools import Pool
from services.coordinator.core.scoring import Candidate


def is_source_for(source: Worker, sink: Worker, want: PlaceRequest) -> bool:
    """Whether KV computed there is as good here, and may come."""
    if source.worker_id in want.exclude_workers or source.info.numerics != sink.info.numerics:
        return False
    if want.allowed_regions and source.info.region not in want.allowed_regions:
        return False
    return may_send(source, sink, want)


def why_not(worker: Worker, want: PlaceRequest) -> str:
    """Why a worker can't have a request now; "" if it can."""
    return barred(worker, want) or full(worker, want) or worker.avoided


def why_alone(decode: Candidate, pool: Pool, want: PlaceRequest, limit: int) -> str:
    """Why the decode worker has to compute the prompt itself; "" if it need not.

    `limit`: uncached tokens up to which it does so in any case.
    """
    uncached = decode.uncached_tokens
    if uncached <= limit:
        return f"{uncached} uncached tokens <= {limit}"
    others = (w for w in pool.prefill.up.values() if w is not decode.worker)
    usable = (w for w in others if not barred(w, want))
    first = next(usable, None)
    if first is None:
        return "no prefill worker is up" + (f" with {want.adapter}" if want.adapter else "")
    if any(may_send(w, decode.worker, want) for w in chain((first,), usable)):
        return ""
    return "no prefill worker may send KV to its region"


def remarks(pool: Pool, want: PlaceRequest) -> Iterator[str]:
    """What about the request itself shaped the choice."""
    for name in sorted(want.exclude_workers):
        if name in pool.prefill.present or name in pool.decode.present:
            yield f"not {name}: it failed this request"
    if want.kv_layout and want.kv_layout != pool.kv_layout:
        yield "the KV layout asked for has no workers with room: another one, nothing cached"


def about_decode(chosen: Candidate) -> str:
    """Of the decode worker."""
    info, load = chosen.worker.info, chosen.worker.load
    words = (
        f"{info.worker_id}: {chosen.cached_tokens} of {chosen.context_tokens} prompt tokens "
        f"cached, {load.requests} of {info.max_running} requests, "
        f"{load.free_blocks} of {info.total_blocks} blocks free"
    )
    if info.dp_ranks > 1:
        words += f", rank {chosen.rank}"
    if chosen.worker.avoided:
        words += f"; nobody else has room ({chosen.worker.avoided})"
    return words


def about_prefill(chosen: Candidate, decode: Candidate) -> Iterator[str]:
    """Of the prefill worker."""
    info, other = chosen.worker.info, decode.worker.info
    yield (
        f"{info.worker_id}: {chosen.cached_tokens} of {chosen.context_tokens} prompt tokens "
        f"cached, {chosen.worker.load.queued_tokens} queued"
    )
    if info.numerics != other.numerics:
        yield (
            f"{info.worker_id} and {other.worker_id} compute different bits: no prefill worker "
            "with equal numerics has room"
        )


def about_prefix(prefix: Holder, runner: Candidate) -> str:
    """Of the worker that holds more than the one that computes."""
    return (
        f"{prefix.worker_id} holds {prefix.tokens} of {runner.context_tokens} prompt tokens: "
        f"{runner.worker.worker_id} may fetch them"
    )
