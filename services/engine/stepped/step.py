"""One engine step: plan, compute, announce KV, sample, tell. Runs on the step thread."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from kvtransfer.bandwidth import Bandwidth
from kvtransfer.errors import RegionDeniedError, WrongTenantError
from kvtransfer.store import KvStore
from services.engine.api import (
    EngineFault,
    FinishReason,
    KvPrefix,
    RankStats,
    TokenOutput,
)
from services.engine.guides.guided import Guided
from services.engine.stepped.batch import Adapters, Drafter, Model, batch_of
from services.engine.stepped.choosing import Choosing, Gain
from services.engine.stepped.deadlines import Deadlines
from services.engine.stepped.drafts import Drafting
from services.engine.stepped.filling import Filling
from services.engine.stepped.inbox import (
    Cancel,
    ChangeAdapter,
    Command,
    FetchStopped,
    Proceed,
    Submit,
)
from services.engine.stepped.live import Live, report_of
from services.engine.stepped.phases import Phase
from services.engine.stepped.prefix import judge
from services.engine.stepped.ranks import rank_stats
from services.engine.stepped.rates import Rates
from services.engine.stepped.rounds import Alone, Round, Rounds
from services.engine.stepped.sampler import (
    Choice,
)
from services.engine.stepped.scheduler import Fetch, Plan, Scheduler
from services.engine.stepped.sequence import Limits, Role, Sequence
from services.runtime.settings import EngineSettings

log = logging.getLogger(__name__)


_DENIED = frozenset({RegionDeniedError.reason, WrongTenantError.reason})


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

    choosing = Choosing

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
        self._live: dict[int, Live] = {}
        self._choosing = self.choosing(self._live, limits)
        self._drafting: Drafting | None = None
        if drafter is not None:
            size = store.layout.block_tokens
            self._drafting = Drafting(
                drafter, settings.draft_tokens, size, clock, self._choosing.begin_drafts
            )
        self._own_layers = store.layout.layers - (0 if drafter is None else drafter.layers)
        self._limits = limits
        self._recompute_max_tokens = recompute_max_tokens
        self._bandwidth = bandwidth
        self._clock = clock
        self._block_tokens = store.layout.block_tokens
        self._result = StepResult()
        self._rates = Rates()
        self._deadlines = Deadlines(self._rates, settings.chunk_tokens)
        self._taken = self._finished = self._preempted = 0
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
            draft_tokens=self._choosing.draft_tokens,
            accepted_tokens=self._choosing.accepted_tokens,
            decode_steps=self._choosing.decode_steps,
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
        self._live[sequence.serial] = Live(sequence, guided)
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

    def _compute(self, plan: Plan, draft_calls: int) -> list[Gain]:
        """Runs the model, samples for each Work.sample, drafts, makes finished blocks readable."""
        works, drafting = plan.work, self._drafting
        filling = Filling(self._store, works, self._own_layers)
        filling.begin()
        batch = batch_of(works, draft_calls)
        after_layers = filling.layers_done if filling.any else None
        masks = self._choosing.begin(works)
        began = self._clock()
        try:
            logits = self._model.forward(batch, after_layers, self._store.layers_per_piece)
        finally:
            allowed = masks.result()
        self._scheduler.advance(plan)
        gains = self._choosing.gains(works, logits, allowed)
        if drafting is not None:
            drafting.computed(batch, self._clock() - began)
            drafting.note({g.sequence: g.drafts for g in gains})
            drafting.draft(works, batch, {g.sequence: self._choosing.draftable(g) for g in gains})
        filling.finish()
        return gains

    def _advance(self, gains: Seq[Gain]) -> None:
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
            live.reported, report = True, report_of(live)
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
