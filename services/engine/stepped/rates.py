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


def _moved(average: float, value: float) -> float:
    return value if average == 0.0 else average + _WEIGHT * (value - average)
