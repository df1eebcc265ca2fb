"""The decode process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from services.decode.service import DecodeServicer
from services.engine.worker import Role, serve_worker
from services.runtime.settings import WorkerProcess
from tandem.decode.v1 import decode_pb2_grpc


async def serve(
    settings: WorkerProcess, *, ready: Callable[[str], None], stop: asyncio.Event
) -> None:
    """Runs until `stop` is set, then drains."""
    role = Role(
        name="decode",
        service="tandem.decode.v1.DecodeService",
        make=DecodeServicer,
        add=decode_pb2_grpc.add_DecodeServiceServicer_to_server,
    )
    await serve_worker(role, settings, ready=ready, stop=stop)
