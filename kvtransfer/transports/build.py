"""The transports there are, made by name for one memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvtransfer.memory import DeviceSegment, Segment
from kvtransfer.offload import Offload
from kvtransfer.transports.base import Transport
from kvtransfer.transports.nixl import NixlTransport
from kvtransfer.transports.shm import ShmTransport, host_identity
from kvtransfer.transports.tcp import TcpTransport
from kvtransfer.transports.ucx import UcxTransport
from kvtransfer.transports.unfit import UnfitTransport

_HOST_ONLY = "it moves host memory only, and the KV blocks are in a GPU's"


def make_transports(
    names: Sequence[str],
    segment: Segment | DeviceSegment,
    offload: Offload,
    *,
    host: str,
    port: int,
    host_id: str | None = None,
) -> list[Transport]:
    """One of each name, in that order; none is started, and one may say why it can't be.

    `host` and `port` are where those listen that do. `host_id` names the host for those that must
    know whether both sides are on one; by default it is found out.
    """
    if isinstance(segment, DeviceSegment):
        return [
            NixlTransport(segment, host) if name == "nixl" else UnfitTransport(name, _HOST_ONLY)
            for name in names
        ]
    here = host_identity() if host_id is None else host_id
    makers: dict[str, Callable[[], Transport]] = {
        "shm": lambda: ShmTransport(segment, offload, here),
        "nixl": lambda: NixlTransport(segment, host),
        "ucx": lambda: UcxTransport(segment, host),
        "tcp": lambda: TcpTransport(segment, host, port),
    }
    return [makers[name]() for name in names]
