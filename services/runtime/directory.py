"""Where processes find each other: who the coordinators are, and that this process is there.

A directory is advice. Whether a coordinator is there is for the connection to it to find out: one
that is off the list and answers is as good as one that is on it, and whoever can't ask the
directory goes on with what it knows.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from services.runtime.load import SettingsError
from services.runtime.settings import DirectorySettings


class Kind(enum.StrEnum):
    """Kinds of processes, as etcd's keys name them."""

    COORDINATOR = "coordinators"
    WORKER = "workers"
    FRONTEND = "frontends"


@dataclass(frozen=True, slots=True)
class Member:
    """A process. `address`: host:port of its gRPC server."""

    kind: Kind
    member_id: str
    address: str


class Directory(Protocol):
    """One per process; use from one event loop."""

    @property
    def coordinators(self) -> tuple[str, ...]:
        """host:port of each coordinator, as far as is known; sorted."""

    async def changed(self, known: tuple[str, ...]) -> tuple[str, ...]:
        """The coordinators, once they are others than `known`."""

    def join(self, member: Member) -> None:
        """Lists this process, from soon on, until close()."""

    async def close(self) -> None:
        """Takes this process off the list; nothing is awaited for long."""


class Known:
    """A list of coordinators that can be waited for."""

    def __init__(self, coordinators: Sequence[str]) -> None:
        self.coordinators = tuple(sorted(set(coordinators)))
        self._turn = asyncio.Event()

    def set(self, coordinators: Sequence[str]) -> bool:
        """Takes on a list; whether it is another one."""
        new = tuple(sorted(set(coordinators)))
        if new == self.coordinators:
            return False
        self.coordinators = new
        self._turn.set()
        self._turn = asyncio.Event()
        return True

    async def changed(self, known: tuple[str, ...]) -> tuple[str, ...]:
        """See Directory."""
        while self.coordinators == known:
            await self._turn.wait()
        return self.coordinators


class StaticDirectory:
    """The coordinators that the settings name, and no others, ever."""

    def __init__(self, coordinators: Sequence[str]) -> None:
        self._known = Known(coordinators)

    @property
    def coordinators(self) -> tuple[str, ...]:
        """See Directory."""
        return self._known.coordinators

    async def changed(self, known: tuple[str, ...]) -> tuple[str, ...]:
        """See Directory."""
        return await self._known.changed(known)

    def join(self, member: Member) -> None:
        """See Directory. There is no list to be put on."""

    async def close(self) -> None:
        """See Directory."""


def directory(settings: DirectorySettings, coordinators: Sequence[str] | None) -> Directory:
    """The one that the settings ask for. On an event loop.

    `coordinators`: those to begin with; None for a coordinator, which looks for none.
    Raises SettingsError if there is nowhere to look.
    """
    if settings.etcd:
        from services.runtime.directory_etcd import EtcdDirectory

        return EtcdDirectory(settings, coordinators or ())
    if coordinators is not None and not coordinators:
        raise SettingsError(
            "no coordinator is named: set worker.coordinator and frontend.coordinator, or "
            "directory.etcd"
        )
    return StaticDirectory(coordinators or ())
