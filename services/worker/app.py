"""The worker process: loads an engine, serves it, stays registered, drains."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from kvtransfer.weights.source import WeightsSource
from services.decode.service import DecodeServicer
from services.engine.api import Engine
from services.engine.build import build
from services.engine.identity import WorkerIdentity
from services.engine.regions import export_policy
from services.engine.registration import Registration
from services.prefill.service import PrefillServicer
from services.runtime import milestones
from services.runtime.channels import Channels
from services.runtime.directory import Kind, Member, directory
from services.runtime.server import Server
from services.runtime.settings import WorkerProcess
from services.worker import weights
from services.worker.adapters import AdapterServicer
from services.worker.duty import Duty
from services.worker.worker import Worker, WorkerServicer
from tandem.adapters.v1 import adapters_pb2_grpc
from tandem.decode.v1 import decode_pb2_grpc
from tandem.kvtransfer.v1 import kvtransfer_pb2_grpc
from tandem.prefill.v1 import prefill_pb2_grpc
from tandem.weights.v1 import weights_pb2_grpc

FRAME_SECONDS = 1.0
"""Time for the last frames to reach their frontends once a drain has handed requests back."""


@dataclass(frozen=True, slots=True)
class _Service:
    """How one of the two services gets onto a server."""

    name: str
    make: Callable[[Engine, WorkerProcess], WorkerServicer]
    add: Callable[[Any, grpc.aio.Server], None]


_SERVICES = {
    "prefill": _Service(
        "tandem.prefill.v1.PrefillService",
        lambda engine, settings: PrefillServicer(engine, settings.kv.lease_seconds),
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server,
    ),
    "decode": _Service(
        "tandem.decode.v1.DecodeService",
        lambda engine, settings: DecodeServicer(engine),
        decode_pb2_grpc.add_DecodeServiceServicer_to_server,
    ),
}


async def serve(
    role: str, settings: WorkerProcess, *, ready: Callable[[str], None], stop: asyncio.Event
) -> None:
    """Loads the engine, serves, registers, and calls `ready`; on `stop` drains and closes.

    `role` is the one to begin with. Weights that are not here are fetched first, if
    weights.sources says from where. Raises EngineFailedError if the engine's output ends while the
    process should serve.
    """
    if settings.weights.sources:
        if not await _unless(stop, weights.fetch(settings)):
            return
        milestones.reached(milestones.FETCHED)
    kv = settings.kv
    if kv.disk_tier_folder:
        folder = Path(kv.disk_tier_folder) / (settings.worker.name or role)
        kv = kv.model_copy(update={"disk_tier_folder": str(folder)})
    engine = build(
        settings.model,
        settings.engine,
        kv,
        settings.server.host,
        settings.worker.region,
        remote=settings.server.allow_unauthenticated_remote,
        logs=settings.log,
        name=settings.worker.name or role,
    )
    milestones.reached(milestones.ENGINE)
    await engine.start()
    try:
        await _serve_engine(role, engine, settings, ready, stop)
    finally:
        await engine.close()


async def _serve_engine(
    role: str,
    engine: Engine,
    settings: WorkerProcess,
    ready: Callable[[str], None],
    stop: asyncio.Event,
) -> None:
    own = settings.worker
    duty = Duty(role, frozenset(own.can_be), own.role_min_seconds)
    servicers = {name: _SERVICES[name].make(engine, settings) for name in duty.services}
    worker = Worker(engine, servicers, duty)
    adapters = AdapterServicer(engine)
    giving = weights.source(settings, engine)
    address, server = await _listen(role, engine, servicers, adapters, giving, settings)
    channels = Channels()

    def on_role(wanted: str, why: str) -> None:
        if worker.change_role(wanted, why):
            registration.role_changed(wanted)

    identity = _identity(duty, engine, settings, address)
    listing = directory(settings.directory, own.coordinator)
    listing.join(Member(Kind.WORKER, identity.worker_id, address))
    registration = Registration(engine, identity, own, channels, directory=listing, on_role=on_role)
    adapters.on_change = registration.tell
    leaving = asyncio.Event()
    tasks = [
        asyncio.create_task(worker.deliver()),
        asyncio.create_task(registration.run(leaving)),
        asyncio.create_task(_announce(registration, address, ready)),
    ]
    try:
        await _until(stop, tasks)
        registration.drain()
        await worker.drain(settings.server.drain_seconds)
        # A worker whose books don't balance must not exit as if all were well.
        engine.check_integrity()
    finally:
        leaving.set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.stop(FRAME_SECONDS)
        if giving is not None:
            await giving.close()
        await listing.close()
        await channels.close()


async def _listen(
    role: str,
    engine: Engine,
    servicers: dict[str, WorkerServicer],
    adapters: AdapterServicer,
    giving: WeightsSource | None,
    settings: WorkerProcess,
) -> tuple[str, Server]:
    server = Server(settings.server, role)
    for name, servicer in servicers.items():
        server.add(_SERVICES[name].add, servicer, _SERVICES[name].name)
    server.add(
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server,
        adapters,
        "tandem.adapters.v1.AdapterService",
    )
    kv = getattr(engine, "kv", None)
    if kv is not None:
        server.add(
            kvtransfer_pb2_grpc.add_KvTransferServiceServicer_to_server,
            kv.servicer,
            "tandem.kvtransfer.v1.KvTransferService",
        )
    if giving is not None:
        server.add(
            weights_pb2_grpc.add_WeightsServiceServicer_to_server,
            giving,
            "tandem.weights.v1.WeightsService",
        )
    return await server.start(), server


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Whether `work` ended before `stop` was set, which cancels it. Raises what it raises."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        return working.done() and (working.result() or True)
    finally:
        stopping.cancel()
        if not working.done():
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)


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


def _identity(duty: Duty, engine: Engine, settings: WorkerProcess, address: str) -> WorkerIdentity:
    info = engine.info
    return WorkerIdentity(
        worker_id=f"{settings.worker.name or duty.role}-{secrets.token_hex(3)}",
        role=duty.role,
        can_be=tuple(sorted(duty.can_be)) if len(duty.can_be) > 1 else (),
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
        experts=info.experts,
        pid=os.getpid(),
        export_policy=export_policy(settings.worker.region, settings.kv),
        kv_transports=info.kv_transports,
        kv_not_offered=info.kv_not_offered,
        nvlink_domain=settings.worker.nvlink_domain,
        cost=settings.worker.cost,
        kv_block_bytes=info.layout.block_bytes,
    )
