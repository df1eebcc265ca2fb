"""What follows a step where the model has a draft layer: its KV for the step's tokens, and drafts.

A draft is what will be sampled if the draft layer's logits are right: it is chosen for its position
as a token is. Whether it was is seen in the next step, which has a row for it; so tokens are those
that come without drafts, whatever is drafted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.engine.stepped.batch import (
    DraftBatch,
    Drafter,
    StepBatch,
    adapters_of,
    tables_of,
)
from services.engine.stepped.drafting import DraftLength
from services.engine.stepped.scheduler import Work
from services.engine.stepped.sequence import Role, Sequence

ChooseDrafts = Callable[[NDArray[np.float32]], Seq[int | None]]
"""The token that each sequence's logits give after its tokens and drafts; None: they give none."""
BeginDrafts = Callable[[Seq[Sequence]], ChooseDrafts]
"""Called before these sequences' logits are computed: what needs none can be done beside that."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """A sequence's rows in one draft() call: tokens at positions from `first` on."""

    sequence: Sequence
    first: int
    tokens: Seq[int]
    hidden: Seq[int]
    wanted: int = 0
    """Drafts that may come of these rows and later ones."""


class Drafting:
    """How much to draft, and doing it. Of one engine; belongs to its step thread."""

    def __init__(
        self,
        drafter: Drafter,
        most: int,
        block_tokens: int,
        clock: Callable[[], float],
        begin: BeginDrafts,
    ) -> None:
        """`most` tokens are drafted at once; 0: only the layer's KV is written."""
        self._drafter = drafter
        self._block_tokens = block_tokens
        self._clock = clock
        self._begin = begin
        self.length = DraftLength(most)
        self._planned = 0

    def plan(self, works: Seq[Work]) -> int:
        """How many calls of draft() follow a step, which is known before it is computed."""
        decoding = [w for w in works if w.sample and w.sequence.role is Role.DECODE]
        others = sum(w.rows for w in works) - sum(1 + len(w.drafts) for w in decoding)
        self._planned = self.length.choose(len(decoding), others)
        return max(1, self._planned)

    def computed(self, batch: StepBatch, seconds: float) -> None:
        """A step was computed, its tokens chosen, in so long; all rows may be of other ranks."""
        if not len(batch.positions):
            return
        self.length.forward.note(len(batch.positions), seconds)

    def note(self, checked: Mapping[Sequence, tuple[int, int]]) -> None:
        """Of how many drafts of each sequence it was seen whether they were right; of how many."""
        for drafts, right in checked.values():
            if drafts:
                self.length.acceptance.note(drafts, right)

    def draft(
        self, works: Seq[Work], batch: StepBatch, sensible: Mapping[Sequence, int | None]
    ) -> None:
        """Writes the layer's KV and drafts; moves `drafted` and `drafts` of sequences on.

        `works` are the batch's, computed and sampled for. `sensible` says of each sequence that was
        sampled for how many tokens to draft at most, None for one that does not go on.
        """
        began = self._clock()
        wanted = {s: min(self._planned, n) for s, n in sensible.items() if n is not None}
        self._draft(works, batch, wanted)
        self.length.drafted(batch.draft_calls, self._clock() - began)

    def _draft(self, works: Seq[Work], batch: StepBatch, wanted: Mapping[Sequence, int]) -> None:
        size = self._block_tokens
        rows = [
            _of_step(work, int(start), wanted, size)
            for work, start in zip(works, batch.query_starts, strict=False)
        ]
        rows = [r for r in rows if r.tokens]
        for call in range(batch.draft_calls):
            ends = np.cumsum([len(r.tokens) for r in rows])
            asked = [(r, int(end) - 1) for r, end in zip(rows, ends, strict=True) if r.wanted]
            choose = self._begin([r.sequence for r, _ in asked])
            logits = self._drafter.draft(_batch_of(rows, deeper=call > 0))
            if not call:
                for r in rows:
                    r.sequence.drafted = r.first + len(r.tokens)
            found = []
            for (r, row), token in zip(asked, choose(logits), strict=True):
                if token is not None:
                    r.sequence.drafts += (token,)
                    found.append(
                        _Rows(r.sequence, r.first + len(r.tokens), (token,), (row,), r.wanted - 1)
                    )
            rows = [r for r in found if r.wanted and r.first < _room(r.sequence, size)]


def _of_step(work: Work, start: int, wanted: Mapping[Sequence, int], block_tokens: int) -> _Rows:
    """What the draft layer's KV lacks of what this step gave hidden states for.

    `start` is the work's first row in it. A token sampled last has its place at once if its
    sequence goes on, and there is a block; else it is no matter, or comes with the next step.
    """
    sequence = work.sequence
    over = work.sample and sequence not in wanted
    end = min(sequence.computed + (not over), len(sequence.tokens), _room(sequence, block_tokens))
    first = sequence.drafted
    hidden = [start + j - 1 - work.first if j else -1 for j in range(first, end)]
    drafts = wanted.get(sequence, 0) if end == len(sequence.tokens) else 0
    return _Rows(sequence, first, sequence.tokens[first:end], hidden, drafts)


def _room(sequence: Sequence, block_tokens: int) -> int:
    return len(sequence.blocks) * block_tokens


def _batch_of(rows: Seq[_Rows], *, deeper: bool) -> DraftBatch:
    sequences = [r.sequence for r in rows]
    starts = np.cumsum([0, *(len(r.tokens) for r in rows)], dtype=np.int32)
    return DraftBatch(
        token_ids=np.array([t for r in rows for t in r.tokens], dtype=np.int32),
        positions=np.array(
            [r.first + i for r in rows for i in range(len(r.tokens))], dtype=np.int32
        ),
        query_starts=starts,
        block_tables=tables_of(sequences),
        logit_rows=np.array(
            [end - 1 for r, end in zip(rows, starts[1:], strict=True) if r.wanted], dtype=np.int32
        ),
        hidden_rows=np.array([h for r in rows for h in r.hidden], dtype=np.int32),
        deeper=deeper,
        adapters=adapters_of(sequences),
    )
