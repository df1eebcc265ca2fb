"""Where one request goes: filter, score, pick; and why, in words.

The decode worker is chosen first: it is the one that has to hold the request for long. Then, unless
it had better compute the prompt itself, a prefill worker of the same pool (model and KV layout),
with equal numerics if there is one with room, since only then a resumed stream is exact, and whose
rules let KV go to the decode worker's region. Whoever computes the prompt is told of the worker
that holds most of it, if that is another one; whether to fetch it from there is its own decision.

A request whose service level or deadline can't be met even if all goes well is refused at once.

Nothing here changes anything; see core.py for what a placement books.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

from services.coordinator.core import reasons
from services.coordinator.core.candidates import (
    SHORTLIST,
    Field,
    View,
    barred,
    find,
    has_adapter,
)
from services.coordinator.core.explain import CONSIDERED, Considered
from services.coordinator.core.membership import Worker
from services.coordinator.core.messages import Holder, PlaceRequest, Reason, Refusal, Role
from services.coordinator.core.outlook import foresee_prompt, foresee_tokens, least
from services.coordinator.core.paths import route
from services.coordinator.core.pools import Pool
from services.coordinator.core.predict import MAX_RETRY_SECONDS, unattainable
from services.coordinator.core.ranks import NOMINAL_STEP
from services.coordinator.core.scoring import (
    DECODE,
    NEAR,
    PREFILL,
    Candidate,
    Weights,
    pick,
    score,
)

REMEMBERED = 4
"""Workers of a role with room that are remembered of a decision, the best ones."""

_NAMES = {
    Role.DECODE: tuple(scorer.__name__ for scorer, _ in DECODE),
    Role.PREFILL: tuple(scorer.__name__ for scorer, _ in PREFILL),
}

ADAPTERS_NAMED = 20
"""Of those that there are, in the refusal of one that there is not."""

LOCAL_GAIN_SECONDS = 0.05
"""A prompt that is longer than `local_prefill_tokens` is computed on the decode worker only if that
is predicted to save this much: it holds up the requests that run there."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request has left when it is decided on; None: no limit. Seconds from now."""

    ttft: float | None = None
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """Chosen workers. `prefill` None: decode computes the prompt."""

    decode: Candidate
    prefill: Candidate | None
    reasons: tuple[str, ...]
    prefix: Holder | None = None
    """Who holds more of the prompt than the worker that computes it."""
    considered: tuple[Considered, ...] = ()
    ttft_seconds: float = 0.0
    itl_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Blocked:
    """There are workers for the request, but none has room now."""

    why: str
    everyone: bool
    """So it would be for any request for this model."""


Outcome = Decision | Blocked | Refusal


@dataclass(slots=True)
class _Try:
    """One decision in one pool."""

    pool: Pool
    want: PlaceRequest
    limits: Limits
    out: list[Considered] = field(default_factory=list)


class Placer:
    """Decides. `draw` gives numbers in [0, 1)."""

    def __init__(self, view: View, local_prefill_tokens: int, draw: Callable[[], float]) -> None:
        self._view = view
        self._local_prefill_tokens = local_prefill_tokens
        self._draw = draw

    def decide(self, want: PlaceRequest, pools: Sequence[Pool], limits: Limits) -> Outcome:
        """Places a request in the first pool that has room for it.

        `pools` are those of the request's model, best first; at least one.
        """
        blocked = Blocked(f"no decode worker of {want.model} has room", everyone=True)
        if not any(len(pool.decode.roomy) for pool in pools):
            return refusal(want, pools) or blocked
        everyone, refused = True, []
        for pool in pools:
            outcome = self._decide_in(_Try(pool, want, limits))
            if isinstance(outcome, Decision):
                return outcome
            if isinstance(outcome, Refusal):
                refused.append(outcome)
                everyone = False
                continue
            blocked = outcome
            everyone = everyone and outcome.everyone
        if len(refused) == len(pools):
            return refused[0]
        return refusal(want, pools) or Blocked(blocked.why, everyone)

    def rejected(self, want: PlaceRequest, pools: Sequence[Pool]) -> tuple[Considered, ...]:
        """Some workers that a request can't have now, and why; for its explanation."""
        sides = ((p.side(role), role) for p in pools for role in (Role.DECODE, Role.PREFILL))
        return tuple(
            Considered(worker.worker_id, role, rejected=why)
            for side, role in sides
            for worker in islice(side.present.values(), CONSIDERED)
            if (why := reasons.why_not(worker, want))
        )

    # Decode

    def _decide_in(self, one: _Try) -> Outcome:
        pool, want = one.pool, one.want
        found = find(self._view, pool.decode, Role.DECODE, want)
        one.out += found.out
        if not found.candidates:
            why = f"no decode worker of {want.model} has room for {want.context_tokens} tokens"
            return Blocked(why, everyone=not len(pool.decode.roomy))
        for candidate in found.candidates:
            self._foresee_decode(candidate)
        quick = self._quick_enough(one, found)
        if not quick:
            best = least(self._view.predictor, pool, 1)
            refused = unattainable(best, 0.0, want.itl_seconds, None, MAX_RETRY_SECONDS)
            if refused is not None:
                return refused
            # A worker without any load won't get faster: nothing better is to be waited for.
            quick = [c for c in found.candidates if not c.worker.load.requests]
        if not quick:
            limit = want.itl_seconds * 1e3
            why = f"no decode worker of {want.model} is predicted to keep {limit:g} ms a token"
            return Blocked(why, everyone=False)
        decode, seen = self._best(quick, DECODE, Role.DECODE)
        foresee_prompt(self._view.predictor, decode)
        return self._prompt_for(one, decode, seen)

    def _foresee_decode(self, candidate: Candidate) -> None:
        worker = candidate.worker
        cost = self._view.predictor.step_cost(worker.worker_id) or NOMINAL_STEP
        candidate.rank = worker.load.choose_rank(candidate.blocks, cost) or 0
        foresee_tokens(self._view.predictor, candidate)

    def _quick_enough(self, one: _Try, found: Field) -> list[Candidate]:
        limit = one.want.itl_seconds
        if not limit:
            return found.candidates
        quick = []
        for candidate in found.candidates:
            if candidate.itl_seconds <= limit:
                quick.append(candidate)
            else:
                why = f"{candidate.itl_seconds * 1e3:.0f} ms between tokens predicted"
                name = candidate.worker.worker_id
                one.out.append(Considered(name, Role.DECODE, rejected=why))
        return quick

    # The prompt

    def _prompt_for(
        self, one: _Try, decode: Candidate, seen: tuple[Considered, ...]
    ) -> Decision | Blocked | Refusal:
        why = reasons.why_alone(decode, one.pool, one.want, self._local_prefill_tokens)
        prefill = None if why else self._prefill_for(one, decode)
        if not why and prefill is None and not decode.worker.load.requests:
            why = "no prefill worker has room, and it is idle"
        if not why and prefill is None:
            # Short prompts can still be placed: not for everyone.
            return Blocked(f"no prefill worker of {one.want.model} has room", everyone=False)
        if prefill is not None and (saved := self._saved_alone(decode, prefill[0])):
            why = f"{saved:.2f} s sooner than on {prefill[0].worker.worker_id}, as predicted"
            prefill = None
        words = [*reasons.remarks(one.pool, one.want), reasons.about_decode(decode)]
        if prefill is None:
            words.append(f"computed on {decode.worker.worker_id}: {why}")
            return self._decision(one, decode, None, words, seen)
        words += reasons.about_prefill(prefill[0], decode)
        return self._decision(one, decode, prefill[0], words, (*seen, *prefill[1]))

    def _saved_alone(self, decode: Candidate, prefill: Candidate) -> float:
        """Seconds that computing the prompt on the decode worker is predicted to save, if any.

        A prompt's steps are long, and every request in the batch waits for each of them: so its
        time counts once more for a full batch.
        """
        if not (decode.known_seconds and prefill.known_seconds):
            return 0.0
        load = decode.worker.load
        alone = decode.prompt_seconds * (1 + min(1.0, load.requests / load.limit))
        saved = prefill.prompt_seconds + prefill.transfer_seconds - alone
        return saved if saved > LOCAL_GAIN_SECONDS else 0.0

    def _prefill_for(
        self, one: _Try, decode: Candidate
    ) -> tuple[Candidate, tuple[Considered, ...]] | None:
        numerics = decode.worker.info.numerics

        def candidates(*, whole: bool) -> list[Candidate]:
            found = find(
                self._view, one.pool.prefill, Role.PREFILL, one.want, decode.worker, whole=whole
            )
            one.out += () if whole else found.out
            return found.candidates

        some = candidates(whole=False)
        equal = [c for c in some if c.worker.info.numerics == numerics]
        if numerics and not equal and numerics in one.pool.prefill.numerics:
            # It may be busy, and still be worth waiting behind: none of the shortlist's is as good.
            some = candidates(whole=True)
            equal = [c for c in some if c.worker.info.numerics == numerics]
        choice = equal if numerics and equal else some
        if not choice:
            return None
        for candidate in choice:
            candidate.rank = candidate.worker.load.prompt_rank(candidate.blocks) or 0
            foresee_prompt(self._view.predictor, candidate)
        return self._best(choice, PREFILL, Role.PREFILL)

    def _best(
        self, candidates: Sequence[Candidate], weights: Weights, role: Role
    ) -> tuple[Candidate, tuple[Considered, ...]]:
        """The one picked, and the best of those it was picked from."""
        parts = [score(c, weights) for c in candidates]
        scored = [(sum(adds), c) for adds, c in zip(parts, candidates, strict=True)]
        best = pick(scored, self._draw)[1]
        order = sorted(
            zip(scored, parts, strict=True), key=lambda one: (one[0][1] is not best, -one[0][0])
        )
        names = _NAMES[role]
        seen = tuple(
            Considered(
                c.worker.info.worker_id,
                role,
                c is best,
                "",
                total,
                tuple(zip(names, adds, strict=True)),
                c.cached_tokens,
                c.prompt_seconds,
                c.rank,
            )
            for (total, c), adds in order[:REMEMBERED]
        )
        return best, seen

    # The answer

    def _decision(
        self,
        one: _Try,
        decode: Candidate,
        prefill: Candidate | None,
        words: list[str],
        seen: tuple[Considered, ...],
    ) -> Decision | Refusal:
        runner = prefill or decode
        prefix = self._prefix_for(one, runner)
        refused = self._too_late(one, runner, prefix)
        if refused is not None:
            return refused
        if prefix is not None:
            words.append(reasons.about_prefix(prefix, runner))
        chosen = {c.worker.worker_id for c in (decode, prefill) if c is not None}
        out = tuple(c for c in one.out if c.worker_id not in chosen)
        return Decision(
            decode,
            prefill,
            tuple(words),
            prefix,
            (*seen, *out[: 2 * CONSIDERED]),
            runner.known_seconds,
            decode.itl_seconds,
        )

    def _too_late(self, one: _Try, runner: Candidate, prefix: Holder | None) -> Refusal | None:
        """A refusal if the first token would come after it is of use, even if all goes well."""
        limits, want = one.limits, one.want
        if limits.ttft is None and limits.deadline is None:
            return None
        cached = max(runner.cached_tokens, prefix.tokens if prefix else 0)
        uncached = max(1, want.context_tokens - cached)
        best = least(self._view.predictor, one.pool, uncached)
        # A limit of 0 means none, and one that has passed while it waited is the least there is.
        ttft = max(1e-9, limits.ttft) if limits.ttft is not None else 0.0
        return unattainable(best, ttft, 0.0, limits.deadline, 1.0)

    def _prefix_for(self, one: _Try, runner: Candidate) -> Holder | None:
        """Of the workers that hold most of the prompt, a near one whose KV is of use."""
        worker, block_tokens = runner.worker, runner.worker.info.block_tokens
        want, pool = one.want, one.pool
        # The last token is computed in any case.
        most = (want.context_tokens - 1) // block_tokens * block_tokens
        among = pool.holders & ~worker.bit
        for keys, workers in self._view.index.reach(want.block_keys, among):
            tokens = min(keys * block_tokens, most)
            if tokens <= runner.cached_tokens:
                break
            names = islice(self._from_anywhere(workers), SHORTLIST)
            found = [pool.holder(name) for name in names]
            holders = [w for w in found if reasons.is_source_for(w, worker, want)]
            if holders:
                near = max(holders, key=lambda w: NEAR[route(w.info, worker.info).path]).info
                return Holder(near.worker_id, near.address, tokens)
        return None

    def _from_anywhere(self, workers: int) -> Iterator[str]:
        """A set's workers, from a drawn one on: what all ask for is not asked of one alone."""
        cut = int(self._draw() * workers.bit_length())
        rest = workers >> cut << cut
        index = self._view.index
        return chain(index.names(rest), index.names(workers ^ rest))


def refusal(want: PlaceRequest, pools: Sequence[Pool]) -> Refusal | None:
    """Why a request can't be placed, however long it waits; None if it could.

    `pools` are those of the request's model; at least one.
    """
    if any(not barred(w, want) for pool in pools for w in pool.decode.present.values()):
        return None
    present = [w for pool in pools for w in pool.decode.present.values()]
    allowed = want.allowed_regions
    here = [w for w in present if not allowed or w.info.region in allowed]
    able = [w for w in here if has_adapter(w, want)]
    if here and not able:
        return _unknown_adapter(want, here)
    left = [w for w in able if w.worker_id not in want.exclude_workers]
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
    if want.adapter:
        words += f" with adapter {want.adapter}"
    if allowed:
        words += f" in {', '.join(sorted(allowed))}, where the request may go"
    if able:
        words += f" but the {len(able)} that failed this request"
    return Refusal(Reason.NO_WORKERS, words, metadata={"role": "decode", "model": want.model})


def _unknown_adapter(want: PlaceRequest, workers: Sequence[Worker]) -> Refusal:
    have = sorted({a for w in workers for a in w.load.stats.adapters})
    some = ", ".join(have[:ADAPTERS_NAMED]) + (", ..." if len(have) > ADAPTERS_NAMED else "")
    where = f" in {', '.join(sorted(want.allowed_regions))}" if want.allowed_regions else ""
    return Refusal(
        Reason.UNKNOWN_ADAPTER,
        f"no decode worker of {want.model}{where} has adapter {want.adapter}; loaded: "
        f"{some or 'none'}",
        metadata={"adapter": want.adapter, "model": want.model},
    )
