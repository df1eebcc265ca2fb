"""The gRPC server of a process: health, reflection, errors, keepalive, one way to stop."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import secrets
import socket
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.runtime.errors import TandemError
from services.runtime.interceptor import ErrorInterceptor
from services.runtime.settings import ServerSettings

log = logging.getLogger(__name__)

KEEPALIVE_OPTIONS: tuple[tuple[str, int], ...] = (
    # A peer that is stopped, or whose network is gone, is noticed within their sum.
    ("grpc.keepalive_time_ms", 4_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)

LAST_WORD_SECONDS = 1.0
"""For clients to be told why their calls end."""

EVERYWHERE = ("0.0.0.0", "::", "[::]")


class ListenError(Exception):
    """The server can't listen where it was told to."""


class Server:
    """One gRPC server. Handlers raise TandemError or kvtransfer errors; see interceptor.py."""

    def __init__(
        self,
        settings: ServerSettings,
        name: str,
        *,
        incident_id: Callable[[], str] = lambda: secrets.token_hex(4),
    ) -> None:
        self._settings = settings
        self._name = name
        self._health = health.aio.HealthServicer()
        self._services: list[str] = []
        self._calls = ErrorInterceptor(incident_id)
        self._server = grpc.aio.server(
            interceptors=[self._calls],
            options=[
                *KEEPALIVE_OPTIONS,
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.max_send_message_length", -1),
                # Clients may ping as often as they like: no GOAWAY for too many pings.
                ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
                ("grpc.http2.max_ping_strikes", 0),
                # Two processes on one port would each get half of the calls.
                ("grpc.so_reuseport", 0),
            ],
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    def add(
        self, adder: Callable[[Any, grpc.aio.Server], None], servicer: Any, service: str
    ) -> None:
        """Adds a service before start(). `service` is its full name, for health and reflection."""
        adder(servicer, self._server)
        self._services.append(service)

    async def start(self) -> str:
        """Listens, and returns the host:port that others reach this process by.

        Raises ListenError.
        """
        reflection.enable_server_reflection(
            [*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server
        )
        port = self._listen()
        await self._server.start()
        for service in ("", *self._services):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        address = self._advertised(port)
        log.info("%s listens on %s", self._name, address)
        return address

    async def stop(self, grace_seconds: float, then: TandemError | None = None) -> None:
        """Health says NOT_SERVING, new calls are refused, running ones get `grace_seconds`.

        Those that still run after that end with `then`, if it is given.
        """
        await self._health.enter_graceful_shutdown()
        if then is None:
            await self._server.stop(grace_seconds)
            return
        stopping = asyncio.create_task(self._server.stop(grace_seconds + LAST_WORD_SECONDS))
        try:
            await asyncio.wait({stopping}, timeout=grace_seconds)
            self._calls.end_calls(then)
            await stopping
        finally:
            stopping.cancel()

    def _listen(self) -> int:
        host, port = self._settings.host, self._settings.port
        if not self._settings.allow_unauthenticated_remote and not _is_loopback(host):
            raise ListenError(
                f"server.host={host} can be reached from other machines, and nothing "
                "authenticates callers: use 127.0.0.1, or set "
                "server.allow_unauthenticated_remote=true on a network you trust"
            )
        try:
            return self._server.add_insecure_port(_joined(host, port))
        except RuntimeError:
            raise ListenError(
                f"can't listen on {_joined(host, port)}: {_why_not(host, port)}"
            ) from None

    def _advertised(self, port: int) -> str:
        if self._settings.advertise:
            host, _, given = self._settings.advertise.rpartition(":")
            return f"{host}:{port}" if given == "0" else self._settings.advertise
        host = self._settings.host
        return _joined(socket.gethostname() if host in EVERYWHERE else host, port)


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def _is_loopback(host: str) -> bool:
    host = host.strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return True  # listening on it fails next, and says why
    return all(ipaddress.ip_address(info[4][0]).is_loopback for info in found)


def _why_not(host: str, port: int) -> str:
    """The system's reason, which gRPC keeps to itself, found by trying again."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return f"port {port} is taken by another process; choose another server.port, or 0"
        return error.strerror or str(error)
    return "it was taken a moment ago; try again"
