"""What changed of where cached keys are since a consumer last asked. Books only."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass


class Where(enum.Enum):
    """Where the block of a key is, for those who are told."""

    POOL = "in the pool"
    LOWER = "only in a tier under it"
    NOWHERE = "in neither"


@dataclass(frozen=True, slots=True)
class StoreEvents:
    """Where keys are that were elsewhere; with `snapshot`, those in no list are nowhere."""

    stored: tuple[bytes, ...] = ()
    """In the pool."""
    removed: tuple[bytes, ...] = ()
    """Nowhere."""
    snapshot: bool = False
    lower: tuple[bytes, ...] = ()
    """Only in a tier."""

    def __bool__(self) -> bool:
        """Whether there is anything to tell."""
        return bool(self.stored or self.removed or self.lower or self.snapshot)


class ChangeLog:
    """The net change of each key since the last answer; the first answer is a snapshot.

    However slow the consumer, there are never more changes than keys it knows plus keys there
    are. Not thread-safe; its owner serializes.
    """

    def __init__(self) -> None:
        self._changes: dict[bytes, tuple[Where, Where]] | None = None
        """From, to; the two differ."""

    def note(self, key: bytes, before: Where, after: Where) -> None:
        """A key may have changed its place."""
        if self._changes is None or before is after:
            return
        told = self._changes.pop(key, (before, before))[0]
        if told is not after:  # Else it is back where it was.
            self._changes[key] = (told, after)

    def restart(self) -> None:
        """The next answer is a snapshot."""
        self._changes = None

    def drain(self, everything: Callable[[], Mapping[Where, Iterable[bytes]]]) -> StoreEvents:
        """The changes, once; `everything` gives all keys for a snapshot."""
        changes, self._changes = self._changes, {}
        if changes is None:
            held = everything()
            stored, lower = tuple(held[Where.POOL]), tuple(held[Where.LOWER])
            return StoreEvents(stored=stored, lower=lower, snapshot=True)
        keys: dict[Where, list[bytes]] = {where: [] for where in Where}
        for key, (_, after) in changes.items():
            keys[after].append(key)
        return StoreEvents(
            stored=tuple(keys[Where.POOL]),
            removed=tuple(keys[Where.NOWHERE]),
            lower=tuple(keys[Where.LOWER]),
        )


class ChangeLogs:
    """The logs of all consumers, which are noted alike. Not thread-safe; its owner serializes."""

    def __init__(self) -> None:
        self._logs: list[ChangeLog] = []

    def begin(self) -> ChangeLog:
        """A log for one more consumer."""
        log = ChangeLog()
        self._logs.append(log)
        return log

    def end(self, log: ChangeLog) -> None:
        """Its consumer asks no more."""
        self._logs.remove(log)

    def note(self, key: bytes, before: Where, after: Where) -> None:
        """See ChangeLog."""
        for log in self._logs:
            log.note(key, before, after)

    def restart(self) -> None:
        """See ChangeLog."""
        for log in self._logs:
            log.restart()
