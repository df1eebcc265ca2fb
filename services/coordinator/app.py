"""The coordinator process."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import time
from collections.abc import Callable, Iterable

from services.coordinator.core.core import Core
from services.coordinator.core.expert_plans import ExpertRules
from services.coordinator.core.rules import Rules
from services.coordinator.service import CoordinatorServicer, Driver, WorkerRegistryServicer
from services.runtime.directory import Directory, Kind, Member, directory
from services.runtime.server import Server
from services.runtime.settings import CoordinatorProcess
from tandem.coordinator.v1 import coordinator_pb2_grpc as pb_grpc

TICK_SECONDS = 0.1
STOP_SECONDS = 1.0
"""For answers under way to reach their callers."""


async def serve(
    settings: CoordinatorProcess, *, ready: Callable[[str], None], stop: asyncio.Event
) -> None:
    """Serves until `stop` is set. Then refuses who waits, and ends workers' streams."""
    own = settings.coordinator
    rules = Rules(
        lease_seconds=own.lease_seconds,
        queue_limit=own.queue_limit,
        local_prefill_tokens=own.local_prefill_tokens,
        worker_wait_seconds=own.worker_wait_seconds,
        rebalance_seconds=own.rebalance_seconds,
        experts=ExpertRules(
            plan_seconds=own.expert_plan_seconds,
            tokens_each=own.expert_tokens_each,
            expert_share=own.expert_share,
        ),
        ttft_seconds=own.ttft_seconds,
        itl_seconds=own.itl_seconds,
        explain_decisions=own.explain_decisions,
        region_seconds=_round_trips(own.region_round_trips),
        queue_patience_seconds=own.queue_patience_seconds,
        tenant_weights={t: float(w) for t, w in (x.split("=") for x in own.tenant_weights)},
    )
    core = Core(rules, time.monotonic(), random.Random(secrets.randbits(64)).random)
    driver = Driver(core, coordinator_id=f"coordinator-{secrets.token_hex(4)}")
    listing = directory(settings.directory, None)
    server = Server(settings.server, "coordinator")
    server.add(
        pb_grpc.add_CoordinatorServiceServicer_to_server,
        CoordinatorServicer(driver, lambda: [a for a in listing.coordinators if a != address]),
        "tandem.coordinator.v1.CoordinatorService",
    )
    server.add(
        pb_grpc.add_WorkerRegistryServiceServicer_to_server,
        WorkerRegistryServicer(driver),
        "tandem.coordinator.v1.WorkerRegistryService",
    )
    address = await server.start()
    listing.join(Member(Kind.COORDINATOR, driver.coordinator_id, address))
    ready(address)
    clock = asyncio.create_task(driver.run_clock(min(TICK_SECONDS, own.lease_seconds / 6)))
    turns = asyncio.create_task(_take_turns(core, listing, address))
    stopping = asyncio.create_task(stop.wait())
    try:
        # The others end only by an error, which then ends the process.
        await asyncio.wait((clock, turns, stopping), return_when=asyncio.FIRST_COMPLETED)
        for task in (clock, turns):
            if task.done():
                task.result()
    finally:
        stopping.cancel()
        for task in (clock, turns):
            task.cancel()
        await listing.close()
        driver.stop()
        await server.stop(STOP_SECONDS)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(clock, turns)


async def _take_turns(core: Core, listing: Directory, own: str) -> None:
    """Of the coordinators listed, the first by address has workers change their roles."""
    known = listing.coordinators
    while True:
        core.decides = own <= min(known, default=own)
        known = await listing.changed(known)


def _round_trips(given: Iterable[str]) -> dict[tuple[str, str], float]:
    """Seconds by pair of regions, from region=region=milliseconds."""
    parts = (text.split("=") for text in given)
    return {(here, there): float(milliseconds) / 1e3 for here, there, milliseconds in parts}
