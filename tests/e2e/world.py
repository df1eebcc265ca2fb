"""Real clusters of real processes, a client, and ways to wait for what is observable."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import grpc

from cli.cluster import LocalCluster
from tandem.coordinator.v1 import coordinator_pb2, coordinator_pb2_grpc
from tandem.inference.v1 import inference_pb2, inference_pb2_grpc

SCRIPTED = {
    "engine.kind": "scripted",
    "engine.block_tokens": "4",
    "worker.heartbeat_seconds": "0.1",
}
STEADY = SCRIPTED | {
    "engine.scripted_step_seconds": "0.02",
    "coordinator.local_prefill_tokens": "0",
}


async def eventually(
    what: Callable[[], Awaitable[bool]], *, seconds: float = 60, why: str = ""
) -> None:
    """Waits until `what` holds; the test's own observation is what is repeated, not a guess."""
    async with asyncio.timeout(seconds):
        while not await what():  # noqa: ASYNC110 - other processes give no event
            await asyncio.sleep(0.02)


@dataclass
class Answer:
    """All that a stream brought."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    last: inference_pb2.StreamGenerateResponse | None = None


class Cluster:
    """A LocalCluster with its stubs, of one frontend and one coordinator."""

    def __init__(
        self, local: LocalCluster, frontend: str = "frontend", coordinator: str = "coordinator"
    ) -> None:
        self.local = local
        self.channel = grpc.aio.insecure_channel(local.address(frontend))
        self.coordinator_channel = grpc.aio.insecure_channel(local.address(coordinator))
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.coordinator = coordinator_pb2_grpc.CoordinatorServiceStub(self.coordinator_channel)

    async def close(self) -> None:
        await self.channel.close()
        await self.coordinator_channel.close()

    def stream(self, request: inference_pb2.GenerateRequest, **more):
        return self.inference.StreamGenerate(
            inference_pb2.StreamGenerateRequest(request=request), **more
        )

    async def ask(
        self, request: inference_pb2.GenerateRequest, on_token: Callable | None = None
    ) -> Answer:
        """Streams an answer; `on_token(answer)` is awaited after every message with tokens."""
        answer = Answer()
        async for message in self.stream(request, timeout=90):
            answer.tokens.extend(message.token_ids)
            answer.text += message.text
            answer.last = message
            if message.token_ids and on_token is not None:
                await on_token(answer)
        return answer

    async def status(self) -> coordinator_pb2.GetStatusResponse:
        return await self.coordinator.GetStatus(coordinator_pb2.GetStatusRequest(), timeout=5)

    def worker(self, name_of_worker: str) -> str:
        """The process name of a worker id (its name, a dash, a random suffix)."""
        return name_of_worker.rpartition("-")[0]

    async def workers_up(self, count: int) -> None:
        async def up() -> bool:
            with contextlib.suppress(grpc.aio.AioRpcError):
                return len((await self.status()).workers) == count
            return False

        await eventually(up, seconds=60)

    async def busy(self, role: str) -> str:
        """The process of the one worker of a role that has a request, once it has said so."""
        found: list[str] = []

        async def seen() -> bool:
            found[:] = [
                self.worker(w.info.worker_id)
                for w in (await self.status()).workers
                if w.info.worker_id.startswith(role) and w.stats.running
            ]
            return bool(found)

        await eventually(seen)
        (name,) = found
        return name

    async def nothing_held(self) -> None:
        """Every live worker reports no block in use, no lease, nothing running or waiting."""

        async def idle() -> bool:
            workers = (await self.status()).workers
            return all(
                w.stats.held_blocks == w.stats.leases == w.stats.running == w.stats.waiting == 0
                for w in workers
            )

        await eventually(idle)


@contextlib.asynccontextmanager
async def running(
    prefill: int, decode: int, settings: dict[str, str], **more
) -> AsyncIterator[Cluster]:
    """A cluster that must end with every process having left in good order."""
    async with LocalCluster(prefill=prefill, decode=decode, settings=settings, **more) as local:
        cluster = Cluster(local)
        try:
            yield cluster
        finally:
            await cluster.close()


def prompt(*tokens: int, **sampling) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest()
    request.tokens.token_ids.extend(tokens or range(10, 31))
    for key, value in sampling.items():
        if isinstance(value, list):
            getattr(request.sampling, key).extend(value)
        else:
            setattr(request.sampling, key, value)
    return request
