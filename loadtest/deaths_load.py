"""Users of several frontends, who note what each request had to wait for.

A user asks its own frontend. A frontend that dies takes its clients' streams with it, so then the
user asks the next one, from the beginning; any other error is a failure. Every token is compared
with the one that came while nothing was disturbed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from loadtest.wire import InferenceClient
from loadtest.workload import RequestPlan
from services.runtime.client import CallFailedError

NO_SERVER = "RPC_UNAVAILABLE"
"""No Tandem server said this: the connection broke, or there was none."""
PAUSE_SECONDS = 0.05
"""Before all frontends are tried once more."""
NOTED_SECONDS = 0.02
"""Shorter waits are of no interest."""


@dataclass(frozen=True, slots=True)
class Question:
    """A request, the client to ask each frontend by, and the answer."""

    plan: RequestPlan
    clients: tuple[InferenceClient, ...]
    answer: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Wait:
    """From one token to the next, or from the question to the first token."""

    began: float
    ended: float
    first: bool

    @property
    def seconds(self) -> float:
        """How long."""
        return self.ended - self.began


@dataclass(slots=True)
class Asked:
    """One request. Times on the load's clock."""

    began: float
    ended: float = 0.0
    attempts: int = 0
    """Placements, by the frontend that answered; 0: none did."""
    cut: int = 0
    """Streams that ended with their frontend."""
    turned_away: int = 0
    """Frontends that were not there."""
    failure: str = ""
    """Reason and words."""
    wrong: bool = False
    waits: list[Wait] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)


class Users:
    """They ask one question after the other until told to stop. On one event loop."""

    def __init__(
        self, questions: Sequence[Question], timeout_seconds: float, clock: Callable[[], float]
    ) -> None:
        self.asked: list[Asked] = []
        """Requests that have ended."""
        self.live: list[Asked] = []
        self._questions = questions
        self._timeout = timeout_seconds
        self._clock = clock

    async def ended(self, requests: Sequence[Asked]) -> None:
        """Until these have."""
        await asyncio.gather(*(request.over.wait() for request in requests))

    async def user(self, number: int, seed: int, stop: asyncio.Event) -> None:
        """One user, who has finished the question at hand when this returns."""
        rng = random.Random(f"{seed} user {number}")
        while not stop.is_set():
            request = Asked(self._clock())
            self.live.append(request)
            try:
                await self._ask(request, rng.choice(self._questions), number)
            finally:
                self.live.remove(request)
                request.ended = self._clock()
                request.over.set()
                self.asked.append(request)

    async def _ask(self, request: Asked, question: Question, number: int) -> None:
        end = request.began + self._timeout
        count = len(question.clients)
        order = [question.clients[(number + i) % count] for i in range(count)]
        tries = 0
        while True:
            stream = _Stream(request, question.answer, self._clock)
            client = order[tries % len(order)]
            try:
                served = await client.tokens(question.plan, end - self._clock(), stream.came)
            except CallFailedError as error:
                request.wrong |= not stream.right(whole=False)
                if error.reason != NO_SERVER or self._clock() >= end:
                    request.failure = f"{error.reason}: {error.message}"
                    return
                request.cut += bool(stream.tokens)
                request.turned_away += not stream.tokens
            else:
                request.attempts = served.attempts
                request.wrong |= not stream.right(whole=True)
                return
            tries += 1
            if tries % len(order) == 0:
                await asyncio.sleep(PAUSE_SECONDS)


class _Stream:
    """The tokens of one stream."""

    def __init__(self, request: Asked, answer: tuple[int, ...], clock: Callable[[], float]) -> None:
        self.tokens: list[int] = []
        self._request = request
        self._answer = answer
        self._clock = clock
        self._last = clock()

    def came(self, tokens: Sequence[int]) -> None:
        """These came now."""
        now = self._clock()
        wait = Wait(self._last, now, first=not self.tokens)
        if wait.seconds >= NOTED_SECONDS:
            self._request.waits.append(wait)
        self._last = now
        self.tokens += tokens

    def right(self, *, whole: bool) -> bool:
        """Whether they are the answer's, all of them or its first."""
        came = tuple(self.tokens)
        return came == (self._answer if whole else self._answer[: len(came)])
