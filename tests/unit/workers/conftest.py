"""An engine that does exactly what the test says, and real servers around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace

import grpc
import pytest

from kvtransfer.layout import gqa_layout
from services.engine.api import (
    Engine,
    EngineInfo,
    EngineStats,
    FirstTokens,
    Hold,
    KvEvents,
    KvPrefix,
    KvSource,
    Request,
    StepOutput,
    TokenOutput,
)


class PuppetEngine(Engine):
    """Records calls; outputs are what the test puts."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.refuse: Exception | None = None
        self.prefixes: dict[str, KvPrefix | None] = {}
        self._outputs: asyncio.Queue[StepOutput] = asyncio.Queue()
        self.called = asyncio.Condition()

    @property
    def info(self) -> EngineInfo:
        layout = gqa_layout(
            "puppet", layers=1, kv_heads=1, head_dim=4, dtype="bfloat16", block_tokens=4
        )
        return EngineInfo("puppet", layout, 128, 16, 4, 100, (0,), "")

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def _note(self, *call: object) -> None:
        self.calls.append(call)
        asyncio.get_running_loop().create_task(self._wake())

    async def _wake(self) -> None:
        async with self.called:
            self.called.notify_all()

    async def wait_for(self, name: str, count: int = 1) -> list[tuple]:
        """The calls of that name once there are `count`."""
        async with asyncio.timeout(5), self.called:
            await self.called.wait_for(lambda: len(self.named(name)) >= count)
        return self.named(name)

    def named(self, name: str) -> list[tuple]:
        return [c for c in self.calls if c[0] == name]

    def prefill(self, request: Request, hold: Hold, prefix: KvPrefix | None = None) -> None:
        if self.refuse:
            raise self.refuse
        self.prefixes[request.request_id] = prefix
        self._note("prefill", request, hold)

    def decode(
        self, request: Request, source: KvSource | None, prefix: KvPrefix | None = None
    ) -> None:
        if self.refuse:
            raise self.refuse
        self.prefixes[request.request_id] = prefix
        self._note("decode", request, source)

    def proceed(self, request_id: str, first: FirstTokens) -> None:
        self._note("proceed", request_id, first)

    def cancel(self, request_id: str) -> None:
        self._note("cancel", request_id)

    def step(self, *outputs: TokenOutput) -> StepOutput:
        return StepOutput(outputs)

    async def outputs(self) -> AsyncIterator[StepOutput]:
        while True:
            yield await self._outputs.get()

    async def kv_events(self) -> AsyncIterator[KvEvents]:
        yield KvEvents(snapshot=True)

    def stats(self) -> EngineStats:
        return EngineStats()

    def check_integrity(self) -> None: ...


@pytest.fixture
async def puppet() -> PuppetEngine:
    return PuppetEngine()


@pytest.fixture
async def serve():
    """serve(adder, servicer, name) -> channel to a real Tandem server with that servicer."""
    from services.runtime.server import Server
    from services.runtime.settings import ServerSettings

    started = SimpleNamespace(servers=[], channels=[])

    async def start(adder, servicer, name) -> grpc.aio.Channel:
        server = Server(ServerSettings(), "test")
        server.add(adder, servicer, name)
        address = await server.start()
        channel = grpc.aio.insecure_channel(address)
        started.servers.append(server)
        started.channels.append(channel)
        return channel

    yield start
    for channel in started.channels:
        await channel.close()
    for server in started.servers:
        await server.stop(0.1)
