"""Channels to other processes: one for each address, kept, with keepalive."""

from __future__ import annotations

import asyncio

import grpc

from services.runtime.server import KEEPALIVE_OPTIONS

MAX_RESPONSE_BYTES = 64 * 2**20

OPTIONS: tuple[tuple[str, int], ...] = (
    *KEEPALIVE_OPTIONS,
    ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),
    ("grpc.max_send_message_length", -1),
    # A process that was restarted is found again soon.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Addresses are given, never found through a proxy of the environment.
    ("grpc.enable_http_proxy", 0),
    # Connections are this object's: closing it closes them.
    ("grpc.use_local_subchannel_pool", 1),
)


class Channels:
    """Use from one event loop. A channel connects when it is first used, and again as needed."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}

    def get(self, address: str) -> grpc.aio.Channel:
        """The channel to host:port."""
        channel = self._channels.get(address)
        if channel is None:
            channel = grpc.aio.insecure_channel(address, options=OPTIONS)
            self._channels[address] = channel
        return channel

    async def drop(self, address: str) -> None:
        """Closes the channel to an address that is needed no more. Unknown: ignored."""
        channel = self._channels.pop(address, None)
        if channel is not None:
            await channel.close()

    async def close(self) -> None:
        """Closes all; calls still running on them are cancelled."""
        channels, self._channels = list(self._channels.values()), {}
        await asyncio.gather(*(channel.close() for channel in channels))
