"""Where the coordinators are: as the settings say, or as etcd does."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from pathlib import Path

import grpc

from cli import flags
from cli.output import CommandError, UsageError
from services.runtime.directory import Kind
from services.runtime.directory_etcd import members
from services.runtime.load import load
from services.runtime.settings import DirectorySettings, FrontendProcess


def coordinators(file: Path | None, environment: Mapping[str, str]) -> str:
    """host:port of each, with commas. Raises CommandError, SettingsError."""
    settings, _ = load(FrontendProcess, flags.config(file, environment), environment)
    if not settings.directory.etcd:
        return ",".join(settings.frontend.coordinator)
    listed = asyncio.run(_listed(settings.directory))
    if not listed:
        raise CommandError(
            f"etcd lists no coordinator of the cluster {settings.directory.cluster!r}: start one, "
            "or name one with --coordinator"
        )
    return ",".join(listed)


def named(texts: Iterable[str]) -> str:
    """--coordinator, given once or more, each with commas or not. Raises UsageError."""
    addresses = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    if not addresses:
        raise UsageError("--coordinator names no coordinator: it is HOST:PORT, several with commas")
    for address in addresses:
        if not (address.isascii() and address.isprintable()):
            raise UsageError(f"--coordinator: {address!a} is not HOST:PORT")
    return ",".join(addresses)


async def _listed(settings: DirectorySettings) -> list[str]:
    try:
        return sorted({m.address for m in await members(settings, Kind.COORDINATOR)})
    except grpc.aio.AioRpcError as error:
        raise CommandError(
            f"no etcd answers at {', '.join(settings.etcd)} ({error.code().name}): name a "
            "coordinator with --coordinator"
        ) from None
