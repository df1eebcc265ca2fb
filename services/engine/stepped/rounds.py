"""Steps that several ranks take together.

Ranks of an expert-parallel group meet inside the model, where rows go to experts and come back: so
either all of them run a step or none does, and one without work runs it without rows. Before each
step they agree on that here. When none has work they sleep, which all know at the same time; the
first that gets some then has the others called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Round:
    """What all ranks agreed on."""

    work: bool
    """Some rank has work: all run the model."""
    draft_calls: int
    """How often all call draft() after it."""
    over: bool
    """Every rank leaves: there is no other round."""


REST = Round(work=False, draft_calls=0, over=False)


class Rounds(Protocol):
    """One rank's part in them. The step thread calls, but for called()."""

    @property
    def shared(self) -> bool:
        """There are other ranks, who wait for this one whatever happens to it."""

    @property
    def due(self) -> bool:
        """The next round has to begin, whether or not there is work here."""

    def called(self, number: int) -> None:
        """Another rank waits for this round. Any thread; numbers that were change nothing."""

    def meet(self, *, work: bool, draft_calls: int, leaving: bool) -> Round:
        """Waits for all ranks and agrees with them. Raises if one is gone."""


class Alone:
    """The rounds of an engine that computes by itself."""

    shared = due = False

    def called(self, number: int) -> None:
        """Nobody does."""

    def meet(self, *, work: bool, draft_calls: int, leaving: bool) -> Round:
        """Agrees."""
        return Round(work, draft_calls, leaving)
