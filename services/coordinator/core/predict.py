"""Predicted time to first token (TTFT) and inter-token latency (ITL), from measured rates.

A prompt takes the tokens before it and its own uncached ones over its worker's measured rate, times
what the attention of its length costs (fits.py), times how late the worker was with its last first
tokens. A step takes what a batch of that size and KV takes the workers of its kind, times what the
worker's steps take against that; where drafts are accepted a step brings several tokens, and it is
the time for one that is meant. All of it learns from heartbeats and from reported TTFTs; what
nobody has measured is 0, and nothing is refused for it.

A kind: workers whose figures may stand for each other's, one model, KV layout and role.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

from services.coordinator.core.fits import PromptFit, StepFit
from services.coordinator.core.lengths import Fastest, Usual
from services.coordinator.core.median import Median
from services.coordinator.core.messages import Reason, Refusal, WorkerInfo, WorkerStats
from services.coordinator.core.paths import SinkRates
from services.coordinator.core.ranks import StepCost, rank_stats

NOMINAL_TOKENS_PER_SECOND = 1000.0
"""Prefill rate by which workers are compared where nobody of their kind has measured one."""

FACTOR_MEMORY = 0.1
"""Weight of the last measurement in a worker's own factors."""
FACTOR_BOUND = 8.0
"""A worker is taken to be at most this many times slower or faster than predicted."""
LEAST_PROMPT = 64
"""Tokens that a prompt must have computed for its TTFT to say something about prompts."""
OPTIMISM = 2.0
"""How much faster than measured all may turn out to be before a refusal was wrong. Rates differ by
that much from one minute to the next; who is refused at once has no second chance."""
MAX_RETRY_SECONDS = 30.0
MOST_STEP_TOKENS = 9.0
"""Of one request: engine.draft_tokens and one."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one worker computes for a request before its first token."""

    worker_id: str
    queued_tokens: int
    """Of others, before its own."""
    tokens: int
    """Its own, uncached."""
    cached_tokens: int = 0

    @property
    def mean_context(self) -> float:
        """Tokens that a computed token attends to, on average."""
        return self.cached_tokens + self.tokens / 2


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is predicted of one placement, seconds. Parts that nobody has measured are 0."""

    prompt: Prompt | None = None
    queue_seconds: float = 0.0
    """In the coordinator's queue."""
    prompt_seconds: float = 0.0
    """Queued on the worker, and computed."""
    transfer_seconds: float = 0.0
    """Of KV, as far as the request waits for nothing else."""
    itl_seconds: float = 0.0

    @property
    def ttft_seconds(self) -> float:
        """From now to the first token: the prefill's last step gives it. 0: not measured."""
        return self.known_seconds if self.prompt_seconds else 0.0

    @property
    def known_seconds(self) -> float:
        """The same, of what is measured: at least so long."""
        return self.queue_seconds + self.prompt_seconds + self.transfer_seconds


@dataclass(frozen=True, slots=True)
class Measured:
    """How a worker does against what is expected of its kind; 0: not measured."""

    steps: float = 0.0
    """Times what its batch takes its kind, a moving average."""
    prompts: float = 0.0
    """Times what prompts of their lengths take its kind, the same."""


@dataclass(slots=True)
class _Kind:
    rates: Median = field(default_factory=Median)
    """Prompt tokens a second of those that measured it."""
    steps: StepFit = field(default_factory=StepFit)
    prompts: PromptFit = field(default_factory=PromptFit)
    usual: Usual = field(default_factory=Usual)
    fastest: Fastest = field(default_factory=lambda: Fastest(0.0))
    alone: Fastest = field(default_factory=lambda: Fastest(0.0))
    """Steps with one request on the rank that has most, by number of requests."""
    members: int = 0


@dataclass(slots=True)
class _Worker:
    kind: Hashable
    of: _Kind
    rate: float = 0.0
    step_seconds: float = 0.0
    """Of its last report; 0: not measured."""
    steps: float = 0.0
    """Factor; 0 before the first report of a step."""
    step_tokens: float = 1.0
    """What a step brings a request: more than one where drafts are accepted."""
    _decode_steps: int = 0
    _accepted: int = 0

    def count(self, stats: WorkerStats) -> None:
        """Follows what steps bring, by the counters of each report."""
        steps = stats.decode_steps - self._decode_steps
        if steps > 0:
            each = 1.0 + max(0, stats.accepted_tokens - self._accepted) / steps
            each = min(each, MOST_STEP_TOKENS)
            self.step_tokens += FACTOR_MEMORY * (each - self.step_tokens)
        self._decode_steps, self._accepted = stats.decode_steps, stats.accepted_tokens

    ttft: float = 0.0
    """The same, of first tokens against what was predicted for it."""
    prompts: float = 0.0
    """The same, against what is usual for its kind."""
    sink: SinkRates = field(default_factory=SinkRates)


class Predictor:
    """What is known of all workers' speed. A report costs the same however many there are."""

    def __init__(self) -> None:
        self._kinds: dict[Hashable, _Kind] = {}
        self._workers: dict[str, _Worker] = {}

    def heard(self, info: WorkerInfo, kind: Hashable, stats: WorkerStats, now: float) -> Measured:
        """A worker reports; how it does. It may be of another kind than before."""
        worker = self._workers.get(info.worker_id)
        if worker is None or worker.kind != kind:
            self.forget(info.worker_id)
            of = self._kinds.setdefault(kind, _Kind())
            of.members += 1
            worker = self._workers[info.worker_id] = _Worker(kind, of)
        worker.of.rates.replace(worker.rate, stats.prefill_tokens_per_second)
        worker.rate = stats.prefill_tokens_per_second
        worker.step_seconds = stats.step_seconds
        worker.count(stats)
        worker.sink.report(stats.kv_rates)
        if stats.step_seconds > 0 and stats.running > 0:
            self._step(worker, info, stats, now)
        return Measured(worker.steps, worker.prompts)

    def forget(self, worker_id: str) -> None:
        """The worker is gone."""
        worker = self._workers.pop(worker_id, None)
        if worker is None:
            return
        worker.of.rates.replace(worker.rate, 0.0)
        worker.of.members -= 1
        if not worker.of.members:
            del self._kinds[worker.kind]

    def ended(
        self, forecast: Forecast, ttft_seconds: float, computed_tokens: int, now: float
    ) -> None:
        """An attempt placed by this forecast had its first token after so long.

        Both as the frontend reported them: seconds from the placement on; 0 for no token.
        """
        prompt = forecast.prompt
        worker = self._workers.get(prompt.worker_id) if prompt else None
        if prompt is None or worker is None or ttft_seconds <= 0:
            return
        if computed_tokens < LEAST_PROMPT:
            return
        worker.of.fastest.add(computed_tokens, ttft_seconds, now)
        mine = computed_tokens / (computed_tokens + prompt.queued_tokens)
        times_usual = worker.of.usual.add(computed_tokens, mine * ttft_seconds)
        if times_usual:
            worker.prompts = _moved(worker.prompts, times_usual)
        rate = self.tokens_per_second(prompt.worker_id)
        if rate <= 0:
            return
        took = max(0.0, ttft_seconds - forecast.transfer_seconds)
        alone = worker.of.prompts.factor(prompt.mean_context)
        expected = (prompt.queued_tokens + alone * computed_tokens) / rate
        worker.ttft = _moved(worker.ttft, took / expected)
        if prompt.queued_tokens <= computed_tokens // 8:
            # It was on its own: what it took is what its length costs.
            worker.of.prompts.add(prompt.mean_context, took * rate / computed_tokens, now)

    def prompt_seconds(self, prompt: Prompt) -> float:
        """Until a worker has computed a prompt; 0 if neither it nor its kind measured a rate."""
        worker = self._workers.get(prompt.worker_id)
        rate = (worker.rate or worker.of.rates.value()) if worker else 0.0
        if worker is None or rate <= 0:
            return 0.0
        tokens = (
            prompt.queued_tokens + worker.of.prompts.factor(prompt.mean_context) * prompt.tokens
        )
        # A token can't come sooner than a step.
        return max((worker.ttft or 1.0) * tokens / rate, worker.step_seconds)

    def tokens_per_second(self, worker_id: str) -> float:
        """A worker's prefill rate, else the median of its kind; 0 if there is neither."""
        worker = self._workers.get(worker_id)
        return (worker.rate or worker.of.rates.value()) if worker else 0.0

    def floor(self, kind: Hashable, tokens: int, queue_seconds: float = 0.0) -> Forecast:
        """The best that a request may hope for which has so many tokens to compute on a kind.

        For `unattainable`: the time to the first token is one that no shorter prompt has beaten,
        that between tokens one that no request had when it was alone.
        """
        of = self._kinds.get(kind)
        if of is None:
            return Forecast(queue_seconds=queue_seconds)
        return Forecast(
            queue_seconds=queue_seconds,
            prompt_seconds=of.fastest.least(max(1, tokens)),
            itl_seconds=of.alone.least(2),
        )

    def step_cost(self, worker_id: str) -> StepCost | None:
        """What a step takes a worker, for each token it brings a request.

        None if nobody of its kind has reported one.
        """
        worker = self._workers.get(worker_id)
        cost = worker.of.steps.cost if worker else None
        if worker is None or cost is None:
            return None
        factor = worker.steps or 1.0
        return StepCost(factor * cost.base, factor * cost.request, factor * cost.kv_token)

    def itl_seconds(
        self, worker_id: str, ranks: Sequence[tuple[int, int]], rank: int, kv_tokens: int
    ) -> float:
        """Seconds between tokens with one more request of `kv_tokens` on a rank; 0: not measured.

        `ranks`: requests and tokens of KV on each. They step together, so the slowest one counts.
        """
        cost = self.step_cost(worker_id)
        if cost is None:
            return 0.0
        requests, tokens = ranks[rank]
        with_it = cost.seconds(requests + 1, tokens + kv_tokens)
        return max(with_it, max(cost.seconds(r, k) for r, k in ranks))

    def sink(self, worker_id: str) -> SinkRates:
        """What a worker measured when it fetched KV."""
        worker = self._workers.get(worker_id)
        return worker.sink if worker else SinkRates()

    def _step(self, worker: _Worker, info: WorkerInfo, stats: WorkerStats, now: float) -> None:
        known = worker.of.steps.cost
        seconds = stats.step_seconds / worker.step_tokens
        ranks = [(r.running, r.kv_tokens) for r in rank_stats(info, stats)]
        requests, kv_tokens = max(ranks, key=lambda r: known.seconds(*r)) if known else max(ranks)
        if known is not None:
            expected = known.seconds(requests, kv_tokens)
            if expected > 0:
                worker.steps = _moved(worker.steps, seconds / expected)
        worker.of.steps.add(requests, kv_tokens, seconds, now)
        if max(ranks)[0] == 1:
            worker.of.alone.add(1, seconds, now)


def unattainable(
    least: Forecast,
    ttft_limit: float,
    itl_limit: float,
    remaining: float | None,
    retry_seconds: float,
) -> Refusal | None:
    """Refuses early what can't be had any more; None if it may be.

    With SLO_UNATTAINABLE for a limit, with DEADLINE where there is only that.

    `least` is a forecast with nothing in it that may turn out not to be: see `Predictor.floor`, and
    `Queue.ahead`. Limits as in PlaceRequest, 0 for none; `remaining` are seconds to the deadline.
    A limit has to be missed by OPTIMISM times, since to refuse what could have been met is worse
    than to miss it. `retry_seconds`: when the load that stands in the way of an ITL may be less.
    """
    ttft = least.known_seconds
    if ttft_limit > 0 and ttft / OPTIMISM > ttft_limit:
        words = f"the first token is expected in {_said(least)}, not within {ttft_limit:.3g} s"
        return _refusal(words, "ttft_seconds", ttft, ttft_limit, _when(least, ttft_limit))
    if remaining is not None and ttft / OPTIMISM > remaining:
        words = f"the deadline can't be met: of the request's time {remaining:.3g} s are left, "
        words += f"and the first token is expected in {_said(least)}"
        refused = _refusal(words, "deadline", ttft, remaining, _when(least, remaining))
        return replace(refused, reason=Reason.DEADLINE)
    if itl_limit > 0 and least.itl_seconds / OPTIMISM > itl_limit:
        words = (
            f"tokens are expected {1e3 * least.itl_seconds:.3g} ms apart at best, not within "
            f"{1e3 * itl_limit:.3g} ms"
        )
        return _refusal(words, "itl_seconds", least.itl_seconds, itl_limit, retry_seconds)
    return None


def _refusal(words: str, what: str, predicted: float, limit: float, retry: float) -> Refusal:
    metadata = {"limit": what, "predicted": f"{predicted:.6g}", "asked": f"{limit:.6g}"}
    retry = min(MAX_RETRY_SECONDS, max(1.0, retry))
    return Refusal(Reason.SLO_UNATTAINABLE, words, retry, metadata)


def _when(least: Forecast, limit: float) -> float:
    """Seconds until the limit could be met, if the queue only moves on."""
    if least.known_seconds - least.queue_seconds > limit:
        # Not even with nobody before it: faster workers have to come.
        return MAX_RETRY_SECONDS
    return least.known_seconds - limit


def _said(least: Forecast) -> str:
    parts = [
        (least.queue_seconds, "in the queue"),
        (least.prompt_seconds, "for the prompt"),
        (least.transfer_seconds, "to move KV"),
    ]
    detail = ", ".join(f"{seconds:.3g} s {what}" for seconds, what in parts if seconds)
    return f"{least.known_seconds:.3g} s ({detail})"


def _moved(average: float, value: float) -> float:
    value = min(max(value, 1 / FACTOR_BOUND), FACTOR_BOUND)
    return average + FACTOR_MEMORY * (value - average) if average else value
