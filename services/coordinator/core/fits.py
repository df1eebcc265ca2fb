"""What engine steps and prompts take, fitted to what workers report. Small, pure, O(1) a report.

Both fits are of all workers of a kind together: these see more different batches and prompts than
one worker does. What makes one worker slower or faster than its kind is a factor of its own
(predict.py). Errors are relative, a step's to what is nominal for its batch, so no measurement
gets weight by being small; a measurement counts half as much after the fit's half-life; and a
prior is part of every fit, as points that don't age. Whatever is measured, fits stay finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from services.coordinator.core.ranks import NOMINAL_STEP, StepCost

STEP_HALF_LIFE = 60.0
"""Seconds."""
PROMPT_HALF_LIFE = 300.0
"""Prompts are reported when they end, so there are fewer of them."""
SOLVE_EVERY = 1.0
"""Seconds between two solutions of a fit, once it has some data."""

_KV_UNIT = 10_000.0
"""Tokens: makes the three terms of a step alike in size."""
_ENOUGH = 32
"""Recent measurements of steps that a fit needs to say what is far off."""
_STEP_BOUND = 2.0
"""A step that took more than this many times what the fit says, or less than that part of it, is
counted as that. What makes one worker differ more is a factor of its own (predict.py). So of n > 2
workers that report as often as each other, one that reports whatever it likes can hold the fit of
the others' steps at no more than (n - 1) / (n - 2) of what they take, and no less than
(2n - 2) / (2n - 1).
"""
_LEAST_SECONDS, _MOST_SECONDS = 1e-6, 1e4
_MOST_COUNT = 1e12
"""Beyond these no step, batch or context is real, and sums of squares would be near infinity."""
_PRIOR_WEIGHT = 0.1
"""Of each of a prior's points, where a new measurement has 1."""
_CONTEXT_UNIT = 10_000.0
_PROMPT_PRIOR = (2 * _PRIOR_WEIGHT, _PRIOR_WEIGHT, _PRIOR_WEIGHT)
"""Sums over its two points, factor 1 with a context of none and of one unit."""
_RELATIVE_BOUND = 8.0
"""A prompt that took more than this many times what was expected, or less than that part of it, is
counted as that: something else held it up."""


class StepFit:
    """Seconds of a step: base, and for each request and token of KV; none of them negative.

    The prior has the shape of NOMINAL_STEP at the speed that is measured, for the mean batch, for
    that batch without KV, and for none. So with one size of batch alone the mean is right, and the
    slopes are the nominal ones.
    """

    __slots__ = ("_at", "_cost", "_matrix", "_scale", "_solved", "_vector", "_weight")

    def __init__(self) -> None:
        self._at = 0.0
        self._weight = 0.0
        self._scale = 0.0
        self._matrix = [0.0] * 6
        self._vector = [0.0] * 3
        self._cost: StepCost | None = None
        self._solved = 0.0

    def add(self, requests: float, kv_tokens: float, seconds: float, now: float) -> None:
        """A step with so many requests, which had KV for so many tokens, took so long (> 0)."""
        requests, kv_tokens = (
            _clamped(requests, 0, _MOST_COUNT),
            _clamped(kv_tokens, 0, _MOST_COUNT),
        )
        seconds = _clamped(seconds, _LEAST_SECONDS, _MOST_SECONDS)
        kept = 0.5 ** (max(0.0, now - self._at) / STEP_HALF_LIFE)
        self._at = max(now, self._at)
        known = self.cost if self._weight >= _ENOUGH else None
        if known is not None and (expected := known.seconds(requests, kv_tokens)) > 0:
            seconds = _clamped(seconds, expected / _STEP_BOUND, expected * _STEP_BOUND)
        self._weight = kept * self._weight + 1.0
        nominal = NOMINAL_STEP.seconds(requests, kv_tokens)
        self._scale = kept * self._scale + seconds / nominal
        matrix, vector = self._matrix, self._vector
        r, k = requests, kv_tokens / _KV_UNIT
        w = 1 / nominal**2
        for i, product in enumerate((1.0, r, k, r * r, r * k, k * k)):
            matrix[i] = kept * matrix[i] + w * product
        for i, product in enumerate((1.0, r, k)):
            vector[i] = kept * vector[i] + w * product * seconds
        if self._weight < _ENOUGH or now - self._solved >= SOLVE_EVERY:
            self._cost, self._solved = None, now

    @property
    def cost(self) -> StepCost | None:
        """What a step takes; None before the first report."""
        if self._cost is None and self._weight:
            base, request, kv = self._solve()
            self._cost = StepCost(base, request, kv / _KV_UNIT)
        return self._cost

    def _solve(self) -> list[float]:
        matrix, vector = list(self._matrix), list(self._vector)
        scale = self._scale / self._weight
        mean, kv = matrix[1] / matrix[0], matrix[2] / matrix[0]
        for r, k in ((0.0, 0.0), (mean, 0.0), (mean, kv)):
            nominal = NOMINAL_STEP.seconds(r, k * _KV_UNIT)
            seconds = scale * nominal
            w = _PRIOR_WEIGHT / nominal**2
            for i, product in enumerate((1.0, r, k, r * r, r * k, k * k)):
                matrix[i] += w * product
            for i, product in enumerate((1.0, r, k)):
                vector[i] += w * product * seconds
        m = matrix
        return least_squares([[m[0], m[1], m[2]], [m[1], m[3], m[4]], [m[2], m[4], m[5]]], vector)


class PromptFit:
    """How much longer a prompt takes than its tokens at its worker's rate: a + b x mean context.

    The rate is what the worker measured over its latest prompts, of whatever length they were; the
    attention of a longer one costs more. The mean context of a prompt is what is cached, and half
    of what is computed. The prior: no longer, at any length.
    """

    __slots__ = ("_at", "_matrix", "_solution", "_vector")

    def __init__(self) -> None:
        self._at = 0.0
        self._matrix = list(_PROMPT_PRIOR)
        self._vector = list(_PROMPT_PRIOR[:2])
        self._solution: list[float] | None = None

    def add(self, mean_context: float, factor: float, now: float) -> None:
        """A prompt took `factor` (> 0) times its tokens over the worker's rate."""
        kept = 0.5 ** (max(0.0, now - self._at) / PROMPT_HALF_LIFE)
        self._at = max(now, self._at)
        y = _clamped(factor, 1 / _RELATIVE_BOUND, _RELATIVE_BOUND)
        x = _clamped(mean_context, 0.0, _MOST_COUNT) / _CONTEXT_UNIT
        matrix, vector, w = self._matrix, self._vector, 1 / y**2
        # Without the prior's part, which does not age.
        for i, product in enumerate((1.0, x, x * x)):
            prior = _PROMPT_PRIOR[i]
            matrix[i] = prior + kept * (matrix[i] - prior) + w * product
        for i, product in enumerate((1.0, x)):
            prior = _PROMPT_PRIOR[i]
            vector[i] = prior + kept * (vector[i] - prior) + w * product * y
        self._solution = None

    def factor(self, mean_context: float) -> float:
        """Times its tokens over the worker's rate that a prompt is expected to take."""
        if self._solution is None:
            m = self._matrix
            self._solution = least_squares([[m[0], m[1]], [m[1], m[2]]], self._vector)
        a, b = self._solution
        return a + b * mean_context / _CONTEXT_UNIT


def _clamped(value: float, least: float, most: float) -> float:
    return max(least, min(value, most))


def least_squares(matrix: Sequence[Sequence[float]], vector: Sequence[float]) -> list[float]:
    """The x >= 0 that makes x'Ax - 2b'x least; A [n, n] positive definite, b [n], n at most 3.

    Of all choices of the terms that are not 0, the best without a negative one: that is exact.
    """
    size = len(vector)
    best, gain = [0.0] * size, 0.0
    for count in range(size, 0, -1):
        for terms in combinations(range(size), count):
            found = _solve(
                [[matrix[i][j] for j in terms] for i in terms], [vector[i] for i in terms]
            )
            if found is None or min(found) < 0:
                continue
            gained = sum(vector[i] * x for i, x in zip(terms, found, strict=True))
            if gained > gain:
                best, gain = [0.0] * size, gained
                for i, x in zip(terms, found, strict=True):
                    best[i] = x
        if gain and count == size:
            break
    return best


def _solve(matrix: list[list[float]], vector: list[float]) -> list[float] | None:
    """By elimination; None if it is singular. Takes its arguments apart."""
    size = len(vector)
    for i in range(size):
        if matrix[i][i] <= 1e-12:
            return None
        for j in range(i + 1, size):
            factor = matrix[j][i] / matrix[i][i]
            for k in range(i, size):
                matrix[j][k] -= factor * matrix[i][k]
            vector[j] -= factor * vector[i]
    found = [0.0] * size
    for i in reversed(range(size)):
        rest = sum(matrix[i][k] * found[k] for k in range(i + 1, size))
        found[i] = (vector[i] - rest) / matrix[i][i]
    return found
