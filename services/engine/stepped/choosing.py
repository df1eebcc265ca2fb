"""Which tokens a step brings: from logits, what is allowed, and each request's way of choosing.

A token is a function of its logits, its mask, the request's seed and its position. So drafts change
none: they are compared with what is chosen without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from services.engine.api import EngineFault, FinishReason
from services.engine.guides.guided import Mask, Masks
from services.engine.guides.threads import Computing, MaskThreads
from services.engine.stepped.drafts import ChooseDrafts
from services.engine.stepped.live import Live
from services.engine.stepped.sampler import (
    Choice,
    Occurrences,
    Row,
    choose,
    penalized,
    token_of,
)
from services.engine.stepped.scheduler import Work
from services.engine.stepped.sequence import Limits, Role, Sequence
from services.runtime.errors import AdapterFailedError


def _no_number(adapter: str) -> EngineFault:
    """An adapter's weights may do that wherever they are used; without one it is this engine."""
    words = "the model gave no number to choose a token by"
    if not adapter:
        return EngineFault("ENGINE_FAILED", words)
    words = f"with the adapter {adapter} {words}"
    return EngineFault(AdapterFailedError.reason, words, {"adapter": adapter})


@dataclass(frozen=True, slots=True)
class Gain:
    """What a step brought for a sequence that it sampled for."""

    sequence: Sequence
    choices: tuple[Choice, ...]
    reason: FinishReason | None = None
    fault: EngineFault | None = None
    drafts: tuple[int, int] = (0, 0)
    """Of it how many were compared with what was chosen, and how many of these were right."""


class Choosing:
    """For the requests in `live`. Belongs to the step thread."""

    def __init__(self, live: Mapping[int, Live], limits: Limits) -> None:
        self._live = live
        self._limits = limits
        self._masks = MaskThreads()
        self.draft_tokens = self.accepted_tokens = self.decode_steps = 0
        """As EngineStats has them."""

    def begin(self, works: Seq[Work]) -> Computing[Masks]:
        """Computes the masks of a step, until its logits are there."""
        return self._masks.begin(dict(self._wanted(works)))

    def _wanted(self, works: Seq[Work]) -> Iterable[tuple[int, Callable[[], Masks]]]:
        for work in works:
            guided = self._live[work.sequence.serial].guided
            if work.sample and guided is not None:
                yield work.sequence.serial, partial(guided.masks, work.drafts)

    def gains(
        self, works: Seq[Work], logits: NDArray[np.float32], allowed: Mapping[int, Masks]
    ) -> list[Gain]:
        """Of works that sample, in their order; their sequences go on by what is chosen.

        logits [rows, vocabulary]: for each such work one more than it has drafts.
        """
        best, row, gains = logits.argmax(axis=1), 0, []
        for work in works:
            if work.sample:
                rows = slice(row, row + 1 + len(work.drafts))
                masks = allowed.get(work.sequence.serial)
                gains.append(self._gain(work, logits[rows], best[rows], masks))
                row = rows.stop
        return gains

    def _gain(
        self,
        work: Work,
        logits: NDArray[np.float32],
        best: NDArray[np.intp],
        masks: Masks | None,
    ) -> Gain:
        """Chooses a token, and one more for each draft that was the token chosen.

        Each is chosen as it would be without drafts: after those before it were appended, for its
        position, and not after one that ends the request.
        """
        sequence = work.sequence
        choices: list[Choice] = []
        reason, fault, right = None, None, 0
        known = 1 + len(work.drafts) if masks is None else len(masks)
        for row, draft in enumerate((*work.drafts, None)):
            allowed = None if masks is None else masks[row]
            choice = self._choose(sequence, allowed, logits[row], int(best[row]))
            if choice is None:
                reason, fault = FinishReason.ERROR, self._no_choice(sequence)
                break
            choices.append(choice)
            sequence.append((choice.token,))
            self._follow(sequence, choice.token)
            right += choice.token == draft
            reason = sequence.finished(self._limits)
            if reason is not None or choice.token != draft or row + 1 == known:
                break
            sequence.computed += 1
        checked = min(len(work.drafts), len(choices))
        if sequence.role is Role.DECODE:
            self.decode_steps += 1
            self.draft_tokens += len(work.drafts)
            self.accepted_tokens += right
        return Gain(sequence, tuple(choices), reason, fault, (checked, right))

    def _choose(
        self, sequence: Sequence, allowed: Masks | None, logits: NDArray[np.float32], best: int
    ) -> Choice | None:
        return choose(self._row(sequence, (), allowed), logits, best)

    def _follow(self, sequence: Sequence, token: int) -> None:
        guided = self._live[sequence.serial].guided
        if guided is not None and token not in self._limits.eos_token_ids:
            guided.accept((token,))

    def _no_choice(self, sequence: Sequence) -> EngineFault:
        guided = self._live[sequence.serial].guided
        if guided is not None and guided.failure is None:
            # It may have been at a draft.
            self._masks.begin({sequence.serial: guided.masks}).result()
        if guided is None or guided.failure is None:
            return _no_number(sequence.request.adapter)
        failure = guided.failure
        return EngineFault(failure.reason, failure.message, failure.metadata)

    def draftable(self, gain: Gain) -> int | None:
        """How many tokens it makes sense to draft; None: the sequence does not go on."""
        sequence = gain.sequence
        if gain.reason is not None or sequence.role is Role.PREFILL:
            return None
        return sequence.left(self._limits) - 1

    def begin_drafts(self, sequences: Seq[Sequence]) -> ChooseDrafts:
        """See drafts.BeginDrafts: masks are computed beside the draft layer."""
        looks = self._masks.begin(
            {
                s.serial: partial(guided.look, s.drafts)
                for s in sequences
                if (guided := self._live[s.serial].guided) is not None
            }
        )

        def choose(logits: NDArray[np.float32]) -> list[int | None]:
            allowed = looks.result()
            return [
                self._draft(sequence, allowed, values)
                for sequence, values in zip(sequences, logits, strict=True)
            ]

        return choose

    def _draft(
        self, sequence: Sequence, looks: Mapping[int, Mask | None], logits: NDArray[np.float32]
    ) -> int | None:
        allowed = looks.get(sequence.serial)
        if allowed is None and sequence.serial in looks:
            return None
        return token_of(self._row(sequence, sequence.drafts, allowed), logits, int(logits.argmax()))

    def _row(
        self,
        sequence: Sequence,
        drafts: tuple[int, ...] = (),
        allowed: NDArray[np.uint32] | None = None,
    ) -> Row:
        """For the token after a sequence's own and drafts, which penalties don't know."""
        sampling = sequence.request.sampling
        live = self._live[sequence.serial]
        if penalized(sampling):
            if live.occurrences is None:
                live.occurrences = Occurrences(sequence.request.prompt_token_ids)
            live.occurrences.follow(sequence.tokens)
        forbidden: frozenset[int] = frozenset()
        if sequence.outputs + len(drafts) < sampling.min_tokens:
            forbidden = frozenset(sampling.stop_token_ids)
            if not sampling.ignore_eos:
                forbidden |= self._limits.eos_token_ids
        position = len(sequence.tokens) + len(drafts)
        return Row(sampling, position, live.occurrences, forbidden, allowed)
