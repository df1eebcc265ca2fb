"""A model from running workers, on behalf of a command that a person watches."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

from kvtransfer.weights.driving import Means
from services.engine.models import cache
from services.engine.models.convert import Progress, Stage, Watch
from services.engine.models.peers import Brought, bring
from services.runtime.settings import WorkerProcess

_STAGES: dict[str, Stage] = {"describe": "check", "check": "check", "fetch": "download"}


def fetch_from(peers: Sequence[str], settings: WorkerProcess, watch: Watch) -> Brought | None:
    """The settings' model from workers at `peers`, host:port; None if it is here already.

    Raises what bring() raises.
    """
    kv, host = settings.kv, settings.kv.tcp_host or settings.server.host
    return asyncio.run(
        bring(
            settings.model,
            cache.cache_folder(os.environ),
            peers,
            Means(kv.transports, host, stall_seconds=kv.stall_seconds),
            digest=settings.weights.digest,
            region=settings.worker.region,
            watch=lambda stage, done, total: watch(Progress(_STAGES[stage], done, max(1, total))),
            waiting=lambda: watch(Progress("wait", 0, 1)),
        )
    )
