"""What moving KV between two workers takes: latency + bytes / rate of the path.

The rate is what the sink measured over that transport, to whomever; until it has measured any, that
of its kind of path. Nominal figures:

| path | figures | source |
|---|---|---|
| one host | 1.7 ms, 2.9 GB/s | docs/kvtransfer.md, whole fetches over `shm` |
| NVLink domain | 2 ms, 225 GB/s | latency of a measured hand-off (SGLang); half of an H100's 450 |
| RDMA | 2 ms, 50 GB/s | the same; the line rate of 400 Gbit/s |
| TCP | 5 ms, 1 GB/s | kvtransfer's prior: most of 10 Gbit/s |
| another region | 50 ms, 0.1 GB/s | assumed: a continent, a shared line |
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from services.coordinator.core.messages import KvRate, WorkerInfo

RDMA = frozenset({"nixl", "ucx"})
"""Transports that use RDMA or NVLink where there is any."""

RATE_MEMORY = 0.2
"""Weight of the last report that moved something in a rate."""
LEAST_BYTES = 1 << 20
"""Fewer bytes since the last report say more about latency than about the rate."""


class Path(enum.Enum):
    """A kind of path: seconds of latency, bytes a second."""

    HOST = (1.7e-3, 2.9e9)
    NVLINK = (2e-3, 225e9)
    RDMA = (2e-3, 50e9)
    TCP = (5e-3, 1e9)
    FAR = (50e-3, 0.1e9)

    @property
    def latency(self) -> float:
        """Seconds before the first byte."""
        return self.value[0]

    @property
    def bytes_per_second(self) -> float:
        """Nominal."""
        return self.value[1]


@dataclass(frozen=True, slots=True)
class Route:
    """How KV goes from a worker to another."""

    path: Path
    transport: str
    """Which of the source's transports, as far as it said; empty: not known."""


def route(source: WorkerInfo, sink: WorkerInfo) -> Route:
    """The first of the source's transports that both offer, and the path that it takes here."""
    near = bool(source.host) and source.host == sink.host
    for transport in source.kv_transports:
        if transport in sink.kv_transports and (near or transport != "shm"):
            break
    else:
        transport = ""
    if near:
        return Route(Path.HOST, transport)
    if source.region != sink.region:
        return Route(Path.FAR, transport)
    if transport not in RDMA:
        return Route(Path.TCP, transport)
    linked = bool(source.nvlink_domain) and source.nvlink_domain == sink.nvlink_domain
    return Route(Path.NVLINK if linked else Path.RDMA, transport)


@dataclass(slots=True)
class SinkRates:
    """What one worker measured when it fetched KV, by transport."""

    _seen: dict[str, tuple[int, float]] = field(default_factory=dict)
    _rates: dict[str, float] = field(default_factory=dict)

    def report(self, rates: tuple[KvRate, ...]) -> None:
        """Takes in sums since the worker's start."""
        for rate in rates:
            size, seconds = self._seen.get(rate.transport, (0, 0.0))
            moved, took = rate.bytes - size, rate.seconds - seconds
            if moved < 0 or took < 0:
                # It started anew.
                moved, took = rate.bytes, rate.seconds
            elif moved < LEAST_BYTES or took == 0:
                continue
            self._seen[rate.transport] = (rate.bytes, rate.seconds)
            if moved >= LEAST_BYTES and took > 0:
                old = self._rates.get(rate.transport, moved / took)
                self._rates[rate.transport] = old + RATE_MEMORY * (moved / took - old)

    def seconds(self, size: int, by: Route) -> float:
        """For so many bytes; 0 for none."""
        if not size:
            return 0.0
        rate = self._rates.get(by.transport) or by.path.bytes_per_second
        return by.path.latency + size / rate


def exposed(transfer_seconds: float, overlap_seconds: float, tail: float) -> float:
    """What a request waits for a transfer alone.

    It runs along with the prefill for up to `overlap_seconds`; the part `tail` (0 to 1) of it can
    only begin when that has ended.
    """
    return max(transfer_seconds * tail, transfer_seconds - overlap_seconds)
