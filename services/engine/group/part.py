"""What an engine knows of the group that it is a rank of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's. All may be called on any thread."""

    rank: int
    ranks: int
    host: str
    """Address to listen on for the other ranks."""
    announce: Callable[[str], None]
    """Of rank 0: tells the others where its store is, host:port."""
    find: Callable[[], str]
    """Of the others: waits until they were told. Raises EngineFailedError if they will not be."""
    want_round: Callable[[int], None]
    """Has the others called to a round, see stepped/rounds.py."""
