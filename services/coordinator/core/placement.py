"""Where one request goes: filter, score, pick; and why, in words.

The decode worker is chosen first: it is the one that has to hold the request for long. Then, unless
little of the prompt is missing there, a prefill worker of the same pool (model and KV layout), with
equal numerics if there is one with room, since only then a resumed stream is exact, and whose rules
let KV go to the decode worker's region. Whoever computes the prompt is told of the worker that
holds most of it, if that is another one; whether to fetch it from there is its own decision.

Nothing here changes anything; see core.py for what a placement books.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from services.coordinator.core.index import PrefixIndex
from services.coordinator.core.membership import Worker
from services.coordinator.core.messages import Holder, PlaceRequest, Reason, Refusal, Role
from services.coordinator.core.pools import Pool, Side
from services.coordinator.core.scoring import (
    DECODE,
    NOMINAL_TOKENS_PER_SECOND,
    PREFILL,
    Candidate,
    closeness,
    pick,
)

SHORTLIST = 8
"""Least loaded workers, and as many holders of the prefix at most, that a decision looks at."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Chosen workers. `prefill` None: decode computes the prompt."""

    decode: Candidate
    prefill: Candidate | None
    reasons: tuple[str, ...]
    prefix: Holder | None = None
    """Who holds more of the prompt than the worker that computes it."""


@dataclass(frozen=True, slots=True)
class Blocked:
    """There are workers for the request, but none has room now."""

    why: str
    everyone: bool
    """So it would be for any request for this model."""


class Placer:
    """Decides. `draw` gives numbers in [0, 1)."""

    def __init__(
        self, index: PrefixIndex, local_prefill_tokens: int, draw: Callable[[], float]
    ) -> None:
        self._index = index
        self._local_prefill_tokens = local_prefill_tokens
        self._draw = draw

    def decide(self, want: PlaceRequest, pools: Sequence[Pool]) -> Decision | Blocked | Refusal:
        """Places a request in the first pool that has room for it.

        `pools` are those of the request's model, best first; at least one.
        """
        blocked = Blocked(f"no decode worker of {want.model} has room", everyone=True)
        if not any(len(pool.decode.roomy) for pool in pools):
            return refusal(want, pools) or blocked
        everyone = True
        for pool in pools:
            outcome = self._decide_in(pool, want)
            if isinstance(outcome, Decision):
                return outcome
            blocked = outcome
            everyone = everyone and outcome.everyone
        return refusal(want, pools) or Blocked(blocked.why, everyone)

    def _decide_in(self, pool: Pool, want: PlaceRequest) -> Decision | Blocked:
        candidates = self._candidates(pool, Role.DECODE, want)
        if not candidates:
            why = f"no decode worker of {want.model} has room for {want.context_tokens} tokens"
            return Blocked(why, everyone=not len(pool.decode.roomy))
        decode = pick(candidates, DECODE, self._draw)
        reasons = (*_remarks(pool, want), _about_decode(decode))
        alone = self._why_alone(decode, pool, want)
        if alone:
            why = f"computed on {decode.worker.worker_id}: {alone}"
            return self._decision(decode, None, (*reasons, why), pool, want)
        prefill = self._prefill_for(decode, pool, want)
        if prefill is None:
            # Short prompts can still be placed: not for everyone.
            return Blocked(f"no prefill worker of {want.model} has room", everyone=False)
        reasons = (*reasons, *_about_prefill(prefill, decode))
        return self._decision(decode, prefill, reasons, pool, want)

    def _why_alone(self, decode: Candidate, pool: Pool, want: PlaceRequest) -> str:
        """Why the decode worker computes the prompt itself; "" if a prefill worker does."""
        uncached, limit = decode.uncached_tokens, self._local_prefill_tokens
        if uncached <= limit:
            return f"{uncached} uncached tokens <= {limit}"
        usable = (w for w in pool.prefill.up.values() if _usable(w, want))
        if any(_may_send(w, decode.worker, want) for w in usable):
            return ""
        if any(_usable(w, want) for w in pool.prefill.up.values()):
            return "no prefill worker may send KV to its region"
        return "no prefill worker is up"

    def _decision(
        self,
        decode: Candidate,
        prefill: Candidate | None,
        reasons: tuple[str, ...],
        pool: Pool,
        want: PlaceRequest,
    ) -> Decision:
        runner = prefill or decode
        prefix = self._prefix_for(runner, pool, want)
        if prefix is not None:
            reasons = (*reasons, _about_prefix(prefix, runner))
        return Decision(decode, prefill, reasons, prefix)

    def _prefix_for(self, runner: Candidate, pool: Pool, want: PlaceRequest) -> Holder | None:
        """Of the workers that hold most of the prompt, a near one whose KV is of use."""
        worker, block_tokens = runner.worker, runner.worker.info.block_tokens
        # The last token is computed in any case.
        most = (want.context_tokens - 1) // block_tokens * block_tokens
        among = pool.holders & ~worker.bit
        for keys, workers in self._index.reach(want.block_keys, among):
            tokens = min(keys * block_tokens, most)
            if tokens <= runner.cached_tokens:
                break
            names = islice(self._from_anywhere(workers), SHORTLIST)
            found = [pool.holder(name) for name in names]
            holders = [w for w in found if _is_source_for(w, worker, want)]
            if holders:
                near = max(holders, key=lambda w: closeness(w.info, worker.info)).info
                return Holder(near.worker_id, near.address, tokens)
        return None

    def _from_anywhere(self, workers: int) -> Iterator[str]:
        """A set's workers, from a drawn one on: what all ask for is not asked of one alone."""
        cut = int(self._draw() * workers.bit_length())
        rest = workers >> cut << cut
        return chain(self._index.names(rest), self._index.names(workers ^ rest))

    def _prefill_for(self, decode: Candidate, pool: Pool, want: PlaceRequest) -> Candidate | None:
        numerics = decode.worker.info.numerics

        def candidates(*, whole: bool) -> list[Candidate]:
            some = self._candidates(pool, Role.PREFILL, want, beside=decode.worker, whole=whole)
            return [c for c in some if _may_send(c.worker, decode.worker, want)]

        found = candidates(whole=False)
        equal = [c for c in found if c.worker.info.numerics == numerics]
        if not found or (numerics and not equal):
            found = candidates(whole=True)
            equal = [c for c in found if c.worker.info.numerics == numerics]
        choice = equal if numerics and equal else found
        return pick(choice, PREFILL, self._draw) if choice else None

    def _candidates(
        self,
        pool: Pool,
        role: Role,
        want: PlaceRequest,
        *,
        beside: Worker | None = None,
        whole: bool = False,
    ) -> list[Candidate]:
        """Workers with room for the request: of the shortlist if it has any, else of the pool."""
        side = pool.side(role)
        workers = {} if whole else self._shortlist(side, want)
        if not workers:
            workers = {w.worker_id: w for w in side.roomy if _has_room(w, want)}
        cached = self._cached_keys(want, workers)
        rates = [w.load.stats.prefill_tokens_per_second for w in workers.values()]
        rates = [rate for rate in rates if rate > 0]
        usual = sum(rates) / len(rates) if rates else NOMINAL_TOKENS_PER_SECOND
        return [
            Candidate(
                worker=w,
                context_tokens=want.context_tokens,
                cached_tokens=min(
                    want.context_tokens, cached.get(w.worker_id, 0) * w.info.block_tokens
                ),
                blocks=w.info.blocks_for(want.context_tokens + 1),
                tokens_per_second=w.load.stats.prefill_tokens_per_second or usual,
                beside=beside,
            )
            for w in workers.values()
        ]

    def _shortlist(self, side: Side, want: PlaceRequest) -> dict[str, Worker]:
        """Those who hold most of the prefix, and the least loaded."""
        holders = (side.up[name] for name in self._holders(want, side.bits))
        leading = islice((w for w in holders if _has_room(w, want)), SHORTLIST)
        idlest = (w for w in islice(side.roomy, SHORTLIST) if _has_room(w, want))
        return {w.worker_id: w for some in (leading, idlest) for w in some}

    def _holders(self, want: PlaceRequest, among: int) -> Iterator[str]:
        """Workers of a set that hold some of the prefix, those that hold most of it first."""
        for keys, workers in self._index.reach(want.block_keys, among):
            if keys == 0:
                return
            yield from self._index.names(workers)

    def _cached_keys(self, want: PlaceRequest, workers: dict[str, Worker]) -> dict[str, int]:
        among = 0
        for worker in workers.values():
            among |= worker.bit
        return {
            name: keys
            for keys, some in self._index.reach(want.block_keys, among)
            if keys
            for name in self._index.names(some)
        }


def refusal(want: PlaceRequest, pools: Sequence[Pool]) -> Refusal | None:
    """Why a request can't be placed, however long it waits; None if it could.

    `pools` are those of the request's model; at least one.
    """
    if any(_usable(w, want) for pool in pools for w in pool.decode.present.values()):
        return None
    present = [w for pool in pools for w in pool.decode.present.values()]
    left = [w for w in present if w.worker_id not in want.exclude_workers]
    if left:
        most = max(w.capacity for w in left) - 1
        return Refusal(
            Reason.INVALID_REQUEST,
            f"context_tokens: {want.context_tokens} is more than any decode worker of "
            f"{want.model} can hold and add a token to",
            metadata={
                "field": "context_tokens",
                "value": str(want.context_tokens),
                "allowed": f"at most {most}",
            },
        )
    words = f"no decode worker of {want.model} is up"
    if present:
        words += f" but the {len(present)} that failed this request"
    return Refusal(Reason.NO_WORKERS, words, metadata={"role": "decode", "model": want.model})


def _usable(worker: Worker, want: PlaceRequest) -> bool:
    """Whether the worker could take the request if it had room."""
    if worker.info.worker_id in want.exclude_workers:
        return False
    return want.context_tokens < worker.capacity


def _has_room(worker: Worker, want: PlaceRequest) -> bool:
    if not _usable(worker, want):
        return False
    return worker.load.fits(worker.info.blocks_for(want.context_tokens + 1))


def _may_send(source: Worker, sink: Worker, want: PlaceRequest) -> bool:
    return source.info.may_send_to(sink.info, want.tenant)


def _is_source_for(source: Worker, sink: Worker, want: PlaceRequest) -> bool:
    """Whether KV computed there is as good here, and may come."""
    if source.worker_id in want.exclude_workers or source.info.numerics != sink.info.numerics:
        return False
    return _may_send(source, sink, want)


def _remarks(pool: Pool, want: PlaceRequest) -> Iterator[str]:
    """What about the request itself shaped the choice."""
    for name in sorted(want.exclude_workers):
        if name in pool.prefill.present or name in pool.decode.present:
            yield f"not {name}: it failed this request"
    if want.kv_layout and want.kv_layout != pool.kv_layout:
        yield "the KV layout asked for has no workers with room: another one, nothing cached"


def _about_decode(chosen: Candidate) -> str:
    info, load = chosen.worker.info, chosen.worker.load
    return (
        f"{info.worker_id}: {chosen.cached_tokens} of {chosen.context_tokens} prompt tokens "
        f"cached, {load.requests} of {info.max_running} requests, "
        f"{load.free_blocks} of {info.total_blocks} blocks free"
    )


def _about_prefill(chosen: Candidate, decode: Candidate) -> Iterator[str]:
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


def _about_prefix(prefix: Holder, runner: Candidate) -> str:
    return (
        f"{prefix.worker_id} holds {prefix.tokens} of {runner.context_tokens} prompt tokens: "
        f"{runner.worker.worker_id} may fetch them"
    )
