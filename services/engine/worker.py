"""What both worker processes are: an engine behind a gRPC server, in a cluster."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc

from services.engine.api import Engine, TokenOutput
from services.engine.build import build
from services.engine.regions import export_policy
from services.engine.registration import Registration, WorkerIdentity
from services.runtime.channels import Channels
from services.runtime.errors import EngineFailedError
from services.runtime.server import Server
from services.runtime.settings import WorkerProcess
from tandem.kvtransfer.v1 import kvtransfer_pb2_grpc

log = logging.getLogger(__name__)

DRAIN_POLL_SECONDS = 0.05
FRAME_SECONDS = 1.0
"""Time for the last frames to reach their frontends once a drain has handed requests back."""


class WorkerServicer(Protocol):
    """What a role's servicer does beside serving its calls."""

    @property
    def live(self) -> int:
        """Requests taken on and not finished."""

    def deliver(self, outputs: tuple[TokenOutput, ...]) -> None:
        """One engine step's outputs."""

    def drain(self) -> None:
        """Takes no new requests."""

    def hand_back(self) -> None:
        """Gives what still runs back to the frontends."""


@dataclass(frozen=True, slots=True)
class Role:
    """How prefill and decode differ as processes."""

    name: str
    service: str
    make: Callable[[Engine], WorkerServicer]
    add: Callable[[Any, grpc.aio.Server], None]


async def serve_worker(
    role: Role, settings: WorkerProcess, *, ready: Callable[[str], None], stop: asyncio.Event
) -> None:
    """Loads the engine, serves, registers, and calls `ready`; on `stop` drains and closes.

    Raises EngineFailedError if the engine's output ends while the process should serve: a worker
    that can't generate must not look alive.
    """
    kv = settings.kv
    if kv.disk_tier_folder:
        folder = Path(kv.disk_tier_folder) / (settings.worker.name or role.name)
        kv = kv.model_copy(update={"disk_tier_folder": str(folder)})
    engine = build(
        settings.model, settings.engine, kv, settings.server.host, settings.worker.region
    )
    await engine.start()
    try:
        await _serve_engine(role, engine, settings, ready, stop)
    finally:
        await engine.close()


async def _serve_engine(
    role: Role,
    engine: Engine,
    settings: WorkerProcess,
    ready: Callable[[str], None],
    stop: asyncio.Event,
) -> None:
    servicer = role.make(engine)
    server = Server(settings.server, role.name)
    server.add(role.add, servicer, role.service)
    kv = getattr(engine, "kv", None)
    if kv is not None:
        server.add(
            kvtransfer_pb2_grpc.add_KvTransferServiceServicer_to_server,
            kv.servicer,
            "tandem.kvtransfer.v1.KvTransferService",
        )
    address = await server.start()
    channels = Channels()
    registration = Registration(
        engine, _identity(role, engine, settings, address), settings.worker, channels
    )
    leaving = asyncio.Event()
    tasks = [
        asyncio.create_task(_deliver(engine, servicer)),
        asyncio.create_task(registration.run(leaving)),
        asyncio.create_task(_announce(registration, address, ready)),
    ]
    try:
        await _until(stop, tasks)
        registration.drain()
        await _drain(engine, servicer, settings.server.drain_seconds)
        # A worker whose books don't balance must not exit as if all were well.
        engine.check_integrity()
    finally:
        leaving.set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.stop(FRAME_SECONDS)
        await channels.close()


async def _until(stop: asyncio.Event, tasks: list[asyncio.Task[None]]) -> None:
    """Waits for `stop`; a task that fails meanwhile ends the process with its error."""
    stopped = asyncio.create_task(stop.wait())
    waiting: set[asyncio.Task[Any]] = {stopped, *tasks}
    while not stopped.done():
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stopped}:
            task.result()


async def _announce(registration: Registration, address: str, ready: Callable[[str], None]) -> None:
    await registration.registered.wait()
    ready(address)


async def _deliver(engine: Engine, servicer: WorkerServicer) -> None:
    async for step in engine.outputs():
        servicer.deliver(step.outputs)
    raise EngineFailedError("the engine stopped")


async def _drain(engine: Engine, servicer: WorkerServicer, seconds: float) -> None:
    """Lets requests finish and sinks fetch for a while, then hands the rest back."""
    servicer.drain()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    # Leases end inside the engine (released, expired), which nothing announces: hence the poll.
    while (servicer.live or engine.stats().leases) and loop.time() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(DRAIN_POLL_SECONDS)
    if servicer.live:
        log.info("handing back %d requests that did not finish in %g s", servicer.live, seconds)
    servicer.hand_back()


def _identity(role: Role, engine: Engine, settings: WorkerProcess, address: str) -> WorkerIdentity:
    info = engine.info
    return WorkerIdentity(
        worker_id=f"{settings.worker.name or role.name}-{secrets.token_hex(3)}",
        role=role.name,
        address=address,
        model=info.model,
        kv_layout=info.layout.fingerprint,
        block_tokens=info.layout.block_tokens,
        total_blocks=info.total_blocks,
        max_running=info.max_running,
        context_tokens=info.context_tokens,
        host=socket.gethostname(),
        region=settings.worker.region,
        numerics=info.numerics,
        dp_ranks=info.dp_ranks,
        pid=os.getpid(),
        export_policy=export_policy(settings.worker.region, settings.kv),
        kv_transports=info.kv_transports,
        kv_not_offered=info.kv_not_offered,
    )
