"""Which processes of a cluster run on this machine, so that their CPU time can be measured."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from loadtest.processes import listener
from loadtest.wire import worker_pids
from services.runtime.channels import Channels
from services.runtime.client import CallFailedError


@dataclass(frozen=True, slots=True)
class LocalProcesses:
    """Pids by name, and what could not be found."""

    pids: dict[str, int]
    notes: tuple[str, ...]


async def find(frontend: str, coordinator: str) -> LocalProcesses:
    """Workers by the coordinator's word; frontend and coordinator by the port they listen on.

    Nothing found is not an error: a cluster elsewhere can be loaded just as well. The notes say
    what is not measured, and why.
    """
    pids: dict[str, int] = {}
    notes: list[str] = []
    channels = Channels()
    try:
        pids |= await worker_pids(channels, coordinator)
        if not pids:
            notes.append(f"CPU time of workers is not measured: none of {coordinator} runs here")
    except CallFailedError as error:
        why = f"coordinator {coordinator}: {error.message or error.code}"
        notes.append(f"CPU time of workers is not measured: {why}")
    finally:
        await channels.close()
    for name, address in (("coordinator", coordinator), ("frontend", frontend)):
        pid = listener(address) if _is_loopback(address) else None
        if pid is None:
            notes.append(f"CPU time of the {name} is not measured: no process here at {address}")
        else:
            pids[name] = pid
    return LocalProcesses(pids, tuple(notes))


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
