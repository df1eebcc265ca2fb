"""What a client has been given so far, and what ends it: limits, stop tokens, stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from services.engine.api import FinishReason


class Text(Protocol):
    """Turns a request's tokens into text and watches for its stop strings (text.py)."""

    def push(self, token_ids: Sequence[int]) -> tuple[int, str]:
        """How many tokens were taken, and text that is final now.

        Fewer than given are taken only where a stop string is complete: `stopped` is set then.
        """

    def finish(self) -> str:
        """What was held back, at the end of the tokens. May set `stopped`."""

    @property
    def stopped(self) -> bool:
        """A stop string was found; text ends before it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What ends a request besides its stop strings."""

    prompt_tokens: int
    max_tokens: int
    min_tokens: int
    stop_token_ids: frozenset[int]
    max_attempts: int
    final_token_ids: frozenset[int] = frozenset()
    """Of these, what ends it however few tokens came before: its form is complete."""


@dataclass(slots=True)
class Output:
    """The tokens that are the client's, and what their text goes through."""

    limits: Limits
    text: Text
    tokens: list[int] = field(default_factory=list)

    def take(
        self, token_ids: tuple[int, ...], reason: FinishReason | None
    ) -> tuple[int, str, FinishReason | None]:
        """Takes on what follows; how many of them, their text, and why they are the last, if so.

        `reason`: what the worker said of it.
        """
        token_ids = token_ids[: self.limits.max_tokens - len(self.tokens)]
        self.tokens += token_ids
        # A worker that dies with its last token still to be called the last changes nothing.
        reason = self._complete() or reason
        # The token that stops generation is the client's, but no part of the text.
        spoken = len(token_ids) - (reason is FinishReason.STOP)
        taken, text = self.text.push(token_ids[:spoken])
        if not self.text.stopped:
            return len(token_ids), text, reason
        del self.tokens[len(self.tokens) - len(token_ids) + taken :]
        return taken, text, FinishReason.STOP

    def finish(self, reason: FinishReason) -> tuple[str, FinishReason]:
        """Text that was held back, at the end, and the reason, which it may change."""
        if self.text.stopped:
            return "", reason
        rest = self.text.finish()
        return rest, FinishReason.STOP if self.text.stopped else reason

    def _complete(self) -> FinishReason | None:
        """Why the tokens taken so far are all there can be, if they are."""
        count = len(self.tokens)
        if not count:
            return None
        limits, last = self.limits, self.tokens[-1]
        if last in limits.stop_token_ids and count > limits.min_tokens:
            return FinishReason.STOP
        if last in limits.final_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if count >= self.limits.max_tokens else None
