"""A request's tokens as text, up to its first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from services.frontend.stops import StopStrings


class Detokenizer(Protocol):
    """Of services.engine.models.text: bytes of an incomplete character are held back."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that is final now."""

    def finish(self) -> str:
        """What was held back."""


class TextStream:
    """See request.Text."""

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str]) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops) if stops else None

    @property
    def stopped(self) -> bool:
        """A stop string was found; text ends before it."""
        return self._stops is not None and self._stops.found

    def push(self, token_ids: Sequence[int]) -> tuple[int, str]:
        """How many tokens were taken, and text that is final now.

        With stop strings token by token, so that the one that completes a stop string is the last
        one taken, wherever the frame that brought it was cut.
        """
        if self._stops is None:
            return len(token_ids), self._detokenizer.push(token_ids)
        text = ""
        for count, token_id in enumerate(token_ids, start=1):
            text += self._stops.push(self._detokenizer.push((token_id,)))
            if self._stops.found:
                return count, text
        return len(token_ids), text

    def finish(self) -> str:
        """What was held back, at the end of the tokens. May set `stopped`."""
        rest = self._detokenizer.finish()
        if self._stops is None:
            return rest
        rest = self._stops.push(rest)
        return rest + self._stops.finish()
