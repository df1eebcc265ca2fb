"""`tandem serve`: one process of a cluster."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import BaseModel

from services.runtime import log, milestones, process
from services.runtime.errors import StatusError
from services.runtime.load import Given, SettingsError, load
from services.runtime.server import ListenError
from services.runtime.settings import (
    CoordinatorProcess,
    FrontendProcess,
    RankProcess,
    WorkerProcess,
)

PROCESSES: dict[str, type[BaseModel]] = {
    "coordinator": CoordinatorProcess,
    "frontend": FrontendProcess,
    "prefill": WorkerProcess,
    "decode": WorkerProcess,
    "both": WorkerProcess,
    "rank": RankProcess,
}


@dataclass(frozen=True, slots=True)
class Parent:
    """What a process that was started by `tandem up` knows of it."""

    ready_fd: int | None = None
    pid: int | None = None


def run_process(role: str, file: Path | None, flags: Sequence[Given], parent: Parent) -> int:
    """Runs one process until a signal ends it; returns its exit status. Raises SettingsError."""
    if parent.pid is not None:
        process.die_with_parent(parent.pid)
    settings, _ = load(PROCESSES[role], file, os.environ, flags)
    own = getattr(settings, "worker", None) or getattr(settings, "rank", None)
    name = getattr(own, "name", "") or role
    log.configure(settings.log, name)  # type: ignore[attr-defined]
    milestones.reached(milestones.PROCESS)
    serve = _server_of(role)
    milestones.reached(milestones.SERVICES)

    def ready(address: str) -> None:
        logging.getLogger(__name__).info("ready at %s", address)
        milestones.reached(milestones.READY)
        if parent.ready_fd is not None:
            process.notify_ready(parent.ready_fd, address)

    async def main(stop: process.Stop) -> None:
        await serve(settings, ready=ready, stop=stop)

    try:
        return process.run(main)
    except Exception as error:
        if isinstance(error, (ListenError, SettingsError, StatusError)):
            raise  # the command says it in its own words
        logging.getLogger(__name__).exception("%s ends because of an unexpected error", name)
        return 1


def _server_of(role: str) -> Callable[..., Awaitable[None]]:
    """What runs the process: `serve(settings, ready=..., stop=...)`. Imports no more than that."""
    if PROCESSES[role] is WorkerProcess:
        return partial(importlib.import_module("services.worker.app").serve, role)
    place = "engine.group" if PROCESSES[role] is RankProcess else role
    serve: Callable[..., Awaitable[None]] = importlib.import_module(f"services.{place}.app").serve
    return serve
