"""Ranks as processes on this host: they are started here, and end with us, however we end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Protocol

from services.runtime.settings import LogSettings, RankProcess, RankSettings, ServerSettings

log = logging.getLogger(__name__)


class Launch(Protocol):
    """How ranks come to be."""

    async def start(
        self, address: str, ranks: Iterable[int], ended: Callable[[int, str], None]
    ) -> None:
        """Starts these, to meet at `address`; `ended` is called with one that is over, and how."""

    async def end(self, grace_seconds: float) -> None:
        """Waits for all to be gone, and kills those that take longer. Idempotent."""


class ByHand:
    """They are started by somebody else, on hosts that can reach us."""

    async def start(
        self, address: str, ranks: Iterable[int], ended: Callable[[int, str], None]
    ) -> None:
        """Says what to start."""
        for rank in ranks:
            log.info("waiting for: tandem serve rank --group %s --rank %d", address, rank)

    async def end(self, grace_seconds: float) -> None:
        """They end when our stream does."""


class Processes:
    """Child processes of this one. They write to its log."""

    def __init__(self, logs: LogSettings, name: str) -> None:
        """`name` is the worker's, in logs."""
        self._logs = logs
        self._name = name
        self._running: dict[int, asyncio.subprocess.Process] = {}
        self._watches: list[asyncio.Task[None]] = []

    async def start(
        self, address: str, ranks: Iterable[int], ended: Callable[[int, str], None]
    ) -> None:
        """See Launch. Call on the main thread, with which they die."""
        for rank in ranks:
            settings = RankProcess(
                server=ServerSettings(),
                log=self._logs,
                rank=RankSettings(group=address, number=rank, name=f"{self._name}:{rank}"),
            )
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # what stands in the current folder is not ours to import
                "-m",
                "services.engine.group",
                settings.model_dump_json(),
                str(os.getpid()),
                # Held open by us: where there is no PDEATHSIG, its end tells them of ours.
                stdin=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C in a terminal is for us
            )
            self._running[rank] = process
            self._watches.append(asyncio.create_task(self._watch(rank, process, ended)))

    async def _watch(
        self, rank: int, process: asyncio.subprocess.Process, ended: Callable[[int, str], None]
    ) -> None:
        code = await process.wait()
        del self._running[rank]
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        ended(rank, f"its process {how}")

    async def end(self, grace_seconds: float) -> None:
        """See Launch."""
        if self._watches and grace_seconds > 0:
            await asyncio.wait(self._watches, timeout=grace_seconds)
        for process in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await asyncio.gather(*self._watches)
