"""A worker's weights: fetched at its start from workers that have them, and given in its turn."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
from collections.abc import Callable

import grpc

from kvtransfer.errors import WeightsLostError
from kvtransfer.weights.driving import Means
from kvtransfer.weights.source import Given, WeightsSource
from services.engine.api import Engine
from services.engine.models import cache
from services.engine.models.folder import resolve
from services.engine.models.peers import bring, digests_of, is_here
from services.engine.regions import export_policy
from services.runtime.channels import Channels
from services.runtime.directory import directory
from services.runtime.settings import ANY_WORKER, WorkerProcess
from tandem.coordinator.v1 import coordinator_pb2, coordinator_pb2_grpc

log = logging.getLogger(__name__)

PAUSE_SECONDS = 1.0
"""Between two attempts."""
ASK_SECONDS = 5.0
"""A coordinator that does not answer for so long is not asked this time."""
TELL_SECONDS = 5.0
"""Between two lines of the log about how far a fetch is."""


async def fetch(settings: WorkerProcess) -> None:
    """Has the model here, from weights.sources; returns at once if it is.

    Tries again until nothing has come for weights.wait_seconds. Raises what bring() raises.
    """
    models = cache.cache_folder(os.environ)
    if settings.engine.kind != "torch" or is_here(settings.model, models):
        return
    loop = asyncio.get_running_loop()
    progress = _Progress(settings.model.name, loop.time)
    while True:
        peers = await _peers(settings)
        if peers != progress.peers:
            log.info("%s is not here; workers to fetch it from: %s", settings.model.name, peers)
            progress.peers = peers
        try:
            brought = await bring(
                settings.model,
                models,
                peers,
                _means(settings),
                digest=settings.weights.digest,
                region=settings.worker.region,
                watch=progress.tell,
                waiting=lambda: log.info("waiting for another process that fetches the model"),
            )
        except WeightsLostError as error:
            if loop.time() - progress.last >= settings.weights.wait_seconds:
                raise
            log.debug("trying again: %s", error.message)
            await asyncio.sleep(PAUSE_SECONDS)
            continue
        if brought is not None:
            log.info("fetched %s to %s: %s", settings.model.name, brought.place, brought.words())
        return


def source(settings: WorkerProcess, engine: Engine) -> WeightsSource | None:
    """What gives this worker's weights; None if there are none to give, or they stay here.

    The engine has started, so its model is here.
    """
    given = settings.weights
    if not given.give or settings.engine.kind != "torch":
        return None
    models = cache.cache_folder(os.environ)
    folder = resolve(settings.model, models).path
    means = _means(settings)
    return WeightsSource(
        Given(settings.model.name, folder, digests_of(folder, models)),
        transports=means.transports,
        tcp_host=means.tcp_host,
        tcp_port=given.tcp_port,
        policy=export_policy(settings.worker.region, settings.kv),
        rate=_rate(given.give_mib_s * 2**20, engine),
    )


def _rate(busy: float, engine: Engine) -> Callable[[], float]:
    """Requests come first: while any run here, weights have no more than `busy` bytes a second."""

    def rate() -> float:
        return busy if engine.stats().running else 0.0

    return rate


def _means(settings: WorkerProcess) -> Means:
    kv = settings.kv
    host = kv.tcp_host or settings.server.host
    return Means(kv.transports, host, stall_seconds=kv.stall_seconds)


async def _peers(settings: WorkerProcess) -> list[str]:
    """Addresses: those named, in their order; then of those known, near ones first."""
    sources = settings.weights.sources
    named = [address for address in sources if address != ANY_WORKER]
    if ANY_WORKER not in sources:
        return named
    known = [address for address in await _known(settings) if address not in named]
    return named + known


async def _known(settings: WorkerProcess) -> list[str]:
    """Workers of this model, of this host and region before others, those in any order."""
    channels, listing = Channels(), directory(settings.directory, settings.worker.coordinator)
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ASK_SECONDS):
                await listing.changed(())  # until etcd has answered
        answers = await asyncio.gather(
            *(_status(channels, address) for address in listing.coordinators)
        )
    finally:
        await listing.close()
        await channels.close()
    host, region = socket.gethostname(), settings.worker.region
    found = {
        worker.info.address: (worker.info.host != host, worker.info.region != region)
        for answer in answers
        for worker in answer.workers
        if worker.info.model == settings.model.name and not worker.draining
    }
    # Replicas that start together spread over them.
    return sorted(random.sample(list(found), len(found)), key=lambda address: found[address])


async def _status(channels: Channels, address: str) -> coordinator_pb2.GetStatusResponse:
    """What a coordinator knows; nothing if it does not answer."""
    stub = coordinator_pb2_grpc.CoordinatorServiceStub(channels.get(address))
    try:
        return await stub.GetStatus(coordinator_pb2.GetStatusRequest(), timeout=ASK_SECONDS)
    except grpc.aio.AioRpcError as error:
        log.debug("coordinator %s does not say who is there: %s", address, error.details())
        return coordinator_pb2.GetStatusResponse()


class _Progress:
    """Says from time to time how far it is; knows when something last came."""

    def __init__(self, model: str, clock: Callable[[], float]) -> None:
        self.peers: list[str] | None = None
        self.last = clock()
        self._model = model
        self._clock = clock
        self._told = clock()

    def tell(self, stage: str, done: int, total: int) -> None:
        """See kvtransfer.weights.finding.Watch."""
        now = self.last = self._clock()
        if now - self._told >= TELL_SECONDS:
            self._told = now
            words = _WORDS[stage]
            log.info("%s: %s, %.0f of %.0f MB", self._model, words, done / 1e6, total / 1e6)


_WORDS = {
    "describe": "a worker looks through its files",
    "check": "looking through what is here",
    "fetch": "fetching",
}
