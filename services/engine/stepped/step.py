"""One engine step: plan, compute, announce KV, sample, tell. Runs on the step thread."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kvtransfer.bandwidth import Bandwidth
from kvtransfer.errors import RegionDeniedError, WrongTenantError
from kvtransfer.store import KvStore
from services.engine.api import (
    EngineFault,
    FinishReason,
    KvPrefix,
    KvReport,
    PrefixReport,
    RankStats,
    TokenOutput,
)
from services.engine.guides.guided import Guided, Mask, Masks
from services.engine.guides.threads import MaskThreads
from services.engine.stepped.batch import Adapters, Drafter, Model, batch_of
from services.engine.stepped.deadlines import Deadlines
from services.engine.stepped.drafts import ChooseDrafts, Drafting
from services.engine.stepped.filling import Filling
from services.engine.stepped.inbox import (
    Cancel,
    ChangeAdapter,
    Command,
    FetchStopped,
    Proceed,
    Submit,
)
from services.engine.stepped.phases import Phase
from services.engine.stepped.prefix import Verdict, judge
from services.engine.stepped.ranks import rank_stats
from services.engine.stepped.rates import Rates
from services.engine.stepped.rounds import Alone, Round, Rounds
from services.engine.stepped.sampler import (
    Choice,
    Occurrences,
    Row,
    choose,
    penalized,
    token_of,
)
from services.engine.stepped.scheduler import Fetch, Plan, Scheduler, Work
from services.engine.stepped.sequence import Limits, Role, Sequence
from services.runtime.errors import AdapterFailedError
from services.runtime.settings import EngineSettings

log = logging.getLogger(__name__)


_DENIED = frozenset({RegionDeniedError.reason, WrongTenantError.reason})


def _no_number(adapter: str) -> EngineFault:
    """An adapter's weights may do that wherever they are used; without one it is this engine."""
    words = "the model gave no number to choose a token by"
    if not adapter:
        return EngineFault("ENGINE_FAILED", words)
    words = f"with the adapter {adapter} {words}"
    return EngineFault(AdapterFailedError.reason, words, {"adapter": adapter})


@dataclass(slots=True)
class _Live:
    """A sequence, and what is kept about it until it ends."""

    sequence: Sequence
    guided: Guided | None = None
    occurrences: Occurrences | None = None
    fetch: Fetch | None = None
    fetched: FetchStopped | None = None
    verdict: Verdict | None = None
    leased: bool = False
    proceeded: float = 0.0
    reported: bool = False


@dataclass(frozen=True, slots=True)
class _Gain:
    """What a step brought for a sequence that it sampled for."""

    sequence: Sequence
    choices: tuple[Choice, ...]
    reason: FinishReason | None = None
    fault: EngineFault | None = None
    drafts: tuple[int, int] = (0, 0)
    """Of it how many were compared with what was chosen, and how many of these were right."""


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is; replaced as a whole, so other threads may read it."""

    taken: int = 0
    """Requests taken in."""
    running: int = 0
    queued_tokens: int = 0
    finished: int = 0
    preempted: int = 0
    prefill_tokens_per_second: float = 0.0
    step_seconds: float = 0.0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    decode_steps: int = 0
    ranks: tuple[RankStats, ...] = ()
    """None for a single one."""


@dataclass(slots=True)
class StepResult:
    """What the event loop has to do about what happened on the step thread."""

    outputs: list[tuple[int, TokenOutput]] = field(default_factory=list)
    """With the serial of the request: its id may have been used again since."""
    fetches: list[Fetch] = field(default_factory=list)
    stop_fetches: list[int] = field(default_factory=list)
    """Serials."""

    def __bool__(self) -> bool:
        return bool(self.outputs or self.fetches or self.stop_fetches)


class Stepper:
    """Owns every sequence. Not thread-safe, but for `load`."""

    def __init__(
        self,
        model: Model,
        store: KvStore,
        settings: EngineSettings,
        limits: Limits,
        *,
        recompute_max_tokens: int,
        bandwidth: Bandwidth,
        clock: Callable[[], float],
        dp_ranks: int = 1,
        adapters: Adapters | None = None,
        drafter: Drafter | None = None,
        rounds: Rounds | None = None,
    ) -> None:
        self.rounds = rounds or Alone()
        self._adapters = adapters
        self._dp_ranks = dp_ranks
        self._model = model
        self._store = store
        self._scheduler = Scheduler(
            store,
            block_tokens=store.layout.block_tokens,
            chunk_tokens=settings.chunk_tokens,
            max_running=settings.max_running,
            judge=self._judge,
            in_tiers=store.in_tiers,
            draft_tokens=None if drafter is None else settings.draft_tokens,
        )
        self._drafting: Drafting | None = None
        if drafter is not None:
            size = store.layout.block_tokens
            self._drafting = Drafting(
                drafter, settings.draft_tokens, size, clock, self._begin_drafts
            )
        self._own_layers = store.layout.layers - (0 if drafter is None else drafter.layers)
        self._limits = limits
        self._recompute_max_tokens = recompute_max_tokens
        self._bandwidth = bandwidth
        self._clock = clock
        self._block_tokens = store.layout.block_tokens
        self._live: dict[int, _Live] = {}
        self._result = StepResult()
        self._masks = MaskThreads()
        self._rates = Rates()
        self._deadlines = Deadlines(self._rates, settings.chunk_tokens)
        self._taken = self._finished = self._preempted = 0
        self._drafted = self._accepted = self._decode_steps = 0
        self.load = Load(ranks=self._ranks())

    @property
    def idle(self) -> bool:
        """No request is left."""
        return not self._live

    def apply(self, command: Command) -> None:
        """Takes in what the event loop said."""
        if isinstance(command, Submit):
            self._submit(command.sequence, command.guided)
        elif isinstance(command, FetchStopped):
            self._fetch_stopped(command)
        elif isinstance(command, Proceed):
            self._proceed(command)
        elif isinstance(command, ChangeAdapter):
            self._change_adapter(command)
        elif isinstance(command, Cancel):
            live = self._live.get(command.serial)
            if live is not None:
                self._end(live.sequence)
            else:
                self._store.release_lease(command.request_id)

    def plan(self) -> Plan:
        """Decides what the next step does; `run` must follow."""
        self._drop_late()
        plan = self._scheduler.plan()
        self._preempted += len(plan.preempted)
        self._result.stop_fetches += [
            s.serial for s in plan.preempted if s.phase is Phase.RETURNING
        ]
        self._result.fetches += plan.fetches
        for fetch in plan.fetches:
            self._live[fetch.sequence.serial].fetch = fetch
        for work in plan.work:
            self._lease(work.sequence)
        return plan

    def run(self, plan: Plan, *, leaving: bool = False) -> Round:
        """Computes a step, together with other ranks if there are any; what they agreed on.

        If it fails those who were in it do; with other ranks, who can't go on, it raises.
        """
        calls = 0 if self._drafting is None else self._drafting.plan(plan.work)
        agreed = self.rounds.meet(work=bool(plan.work), draft_calls=calls, leaving=leaving)
        if agreed.work:
            self._run(plan, agreed.draft_calls)
        return agreed

    def _run(self, plan: Plan, draft_calls: int) -> None:
        began = self._clock()
        try:
            gains = self._compute(plan, draft_calls)
        except Exception as error:
            if self.rounds.shared:
                raise
            log.exception("an engine step of %d sequences failed", len(plan.work))
            self.fail([w.sequence for w in plan.work], error)
        else:
            self._advance(gains)
        if not plan.work:  # it stepped along
            return
        # Tokens of preempted sequences count too: they are computed as prompts are.
        chunks = sum(w.count for w in plan.work if w.count > 1)
        self._rates.step(chunks, self._clock() - began)

    def take(self) -> StepResult:
        """What has come of commands, plans and steps since the last call; publishes `load`."""
        result, self._result = self._result, StepResult()
        self.load = Load(
            taken=self._taken,
            running=len(self._scheduler.admitted),
            queued_tokens=self._scheduler.queued_tokens,
            finished=self._finished,
            preempted=self._preempted,
            prefill_tokens_per_second=self._rates.prefill_tokens_per_second,
            step_seconds=self._rates.step_seconds,
            draft_tokens=self._drafted,
            accepted_tokens=self._accepted,
            decode_steps=self._decode_steps,
            ranks=self._ranks(),
        )
        return result

    def _ranks(self) -> tuple[RankStats, ...]:
        if self._dp_ranks == 1:
            return ()
        scheduler = self._scheduler
        return rank_stats(
            self._dp_ranks,
            self._store.total_blocks,
            scheduler.admitted,
            scheduler.waiting,
            scheduler.to_compute,
        )

    def fail(self, sequences: Iterable[Sequence], error: Exception) -> None:
        """Ends sequences that a broken step has left in doubt."""
        fault = EngineFault("ENGINE_FAILED", f"the engine failed: {type(error).__name__}")
        for sequence in sequences:
            self._end(sequence, FinishReason.ERROR, fault=fault)

    def fail_all(self, error: Exception) -> None:
        """The same for every live request."""
        self.fail([live.sequence for live in self._live.values()], error)

    def _lease(self, sequence: Sequence) -> None:
        """Puts a prompt's blocks under its lease once they are all its own and won't change."""
        live = self._live[sequence.serial]
        if sequence.role is Role.PREFILL and not live.leased:
            live.leased = True
            request = sequence.request
            self._store.lease_add(request.request_id, sequence.blocks, sequence.context_keys)

    def _judge(self, sequence: Sequence, prefix: KvPrefix, tokens: int) -> float | None:
        """Whether to fetch a prefix; see scheduler.Judge."""
        size = tokens // self._block_tokens * self._store.block_bytes
        estimate = self._bandwidth.estimate(prefix.address, size, self._clock())
        verdict = judge(prefix, tokens, estimate, self._rates.prefill_tokens_per_second)
        self._live[sequence.serial].verdict = verdict
        if not verdict.fetch:
            return None
        return min(verdict.timeout, max(0.0, sequence.deadline - self._clock()))

    # Deadlines

    def _drop_late(self) -> None:
        """Ends what can't be done in time any more, before a step is wasted on it."""
        now = self._clock()
        horizon = now + self._deadlines.least_seconds(self._limits.context_tokens)
        for live in [x for x in self._live.values() if x.sequence.deadline <= horizon]:
            sequence = live.sequence
            tokens = self._scheduler.to_compute(sequence)
            fault = self._deadlines.missed(sequence, tokens, now)
            if fault is not None and sequence.phase is Phase.WAITING:
                tokens = max(0, tokens - self._may_be_found(sequence))
                fault = self._deadlines.missed(sequence, tokens, now)
            if fault is not None:
                self._end(sequence, FinishReason.ERROR, fault=fault)

    def _may_be_found(self, sequence: Sequence) -> int:
        """Prompt tokens of a waiting sequence whose KV may be had without computing it."""
        keys = sequence.chain.keys
        cached = self._store.match(keys)
        self._store.release(cached)
        here = len(cached) + self._store.in_tiers(keys[len(cached) :])
        held = 0 if sequence.prefix is None else sequence.prefix.tokens
        return max(here * self._block_tokens, held)

    # Commands

    def _change_adapter(self, change: ChangeAdapter) -> None:
        """Only here, between two steps: so no batch names an adapter that is not there."""
        assert self._adapters is not None
        if change.weights is None:
            self._adapters.drop(change.adapter_id)
        else:
            self._adapters.put(change.adapter_id, change.weights)

    def _submit(self, sequence: Sequence, guided: Guided | None) -> None:
        self._live[sequence.serial] = _Live(sequence, guided)
        self._taken += 1
        self._scheduler.submit(sequence)
        reason = sequence.finished(self._limits)
        if reason is not None:  # earlier attempts had all but said so
            self._end(sequence, reason)

    def _proceed(self, command: Proceed) -> None:
        live = self._live.get(command.serial)
        if live is None or not live.sequence.held_back:
            return
        live.proceeded = command.at
        self._scheduler.proceed(live.sequence, command.token_ids)
        if live.guided is not None:
            live.guided.accept(command.token_ids)
        reason = live.sequence.finished(self._limits)
        if reason is not None:
            self._end(live.sequence, reason)

    def _fetch_stopped(self, stopped: FetchStopped) -> None:
        live = self._live.get(stopped.serial)
        if live is None:
            raise AssertionError("a fetch outlived its sequence")
        sequence = live.sequence
        if sequence.phase is not Phase.FETCHING:
            self._scheduler.fetch_stopped(sequence, 0)
            if sequence.phase is Phase.ENDED:
                del self._live[stopped.serial]
            return
        live.fetched = stopped
        if live.fetch is not None and live.fetch.held_only:
            # What did not come is computed, as all of it would have been.
            self._scheduler.fetch_stopped(sequence, stopped.arrived, stopped.restored)
            return
        have = sequence.computed + stopped.arrived * self._block_tokens
        missing = max(0, sequence.context - have)
        # If it is too late no other placement could help either.
        fault = self._deadlines.missed(sequence, missing, self._clock()) or stopped.fault
        if fault is None and missing > self._recompute_max_tokens:
            fault = EngineFault(
                stopped.lost if stopped.lost in _DENIED else "KV_SOURCE_LOST",
                f"{missing} tokens of KV did not arrive ({stopped.why}), more than are recomputed",
                {"missing_tokens": str(missing), "allowed": str(self._recompute_max_tokens)},
            )
        if fault is not None:
            self._end(sequence, FinishReason.ERROR, fault=fault)
            self._scheduler.fetch_stopped(sequence, 0)
            del self._live[stopped.serial]
            return
        self._scheduler.fetch_stopped(sequence, stopped.arrived, stopped.restored)

    # A step

    def _compute(self, plan: Plan, draft_calls: int) -> list[_Gain]:
        """Runs the model, samples for each Work.sample, drafts, makes finished blocks readable."""
        works, drafting = plan.work, self._drafting
        filling = Filling(self._store, works, self._own_layers)
        filling.begin()
        batch = batch_of(works, draft_calls)
        after_layers = filling.layers_done if filling.any else None
        masks = self._masks.begin(dict(self._wanted(works)))
        began = self._clock()
        try:
            logits = self._model.forward(batch, after_layers, self._store.layers_per_piece)
        finally:
            allowed = masks.result()
        self._scheduler.advance(plan)
        gains = self._gains(works, logits, allowed)
        if drafting is not None:
            drafting.computed(batch, self._clock() - began)
            drafting.note({g.sequence: g.drafts for g in gains})
            drafting.draft(works, batch, {g.sequence: self._draftable(g) for g in gains})
        filling.finish()
        return gains

    def _wanted(self, works: Seq[Work]) -> Iterable[tuple[int, Callable[[], Masks]]]:
        for work in works:
            guided = self._live[work.sequence.serial].guided
            if work.sample and guided is not None:
                yield work.sequence.serial, partial(guided.masks, work.drafts)

    def _gains(
        self, works: Seq[Work], logits: NDArray[np.float32], allowed: Mapping[int, Masks]
    ) -> list[_Gain]:
        best, row, gains = logits.argmax(axis=1), 0, []
        for work in works:
            if work.sample:
                rows = slice(row, row + 1 + len(work.drafts))
                masks = allowed.get(work.sequence.serial)
                gains.append(self._gain(work, logits[rows], best[rows], masks))
                row = rows.stop
        return gains

    def _gain(
        self,
        work: Work,
        logits: NDArray[np.float32],
        best: NDArray[np.intp],
        masks: Masks | None,
    ) -> _Gain:
        """Chooses a token, and one more for each draft that was the token chosen.

        Each is chosen as it would be without drafts: after those before it were appended, for its
        position, and not after one that ends the request.
        """
        sequence = work.sequence
        choices: list[Choice] = []
        reason, fault, right = None, None, 0
        known = 1 + len(work.drafts) if masks is None else len(masks)
        for row, draft in enumerate((*work.drafts, None)):
            allowed = None if masks is None else masks[row]
            choice = self._choose(sequence, allowed, logits[row], int(best[row]))
            if choice is None:
                reason, fault = FinishReason.ERROR, self._no_choice(sequence)
                break
            choices.append(choice)
            sequence.append((choice.token,))
            self._follow(sequence, choice.token)
            right += choice.token == draft
            reason = sequence.finished(self._limits)
            if reason is not None or choice.token != draft or row + 1 == known:
                break
            sequence.computed += 1
        checked = min(len(work.drafts), len(choices))
        if sequence.role is Role.DECODE:
            self._decode_steps += 1
            self._drafted += len(work.drafts)
            self._accepted += right
        return _Gain(sequence, tuple(choices), reason, fault, (checked, right))

    def _choose(
        self, sequence: Sequence, allowed: Masks | None, logits: NDArray[np.float32], best: int
    ) -> Choice | None:
        return choose(self._row(sequence, (), allowed), logits, best)

    def _follow(self, sequence: Sequence, token: int) -> None:
        guided = self._live[sequence.serial].guided
        if guided is not None and token not in self._limits.eos_token_ids:
            guided.accept((token,))

    def _no_choice(self, sequence: Sequence) -> EngineFault:
        guided = self._live[sequence.serial].guided
        if guided is not None and guided.failure is None:
            # It may have been at a draft.
            self._masks.begin({sequence.serial: guided.masks}).result()
        if guided is None or guided.failure is None:
            return _no_number(sequence.request.adapter)
        failure = guided.failure
        return EngineFault(failure.reason, failure.message, failure.metadata)

    def _draftable(self, gain: _Gain) -> int | None:
        """How many tokens it makes sense to draft; None: the sequence does not go on."""
        sequence = gain.sequence
        if gain.reason is not None or sequence.role is Role.PREFILL:
            return None
        return sequence.left(self._limits) - 1

    def _begin_drafts(self, sequences: Seq[Sequence]) -> ChooseDrafts:
        """See drafts.BeginDrafts: masks are computed beside the draft layer."""
        looks = self._masks.begin(
            {
                s.serial: partial(guided.look, s.drafts)
                for s in sequences
                if (guided := self._live[s.serial].guided) is not None
            }
        )

        def choose(logits: NDArray[np.float32]) -> list[int | None]:
            allowed = looks.result()
            return [
                self._draft(sequence, allowed, values)
                for sequence, values in zip(sequences, logits, strict=True)
            ]

        return choose

    def _draft(
        self, sequence: Sequence, looks: Mapping[int, Mask | None], logits: NDArray[np.float32]
    ) -> int | None:
        allowed = looks.get(sequence.serial)
        if allowed is None and sequence.serial in looks:
            return None
        return token_of(self._row(sequence, sequence.drafts, allowed), logits, int(logits.argmax()))

    def _row(
        self,
        sequence: Sequence,
        drafts: tuple[int, ...] = (),
        allowed: NDArray[np.uint32] | None = None,
    ) -> Row:
        """For the token after a sequence's own and drafts, which penalties don't know."""
        sampling = sequence.request.sampling
        live = self._live[sequence.serial]
        if penalized(sampling):
            if live.occurrences is None:
                live.occurrences = Occurrences(sequence.request.prompt_token_ids)
            live.occurrences.follow(sequence.tokens)
        forbidden: frozenset[int] = frozenset()
        if sequence.outputs + len(drafts) < sampling.min_tokens:
            forbidden = frozenset(sampling.stop_token_ids)
            if not sampling.ignore_eos:
                forbidden |= self._limits.eos_token_ids
        position = len(sequence.tokens) + len(drafts)
        return Row(sampling, position, live.occurrences, forbidden, allowed)

    def _advance(self, gains: Seq[_Gain]) -> None:
        """Sequences move on by what was chosen."""
        for gain in gains:
            sequence, reason = gain.sequence, gain.reason
            if reason is not None or sequence.role is Role.PREFILL:
                self._end(
                    sequence,
                    reason,
                    choices=gain.choices,
                    fault=gain.fault,
                    keep_lease=reason is None,
                )
            else:
                self._tell(sequence, choices=gain.choices)

    # Ends and outputs

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason | None = None,
        *,
        choices: Seq[Choice] = (),
        fault: EngineFault | None = None,
        keep_lease: bool = False,
    ) -> None:
        """Ends a sequence; with neither reason nor choices it was cancelled: nobody is told."""
        if sequence.phase in (Phase.ENDED, Phase.LEAVING):
            return
        if sequence.role is Role.PREFILL and not keep_lease:
            self._store.release_lease(sequence.request.request_id)
        if reason is not None or choices:
            self._finished += 1
            self._tell(sequence, choices=choices, reason=reason, fault=fault)
        fetching = sequence.phase in (Phase.FETCHING, Phase.RETURNING)
        if sequence.source is not None:  # It was never asked, and keeps a lease.
            self._result.fetches.append(Fetch(sequence, sequence.source))
        self._scheduler.end(sequence)
        if fetching:
            self._result.stop_fetches.append(sequence.serial)
        else:
            del self._live[sequence.serial]

    def _tell(
        self,
        sequence: Sequence,
        *,
        choices: Seq[Choice] = (),
        reason: FinishReason | None = None,
        fault: EngineFault | None = None,
    ) -> None:
        live = self._live[sequence.serial]
        report = None
        if not live.reported and (sequence.phase is Phase.RUNNING or live.fetched is not None):
            live.reported, report = True, _report(live)
        output = TokenOutput(
            request_id=sequence.request.request_id,
            token_ids=tuple(c.token for c in choices),
            logprobs=tuple(c.logprob for c in choices if c.logprob is not None),
            finish_reason=reason,
            error=fault,
            kv=report,
            prefill_done=sequence.role is Role.PREFILL and bool(choices),
        )
        self._result.outputs.append((sequence.serial, output))


def _report(live: _Live) -> KvReport:
    sequence, fetched = live.sequence, live.fetched
    have = min(sequence.computed, sequence.context)
    computed = max(0, have - sequence.cached_tokens - sequence.fetched_tokens)
    report = KvReport(
        cached_tokens=sequence.cached_tokens,
        computed_tokens=computed,
        prefix=_prefix_report(live),
    )
    if fetched is None:
        return report
    of_prefix = live.fetch is not None and live.fetch.held_only
    waited = not (of_prefix or sequence.held_back)
    return replace(
        report,
        transport=fetched.transport,
        bytes=fetched.bytes,
        blocks=fetched.blocks,
        seconds=fetched.seconds,
        exposed_seconds=max(0.0, fetched.ended - live.proceeded) if waited else 0.0,
        corrupt_blocks=fetched.corrupt_blocks,
        lost=f"{fetched.lost}: {fetched.why}" if fetched.lost else "",
        why=fetched.choice,
    )


def _prefix_report(live: _Live) -> PrefixReport | None:
    verdict, fetched = live.verdict, live.fetched
    if verdict is None:
        return None
    if not verdict.fetch:
        return verdict.report(0, 0.0, "computed")
    if fetched is None:
        return verdict.report(0, 0.0, "computed, since the fetch was stopped")
    tokens = live.sequence.fetched_tokens
    if not fetched.lost:
        return verdict.report(tokens, fetched.seconds, f"fetched in {fetched.seconds:.3f} s")
    outcome = f"{tokens} tokens came, then {fetched.lost}: {fetched.why}"
    return verdict.report(tokens, fetched.seconds, outcome)
