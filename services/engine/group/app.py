"""The process of one rank."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable

from services.engine.build import build_rank, compute_along
from services.engine.group.rank import Rank
from services.runtime.errors import EngineFailedError
from services.runtime.load import SettingsError
from services.runtime.settings import RankProcess

log = logging.getLogger(__name__)

LOST = 70
"""Exit status of a rank whose group has ended (EX_SOFTWARE)."""


async def serve(
    settings: RankProcess, *, ready: Callable[[str], None], stop: asyncio.Event
) -> None:
    """Is a rank until its leader has it end, or `stop`, which ends its whole group.

    If the group ends otherwise the process does at once: the engine's thread may be in an exchange
    that nothing ends.
    """
    if not settings.rank.group:
        raise SettingsError("rank.group: host:port of the worker is needed (--group)")
    rank = Rank(settings.rank, settings.server, build_rank, compute_along)
    running = asyncio.create_task(rank.run(ready))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    try:
        if not running.done():
            log.info("this rank leaves, and ends its group")
            _exit(0)
        running.result()
    except EngineFailedError as error:
        log.error("this rank ends: %s", error.message)
        _exit(LOST)


def _exit(code: int) -> None:
    for handler in logging.getLogger().handlers:
        with contextlib.suppress(OSError):
            handler.flush()
    os._exit(code)
