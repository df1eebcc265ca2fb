"""What changed in the set of cached keys since a consumer last asked. Books only."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoreEvents:
    """Changes of the set of cached keys; with `snapshot`, `stored` is the whole of it."""

    stored: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()
    snapshot: bool = False


class ChangeLog:
    """The net change of each key since the last answer; the first answer is a snapshot.

    However slow the consumer, there are never more changes than keys it knows plus keys there
    are. Not thread-safe; its owner serializes.
    """

    def __init__(self) -> None:
        self._changes: dict[bytes, bool] | None = None

    def note(self, keys: Iterable[bytes], *, stored: bool) -> None:
        """Keys were stored, or removed."""
        if self._changes is None:
            return
        for key in keys:
            if self._changes.get(key, stored) is not stored:
                del self._changes[key]  # It came and went, or went and came.
            else:
                self._changes[key] = stored

    def restart(self) -> None:
        """The next answer is a snapshot."""
        self._changes = None

    def drain(self, everything: Callable[[], Iterable[bytes]]) -> StoreEvents:
        """The changes, once; `everything` gives all keys for a snapshot."""
        changes, self._changes = self._changes, {}
        if changes is None:
            return StoreEvents(stored=tuple(everything()), snapshot=True)
        return StoreEvents(
            stored=tuple(k for k, stored in changes.items() if stored),
            removed=tuple(k for k, stored in changes.items() if not stored),
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

    def note(self, keys: Collection[bytes], *, stored: bool) -> None:
        """See ChangeLog."""
        for log in self._logs:
            log.note(keys, stored=stored)

    def restart(self) -> None:
        """See ChangeLog."""
        for log in self._logs:
            log.restart()
