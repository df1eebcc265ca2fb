"""One sequence and the form of its output: what has followed, and which tokens may follow."""

from __future__ import annotations

import copy
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
Mask = NDArray[np.uint32]
"""One row of them."""

MASK_SECONDS = 0.25
"""CPU time that a sequence's mask may take, and those behind its drafts together: an ambiguous
grammar can take any."""
EACH_SECONDS = 0.01
"""Of this a sequence may have for each of its masks in the long run: some 20 times what most take.
All others wait for the slowest of a step."""
SAVED_SECONDS = 1.0
"""What a sequence begins with, and may save up: the first masks of a form take the longest."""

PROBLEM_CHARACTERS = 400
"""Of what the library says, which may repeat the whole guide."""

_INSIDE = re.compile(r"^<.*", re.MULTILINE | re.DOTALL)
"""What the library says of its own state, behind what is wrong."""
_QUOTED = re.compile(r"\s*(\d+ \||\^+\s*$)")

# The library's defaults, but for memory: a state takes 1 to 2 kB.
_LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


class _Allowance:
    """CPU time for masks of one sequence."""

    def __init__(self) -> None:
        self._left = SAVED_SECONDS

    def spend(self, seconds: float, tokens: int) -> bool:
        """For the masks of so many tokens, at one time. Whether that was not too much."""
        self._left = min(SAVED_SECONDS, self._left + EACH_SECONDS * tokens) - seconds
        return seconds <= MASK_SECONDS and self._left >= 0


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
        self._clock = cpu_clock
        grammar = grammar_of(guide)
        self._blank = LLMatcher(vocabulary.tokenizer, grammar, log_level=0, limits=_LIMITS)
        problem = self._blank.get_error()
        if not problem:
            self._begin()
            self.masks()
            problem = "" if self.failure is None else self.failure.message
        if problem:
            shown = guide.texts[0] if guide.texts else ""
            raise InvalidRequestError(FIELDS[guide.kind], shown, _words(problem))

    def again(self) -> Guided:
        """The same form for another sequence, without compiling it. Any thread."""
        other = copy.copy(self)
        other._begin()
        return other

    def _begin(self) -> None:
        self._matcher = self._blank.deep_copy()
        self._tokens: list[int] = []
        self._consumed = 0
        self._broken = ""
        self._looks = True
        self._allowance = _Allowance()
        self._ahead = _Allowance()
        """For looking ahead, which must not end who would go on without it."""
        self.failure: GuideFailedError | None = None
        """Why the sequence can't go on: set by masks(), which then allows nothing."""

    def accept(self, tokens: Iterable[int]) -> None:
        """The sequence goes on with these; whether they are of the form the next masks() says."""
        self._tokens.extend(tokens)

    def masks(self, drafts: Sequence[int] = ()) -> Masks:
        """What may follow now, and after each of the drafts if those before it are accepted.

        The rows end where a draft may not follow, or where looking further takes too long; the
        first is always there. One at which the form can't be followed any further allows nothing;
        `failure` says why, if that is the first.
        """
        rows = np.empty((1 + len(drafts), self._vocabulary.words), dtype=np.uint32)
        self.failure = None
        began, new = self._clock(), len(self._tokens) - self._consumed
        problem = self._catch_up() or self._fill(rows[0])
        if not self._allowance.spend(self._clock() - began, max(1, new)) and not problem:
            problem = "the grammar takes too long to follow here"
        if problem:
            self.failure = GuideFailedError(problem)
            rows[0] = 0
            return rows[:1]
        return rows[: 1 + self._look_ahead(rows[1:], drafts)]

    def look(self, drafts: Sequence[int]) -> Mask | None:
        """What may follow after drafts; None: they may not follow, or it takes too long to say.

        What comes of it is for masks() to judge, when the sequence has got there.
        """
        if not self._looks or self._catch_up():
            return None
        rows = np.empty((1, self._vocabulary.words), dtype=np.uint32)
        if drafts:
            found = self._look_ahead(rows, drafts, last=True) == 1
        else:
            began = self._clock()
            found = not self._fill(rows[0])
            self._looks = self._ahead.spend(self._clock() - began, 1)
        return rows[0] if found else None

    def _look_ahead(self, rows: Masks, drafts: Sequence[int], *, last: bool = False) -> int:
        """Fills a row behind each draft, or behind the last alone; how many it has filled.

        Who was slow once is not looked ahead for again: a sequence without drafts is judged by
        each mask that it comes to.
        """
        filled = ahead = 0
        began = self._clock()
        for token in drafts if self._looks else ():
            if token in self._vocabulary.eos_token_ids:
                break
            if not self._matcher.try_consume_tokens([token]):
                break
            ahead += 1
            if last and ahead < len(drafts):
                continue
            problem = self._fill(rows[filled])
            if self._clock() - began > MASK_SECONDS:
                self._looks = False
                break
            filled += 1
            if problem:
                rows[filled - 1] = 0
                break
        if ahead and self._looks:
            self._looks = self._ahead.spend(self._clock() - began, filled)
        self._return(ahead)
        return filled

    def _return(self, ahead: int) -> None:
        """To where the sequence is."""
        if self._matcher.is_error():  # which it stays in; the sequence may never get there
            self._matcher, self._consumed = self._blank.deep_copy(), 0
            self._catch_up()
        elif ahead:
            self._matcher.rollback(ahead)

    def _catch_up(self) -> str:
        """Consumes what was accepted; what is wrong with it, which stays wrong."""
        new = self._tokens[self._consumed :]
        if new and not self._broken:
            if self._matcher.try_consume_tokens(new) < len(new):
                words = _words(self._matcher.get_error())
                self._broken = words or "the output does not have the form"
            self._consumed = len(self._tokens)
        return self._broken

    def _fill(self, row: NDArray[np.uint32]) -> str:
        """Writes the present mask; why there is none."""
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if not self._matcher.is_error():
            return ""
        if "NoExtension" in self._matcher.get_error():
            return "no text of the form goes on from here"
        return f"the grammar is too complex to follow here: {_words(self._matcher.get_error())}"


def _words(problem: str) -> str:
    """What the library says, on one line, without the grammar that it quotes."""
    told = _INSIDE.sub("", problem).splitlines()
    lines = (line for line in told if not _QUOTED.match(line))
    return " ".join(" ".join(lines).split())[:PROBLEM_CHARACTERS]
