"""One sequence and the form of its output: what has followed, and which tokens may follow."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from llguidance import LLMatcher
from llguidance._lib import LLParserLimits
from numpy.typing import NDArray

from services.engine.api import Guide
from services.engine.guides.grammar import FIELDS, grammar_of
from services.engine.guides.vocabulary import Vocabulary
from services.runtime.errors import GuideFailedError, InvalidRequestError

Masks = NDArray[np.uint32]
"""[rows, words]: bit t % 32 of word t // 32 is set if token t may follow."""

MASK_SECONDS = 0.25
"""CPU time that a step may take for one sequence: an ambiguous grammar can take any."""

PROBLEM_CHARACTERS = 400
"""Of what the library says, which may repeat the whole guide."""

_QUOTED = re.compile(r"\s*(\d+ \||\^+\s*$)")

# The library's defaults, but for memory: a state takes 1 to 2 kB.
_LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


class Guided:
    """Not thread-safe; masks() may run on another thread than accept(), not at the same time.

    The end-of-sequence token is allowed exactly where the output has the form, and alone where
    nothing can follow. Raises InvalidRequestError for a guide that can't be enforced, or that no
    output can have.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        guide: Guide,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._vocabulary = vocabulary
        self._grammar = grammar_of(guide)
        self._clock = cpu_clock
        self._matcher = self._compiled()
        self._tokens: list[int] = []
        self._consumed = 0
        self.failure: GuideFailedError | None = None
        """Why the sequence can't go on: set by masks(), which then allows nothing."""
        problem = self._matcher.get_error()
        if not problem:
            self.masks()
            problem = "" if self.failure is None else self.failure.message
        if problem:
            shown = guide.texts[0] if guide.texts else ""
            raise InvalidRequestError(FIELDS[guide.kind], shown, _words(problem))

    def accept(self, tokens: Iterable[int]) -> None:
        """The sequence goes on with these; whether they are of the form the next masks() says."""
        self._tokens.extend(tokens)

    def masks(self, drafts: Sequence[int] = ()) -> Masks:
        """What may follow now, and after each of the drafts if those before it are accepted.

        A row behind a draft that may not follow is never asked for, and allows everything. A row at
        which the form can't be followed any further allows nothing; `failure` says why, if that is
        the first.
        """
        rows = np.full((1 + len(drafts), self._vocabulary.words), 2**32 - 1, dtype=np.uint32)
        began = self._clock()
        problem = self._catch_up() or self._fill(rows[0])
        if not problem and self._clock() - began > MASK_SECONDS:
            problem = "the grammar takes too long to follow here"
        if problem:
            self.failure = GuideFailedError(problem)
            rows[0] = 0
            return rows
        self._look_ahead(rows, drafts)
        return rows

    def _look_ahead(self, rows: Masks, drafts: Sequence[int]) -> None:
        matcher, ahead = self._matcher, 0
        for token, row in zip(drafts, rows[1:], strict=True):
            if token in self._vocabulary.eos_token_ids or not matcher.try_consume_tokens([token]):
                break
            ahead += 1
            if self._fill(row):
                row[:] = 0
                break
        if matcher.is_error():  # which it stays in; the sequence may never get there
            self._matcher, self._consumed = self._compiled(), 0
            self._catch_up()
        elif ahead:
            matcher.rollback(ahead)

    def _catch_up(self) -> str:
        """Consumes what was accepted; what is wrong with it."""
        new = self._tokens[self._consumed :]
        if not new:
            return ""
        if self._matcher.try_consume_tokens(new) < len(new):
            return self._matcher.get_error() or "the output does not have the form"
        self._consumed = len(self._tokens)
        return ""

    def _fill(self, row: NDArray[np.uint32]) -> str:
        """Writes the present mask; why there is none."""
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if not self._matcher.is_error():
            return ""
        if "NoExtension" in self._matcher.get_error():
            return "no text of the form goes on from here"
        return f"the grammar is too complex to follow here: {self._matcher.get_error()}"

    def _compiled(self) -> LLMatcher:
        return LLMatcher(self._vocabulary.tokenizer, self._grammar, log_level=0, limits=_LIMITS)


def _words(problem: str) -> str:
    """What the library says, on one line, without the grammar that it quotes."""
    lines = (line for line in problem.splitlines() if not _QUOTED.match(line))
    return " ".join(" ".join(lines).split())[:PROBLEM_CHARACTERS]
