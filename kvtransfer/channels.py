"""gRPC channels to sources: one an address, shared by its fetches, given up when it is gone."""

from __future__ import annotations

from collections import OrderedDict

import grpc

_OPTIONS: tuple[tuple[str, int], ...] = (
    # A source that is stopped, or whose network is gone, is noticed although nothing is sent.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.client_idle_timeout_ms", 60_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_http_proxy", 0),
    # Closing a channel closes its connection.
    ("grpc.use_local_subchannel_pool", 1),
)
_KEPT = 1024


class Channels:
    """Use from one event loop. Every use() is followed by done()."""

    def __init__(self) -> None:
        self._channels: OrderedDict[str, grpc.aio.Channel] = OrderedDict()
        self._users: dict[str, int] = {}

    def use(self, address: str) -> grpc.aio.Channel:
        """The channel to host:port."""
        channel = self._channels.get(address)
        if channel is None:
            channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
            self._channels[address] = channel
        self._channels.move_to_end(address)
        self._users[address] = self._users.get(address, 0) + 1
        return channel

    async def done(self, address: str, *, gone: bool = False) -> None:
        """Ends one use. The channel to a source that is gone is closed with its last use."""
        self._users[address] -= 1
        if not self._users[address]:
            del self._users[address]
            if gone:
                await self._drop(address)
        while len(self._channels) - len(self._users) > _KEPT:
            idle = next(a for a in self._channels if a not in self._users)
            await self._drop(idle)

    async def _drop(self, address: str) -> None:
        channel = self._channels.pop(address, None)
        if channel is not None:
            await channel.close()

    async def close(self) -> None:
        """Closes all; calls still running are cancelled."""
        while self._channels:
            _, channel = self._channels.popitem()
            await channel.close()
