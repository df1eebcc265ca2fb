"""The frontend process."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from services.frontend.awake import Awake
from services.frontend.begin import Beginning, Chance
from services.frontend.coordinator import Coordinator
from services.frontend.folder import FolderModel
from services.frontend.live import Cluster
from services.frontend.model import Model
from services.frontend.openai.service import OpenAIServicer
from services.frontend.patience import Patience
from services.frontend.service import InferenceServicer
from services.frontend.workers import Workers
from services.runtime.channels import Channels
from services.runtime.directory import Kind, Member, directory
from services.runtime.errors import DrainingError
from services.runtime.server import Server
from services.runtime.settings import FrontendProcess
from tandem.inference.v1 import inference_pb2_grpc
from tandem.openai.v1 import openai_pb2_grpc

TEXT_THREADS = 2
"""For tokenizing and hashing, which let go of the interpreter lock for most of their time."""

SWEEP_SECONDS = 15.0

_CUT_OFF = DrainingError("this frontend shuts down, and the request ran longer than it may")


async def serve(
    settings: FrontendProcess, *, ready: Callable[[str], None], stop: asyncio.Event
) -> None:
    """Serves until `stop` is set, then lets running requests end for drain_seconds.

    Raises ModelNotFoundError or ListenError before `ready` is called.
    """
    model = await asyncio.to_thread(
        FolderModel,
        settings.model,
        settings.frontend.answer_format,
        settings.frontend.template_seconds,
    )
    await serve_model(model, settings, ready=ready, stop=stop)


async def serve_model(
    model: Model, settings: FrontendProcess, *, ready: Callable[[str], None], stop: asyncio.Event
) -> None:
    """serve() for a model that is loaded."""
    # Not the loop's: uvloop's counts milliseconds, and only once a turn.
    clock = time.monotonic
    name = f"frontend-{secrets.token_hex(4)}"
    channels = Channels()
    listing = directory(settings.directory, settings.frontend.coordinator)
    coordinator = Coordinator(listing, channels, name, clock)
    workers = Workers(channels, name, clock)
    patience = Patience(settings.frontend.silence_seconds, settings.frontend.stall_seconds)
    awake = Awake(clock)
    awake.start()
    cluster = Cluster(coordinator, workers, clock, patience, awake)
    chance = Chance(lambda: secrets.token_hex(8), lambda: secrets.randbits(63))
    with ThreadPoolExecutor(TEXT_THREADS, "text") as texts:
        beginning = Beginning(model, cluster, settings.frontend, texts, chance)
        server = Server(settings.server, "frontend")
        adder = inference_pb2_grpc.add_InferenceServiceServicer_to_server
        server.add(adder, InferenceServicer(beginning), "tandem.inference.v1.InferenceService")
        openai_adder = openai_pb2_grpc.add_OpenAIServiceServicer_to_server
        openai = OpenAIServicer(beginning, time.time)
        server.add(openai_adder, openai, "tandem.openai.v1.OpenAIService")
        sweeper = asyncio.create_task(_sweep(workers))
        try:
            address = await server.start()
            listing.join(Member(Kind.FRONTEND, name, address))
            ready(address)
            await stop.wait()
        finally:
            await server.stop(settings.server.drain_seconds, _CUT_OFF)
            awake.stop()
            await beginning.close()
            sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sweeper
            await workers.close()
            await coordinator.close()
            await listing.close()
            await channels.close()


async def _sweep(workers: Workers) -> None:
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        await workers.close_idle()
