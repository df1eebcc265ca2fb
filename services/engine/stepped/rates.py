"""How fast the engine is, as measured."""

from __future__ import annotations

_WEIGHT = 0.1
"""Of the newest measurement in a moving average."""
_LEAST_CHUNK = 16
"""Prompt tokens that a step must have for its speed to say something about prompts."""


class Rates:
    """Moving averages over steps that computed something."""

    def __init__(self) -> None:
        self.step_seconds = 0.0
        self._seconds_per_prompt_token = 0.0
        self._largest = 0
        self._least_of_largest = 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        """While busy with prompts; 0 before the first."""
        if not self._seconds_per_prompt_token:
            return 0.0
        return 1.0 / self._seconds_per_prompt_token

    def step(self, prompt_tokens: int, seconds: float) -> None:
        """A step that computed this many prompt tokens has taken this long."""
        self.step_seconds = _moved(self.step_seconds, seconds)
        if prompt_tokens >= _LEAST_CHUNK:
            each = seconds / prompt_tokens
            self._seconds_per_prompt_token = _moved(self._seconds_per_prompt_token, each)
            self._note_least(prompt_tokens, seconds)

    def least_seconds(self, tokens: int, chunk_tokens: int) -> float:
        """What computing so many prompt tokens takes at the very least, in steps of chunk_tokens.

        A lower bound for whoever gives up what can't be done in time: a step takes no less than
        the fastest that computed as many tokens or fewer. 0 before anything was measured.
        """
        return self._least_of_largest * tokens / max(chunk_tokens, self._largest, 1)

    def _note_least(self, prompt_tokens: int, seconds: float) -> None:
        if prompt_tokens > self._largest + self._largest // 8:
            self._largest, self._least_of_largest = prompt_tokens, seconds
        elif prompt_tokens > self._largest - self._largest // 8:
            self._least_of_largest = min(self._least_of_largest, seconds)


def _moved(average: float, value: float) -> float:
    return value if average == 0.0 else average + _WEIGHT * (value - average)
