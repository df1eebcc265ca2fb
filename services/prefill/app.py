"""The prefill process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from services.engine.worker import Role, serve_worker
from services.prefill.service import PrefillServicer
from services.runtime.settings import WorkerProcess
from tandem.prefill.v1 import prefill_pb2_grpc


async def serve(
    settings: WorkerProcess, *, ready: Callable[[str], None], stop: asyncio.Event
) -> None:
    """Runs until `stop` is set, then drains."""
    role = Role(
        name="prefill",
        service="tandem.prefill.v1.PrefillService",
        make=lambda engine: PrefillServicer(engine, settings.kv.lease_seconds),
        add=prefill_pb2_grpc.add_PrefillServiceServicer_to_server,
    )
    await serve_worker(role, settings, ready=ready, stop=stop)
