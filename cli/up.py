"""`tandem up`: a whole cluster on this machine, watched until it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cli.cluster import ClusterError, LocalCluster
from cli.gateway import BUILD
from cli.output import INTERRUPTED
from cli.screen import Screen, opened
from services.runtime.client import CallFailedError, Client, Status
from services.runtime.process import Stop

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to start; see LocalCluster. `own`: settings by role."""

    prefill: int
    decode: int
    both: int
    settings: Mapping[str, str]
    config: Path | None
    port: int
    coordinator_port: int
    restart: bool
    logs: Path | None
    coordinators: int = 1
    frontends: int = 1
    etcd: bool = False
    gateway: Path | None = None
    gateway_port: int = 0
    own: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


async def up(plan: Plan, stop: Stop) -> int:
    """Starts, watches until `stop` is set, drains, ends, and returns the exit status.

    Raises ClusterError, SettingsError.
    """
    with opened() as screen:
        return await _run(plan, stop, screen)


async def _run(plan: Plan, stop: Stop, screen: Screen) -> int:
    cluster = LocalCluster(
        prefill=plan.prefill,
        decode=plan.decode,
        both=plan.both,
        coordinators=plan.coordinators,
        frontends=plan.frontends,
        etcd=plan.etcd,
        settings=plan.settings,
        own=plan.own,
        config=plan.config,
        frontend_port=plan.port,
        coordinator_port=plan.coordinator_port,
        gateway=plan.gateway,
        gateway_port=plan.gateway_port,
        restart=plan.restart,
        logs=plan.logs,
        on_event=screen.event,
    )
    screen.say(f"logs: {cluster.logs}")
    if not await started(cluster, stop):
        screen.say("ended before it was ready")
        return INTERRUPTED
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_exit(cluster)
        screen.say(_welcome(cluster))
        if plan.gateway is None:
            screen.say(BUILD)
        await _watch(cluster, stop, screen)
        screen.say("draining; Ctrl-C again ends at once")
    return 0


async def unless(stop: Stop, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` returns; None, and it is cancelled, if `stop` is set before."""
    working = asyncio.create_task(work)
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        stopping.cancel()
        if not working.done():
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)


async def started(cluster: LocalCluster, stop: Stop) -> bool:
    """Starts a cluster unless `stop` is set first; then no process is left and it is False."""

    async def start() -> bool:
        await cluster.start()
        return True

    return bool(await unless(stop, start()))


async def _watch(cluster: LocalCluster, stop: Stop, screen: Screen) -> None:
    all_ended = asyncio.create_task(cluster.wait_all_ended())
    stopping = asyncio.create_task(stop.wait())
    try:
        async with Client("", ",".join(cluster.addresses("coordinator"))) as client:
            while not stopping.done():
                screen.show(await _status(client))
                await asyncio.wait(
                    {stopping, all_ended},
                    timeout=screen.period,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if all_ended.done() and not stopping.done():
                    raise ClusterError("every process has ended")
    finally:
        stopping.cancel()
        all_ended.cancel()


async def _status(client: Client) -> Status | str:
    try:
        return await client.status()
    except CallFailedError as error:
        return f"the coordinator does not answer: {error.message}"


def _welcome(cluster: LocalCluster) -> str:
    frontends = cluster.addresses("frontend")
    there = [
        f"{role} {', '.join(cluster.addresses(role))}"
        for role in ("frontend", "coordinator", "etcd")
        if cluster.addresses(role)
    ]
    http = [f"OpenAI: base URL http://{url}/v1" for url in cluster.addresses("gateway")]
    return "\n".join(
        [
            f"Tandem is up: {', '.join(there)}",
            f"ask it:  tandem chat --address {frontends[0]}",
            *http,
            "end it:  Ctrl-C",
        ]
    )
