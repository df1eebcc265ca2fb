"""Whether a worker's process is there: what a connection brings, and pings when it is nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.frontend.patience import Heard

PING_SECONDS = 10.0
"""An answer that takes longer helps nobody."""

_NOBODY = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
)


class Pulse:
    """One connection's. `clock`: seconds, monotonic."""

    def __init__(self, channel: grpc.aio.Channel, clock: Callable[[], float]) -> None:
        self.heard = Heard()
        self._clock = clock
        self._health = health_pb2_grpc.HealthStub(channel)
        self._pinging: set[asyncio.Task[None]] = set()

    def came(self, *, moved: bool = False) -> None:
        """Something came; with `moved`, what only a running engine gives."""
        self.heard.at = self._clock()
        if moved:
            self.heard.moved_at = self.heard.at

    def ping(self) -> None:
        """Asks for a sign of life."""
        self.heard.pinged_at = self._clock()
        task = asyncio.create_task(self._ping())
        self._pinging.add(task)
        task.add_done_callback(self._pinging.discard)

    async def close(self) -> None:
        """Waits for no more answers."""
        for task in self._pinging:
            task.cancel()
        await asyncio.gather(*self._pinging, return_exceptions=True)

    async def _ping(self) -> None:
        try:
            await self._health.Check(health_pb2.HealthCheckRequest(), timeout=PING_SECONDS)
        except grpc.aio.AioRpcError as error:
            if error.code() in _NOBODY:
                return
        self.came()
