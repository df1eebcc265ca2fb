"""The requests of a soak: drawn at random, some given up by the client, all compared.

What is asked comes from a small pool whose answers were taken before anything was disturbed, so
every token that comes later can be held against the one that should have come.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from loadtest.errors import LoadTestError
from loadtest.outcome import Served
from loadtest.wire import InferenceClient
from loadtest.workload import RequestPlan
from services.runtime.client import CallFailedError

DEADLINE = "DEADLINE_EXCEEDED"
"""gRPC's code: the end of a request that was given too little time on purpose."""
EXAMPLES = 5


class NoReferenceError(LoadTestError):
    """An answer could not be had while nothing was disturbed."""


@dataclass(frozen=True, slots=True)
class Question:
    """One request of the pool, with the client that samples as it asks for."""

    plan: RequestPlan
    client: InferenceClient


@dataclass(frozen=True, slots=True)
class Shares:
    """How requests end, apart from being answered; parts of 1."""

    cancelled: float = 0.15
    """The client goes away, before the first token or after some."""
    hurried: float = 0.1
    """The deadline is so short that most will miss it."""
    hurry_seconds: float = 1.0
    """Longest of those deadlines."""


@dataclass(slots=True)
class Tally:
    """What became of requests. Times in seconds."""

    asked: int = 0
    answered: int = 0
    tokens: int = 0
    """That came, and were compared."""
    cancelled: int = 0
    hurried: int = 0
    """That missed the short deadline."""
    resumed: int = 0
    """Answered in more than one attempt."""
    failed: dict[str, int] = field(default_factory=dict)
    """By reason."""
    failures: dict[str, str] = field(default_factory=dict)
    """What the first of each reason said."""
    wrong: int = 0
    """Requests that got a token which the undisturbed answer does not have there."""
    wrong_examples: list[str] = field(default_factory=list)
    longest_wait: float = 0.0
    """Without a token, of requests that were owed one."""
    longest_request: float = 0.0
    kv_bytes: dict[str, int] = field(default_factory=dict)
    """Fetched, by transport."""


class _LeftError(Exception):
    """The client has changed its mind."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """One request to make."""

    index: int
    """Of the question."""
    leaves_in: float | None = None
    """Seconds."""
    leaves_after: int | None = None
    """Tokens."""
    deadline: float | None = None
    """Seconds."""


async def references(
    questions: Sequence[Question], at_once: int, timeout: float, done: Callable[[int], None]
) -> list[tuple[int, ...]]:
    """The answer to each question. Raises NoReferenceError."""
    answers: dict[int, tuple[int, ...]] = {}
    left = iter(range(len(questions)))

    async def work() -> None:
        for index in left:
            tokens: list[int] = []
            question = questions[index]
            try:
                await question.client.tokens(question.plan, timeout, tokens.extend)
            except CallFailedError as error:
                raise NoReferenceError(
                    f"request {index} failed before anything was disturbed: "
                    f"{error.reason or error.code}: {error.message}"
                ) from None
            answers[index] = tuple(tokens)
            done(len(answers))

    workers = [asyncio.ensure_future(work()) for _ in range(at_once)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return [answers[index] for index in range(len(questions))]


class Load:
    """Users who ask one question after the other until they are told to stop."""

    def __init__(
        self,
        questions: Sequence[Question],
        answers: Sequence[tuple[int, ...]],
        shares: Shares,
        *,
        timeout_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self.tally = Tally()
        self._questions = questions
        self._answers = answers
        self._shares = shares
        self._timeout = timeout_seconds
        self._clock = clock

    async def user(self, rng: random.Random, stop: asyncio.Event) -> None:
        """One user, who has finished the question at hand when this returns."""
        while not stop.is_set():
            index = rng.randrange(len(self._questions))
            fate = rng.random()
            plan = _Plan(index)
            if fate < self._shares.cancelled / 2:
                plan = _Plan(index, leaves_in=rng.uniform(0, self._shares.hurry_seconds))
            elif fate < self._shares.cancelled:
                plan = _Plan(index, leaves_after=rng.randint(1, len(self._answers[index])))
            elif fate < self._shares.cancelled + self._shares.hurried:
                plan = _Plan(index, deadline=rng.uniform(0.02, self._shares.hurry_seconds))
            await self._ask(plan)

    async def _ask(self, plan: _Plan) -> None:
        tally = self.tally
        watched = _Watched(plan.leaves_after, self._clock)
        tally.asked += 1
        try:
            async with asyncio.timeout(plan.leaves_in):
                await self._told(plan, watched)
        except (_LeftError, TimeoutError):
            tally.cancelled += 1
        except CallFailedError as error:
            if plan.deadline is not None and error.code == DEADLINE:
                tally.hurried += 1
            else:
                reason = error.reason or error.code
                tally.failed[reason] = tally.failed.get(reason, 0) + 1
                tally.failures.setdefault(reason, error.message)
        watched.end()
        tally.tokens += len(watched.tokens)
        tally.longest_wait = max(tally.longest_wait, watched.longest_wait)
        tally.longest_request = max(tally.longest_request, self._clock() - watched.began)
        self._compare(plan.index, watched)

    async def _told(self, plan: _Plan, watched: _Watched) -> None:
        question = self._questions[plan.index]
        seconds = plan.deadline or self._timeout
        served = await question.client.tokens(question.plan, seconds, watched.came)
        watched.answered = True
        self._count(served)

    def _count(self, served: Served) -> None:
        self.tally.answered += 1
        self.tally.resumed += served.attempts > 1
        for transport, moved in served.kv_bytes.items():
            self.tally.kv_bytes[transport] = self.tally.kv_bytes.get(transport, 0) + moved

    def _compare(self, index: int, watched: _Watched) -> None:
        wanted, came = self._answers[index], tuple(watched.tokens)
        right = came == wanted if watched.answered else came == wanted[: len(came)]
        if right:
            return
        self.tally.wrong += 1
        if len(self.tally.wrong_examples) < EXAMPLES:
            self.tally.wrong_examples.append(f"question {index}: {_difference(wanted, came)}")


def _difference(wanted: Sequence[int], came: Sequence[int]) -> str:
    for at, (right, wrong) in enumerate(zip(wanted, came, strict=False)):
        if right != wrong:
            return f"token {at} of {len(wanted)} is {wrong}, not {right}"
    return f"{len(came)} tokens came, not {len(wanted)}"


class _Watched:
    """The tokens of one request, and how long it waited for them."""

    def __init__(self, leaves_after: int | None, clock: Callable[[], float]) -> None:
        self.tokens: list[int] = []
        self.answered = False
        self.longest_wait = 0.0
        self.began = self._last = clock()
        self._leaves_after = leaves_after
        self._clock = clock

    def came(self, tokens: Sequence[int]) -> None:
        """Raises _LeftError once the client has seen as many as it wants."""
        self.tokens.extend(tokens)
        self.end()
        if self._leaves_after is not None and len(self.tokens) >= self._leaves_after:
            raise _LeftError

    def end(self) -> None:
        """Nothing is owed from here on, or something has come."""
        now = self._clock()
        self.longest_wait = max(self.longest_wait, now - self._last)
        self._last = now


def words(tally: Tally) -> Mapping[str, str]:
    """The tally for people, by name."""
    failed = ", ".join(f"{count} {reason}" for reason, count in tally.failed.items())
    return {
        "requests": str(tally.asked),
        "answered": f"{tally.answered}, {tally.resumed} of them after a worker was lost",
        "given up by the client": f"{tally.cancelled} cancelled, {tally.hurried} past deadline",
        "failed": failed or "none",
        "tokens compared": f"{tally.tokens}, {tally.wrong} requests differed",
        "longest wait for a token": f"{tally.longest_wait:.1f} s",
        "longest request": f"{tally.longest_request:.1f} s",
        "KV fetched": ", ".join(f"{n / 2**20:.0f} MiB by {t}" for t, n in tally.kv_bytes.items())
        or "none",
    }
