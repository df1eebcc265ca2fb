"""The answers to one request, under one name: begun together, ended together.

The first answer to a prompt goes ahead; the others to it begin when it has its first token, and so
find the prompt's KV.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from services.engine.api import FinishReason, TokenLogprob
from services.frontend.answers.deltas import Content, Delta
from services.frontend.live import LiveRequest, Piece
from services.frontend.openai.answer import AnswerText

T = TypeVar("T")

_MASK64 = 2**64 - 1


@dataclass(slots=True)
class Choice:
    """One answer, to the prompt of that index. `text`: None if there is nothing to parse."""

    index: int
    prompt: int
    live: LiveRequest
    text: AnswerText | None = None

    async def next(self) -> Part:
        """What came since the last call; waits for it. Raises what ended the request."""
        piece = await self.live.piece()
        return self._part(piece)

    async def whole(self) -> Part:
        """Everything, at the end."""
        piece = await self.live.whole()
        return self._part(piece)

    def _part(self, piece: Piece) -> Part:
        """Made at once: a moment later there may be more, and an end."""
        live, text, logprobs = self.live, self.text, piece.logprobs
        said = [Content(piece.text)] if piece.text else []
        deltas = said if text is None else text.take()
        reason = live.finish_reason
        if reason is None:
            return Part(self, deltas, logprobs)
        if logprobs and reason is FinishReason.STOP and not live.core.taken.text.stopped:
            # Of the token that ends the answer, which is no part of it.
            logprobs = logprobs[:-1]
        why = "length" if reason is FinishReason.LENGTH else "stop"
        if why == "stop" and text is not None and text.calls:
            why = "tool_calls"
        return Part(self, deltas, logprobs, why)


@dataclass(frozen=True, slots=True)
class Part:
    """Some of an answer. `finish_reason`: in OpenAI's words, of the last part."""

    choice: Choice
    deltas: Sequence[Delta]
    logprobs: Sequence[TokenLogprob]
    finish_reason: str = ""


Start = Callable[[int, int, int], Choice]
"""Begins an answer: (index, prompt, which of the prompt's answers it is)."""


class Choices:
    """`n` answers to each of `prompts`. Call close() at the end, in any case."""

    def __init__(self, start: Start, prompts: int, n: int) -> None:
        self._start = start
        self._n = n
        self._firsts = [start(prompt * n, prompt, 0) for prompt in range(prompts)]
        self._others: list[Choice] = []

    @property
    def all(self) -> list[Choice]:
        """Those that have begun, by index."""
        return sorted([*self._firsts, *self._others], key=lambda choice: choice.index)

    @property
    def firsts(self) -> Sequence[Choice]:
        """Of each prompt."""
        return self._firsts

    def close(self) -> None:
        """Ends those that have not ended."""
        for choice in (*self._firsts, *self._others):
            choice.live.close()

    async def whole(self) -> list[Part]:
        """All answers, by index. Raises the first error of any."""
        if len(self._firsts) * self._n == 1:
            return [await self._firsts[0].whole()]
        found = await _together(self._answers(first) for first in self._firsts)
        return [part for parts in found for part in parts]

    async def parts(self) -> AsyncGenerator[Part]:
        """As they come. Raises the first error of any, once what came before it was taken."""
        if len(self._firsts) * self._n == 1:
            last = False
            while not last:
                part = await self._firsts[0].next()
                last = bool(part.finish_reason)
                yield part
            return
        ahead = {choice.index for choice in self._firsts}
        waiting = {_next(choice) for choice in self._firsts}
        try:
            while waiting:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                parts = sorted((t.result() for t in done), key=lambda part: part.choice.index)
                for part in parts:
                    if not part.finish_reason:
                        waiting.add(_next(part.choice))
                    if part.choice.index in ahead:
                        ahead.remove(part.choice.index)
                        others = self._begin_others(part.choice)
                        waiting |= {_next(other) for other in others}
                for part in parts:
                    yield part
        finally:
            for task in waiting:
                task.cancel()

    async def _answers(self, first: Choice) -> list[Part]:
        """Of one prompt."""
        await first.live.begun()
        return await _together(c.whole() for c in (first, *self._begin_others(first)))

    def _begin_others(self, first: Choice) -> list[Choice]:
        others = [self._start(first.index + k, first.prompt, k) for k in range(1, self._n)]
        self._others += others
        return others


def _next(choice: Choice) -> asyncio.Task[Part]:
    task = asyncio.create_task(choice.next())
    task.add_done_callback(_seen)
    return task


def _seen(task: asyncio.Task[Part]) -> None:
    """Of several that fail at once one is raised; without this asyncio logs the others as bugs."""
    if not task.cancelled():
        task.exception()


async def _together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results; the first error ends the others."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def seed_of(seed: int, answer: int) -> int:
    """Of a prompt's answers: the first has the request's own, others one mixed of it.

    So neighbouring seeds have no answer in common (SplitMix64, Steele et al. 2014).
    """
    if not answer:
        return seed
    z = (seed + answer * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)
