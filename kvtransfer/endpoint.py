"""What a worker puts together to hand KV over and to get it: both ends, over one store."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc

from kvtransfer.channels import Channels
from kvtransfer.errors import (
    KvSourceLostError,
    NoTransportError,
    TransportUnusableError,
)
from kvtransfer.fetching import Limits
from kvtransfer.landing import DirectLanding, Landing
from kvtransfer.offload import Offload
from kvtransfer.report import FetchReport, Progress
from kvtransfer.sink import Order, SinkFetch
from kvtransfer.source import KvTransferServicer
from kvtransfer.store import KvStore
from kvtransfer.transports.build import make_transports
from tandem.kvtransfer.v1 import kvtransfer_pb2 as pb
from tandem.kvtransfer.v1 import kvtransfer_pb2_grpc

log = logging.getLogger(__name__)

RELEASE_SECONDS = 2.0
REMEMBERED_SOURCES = 1024


@dataclass(slots=True)
class Counters:
    """Since the start. `bytes` and `corrupt` are of fetches made here, the rest of those served."""

    bytes: dict[str, int] = field(default_factory=dict)
    """Bytes fetched and verified, by transport."""
    corrupt: int = 0
    """Blocks given up because their bytes were wrong twice."""
    reread: int = 0
    """Pieces that were read twice because they were wrong the first time."""
    stale: int = 0
    """Fetches that found memory given to other content while they read it."""
    lost: int = 0
    """Fetches that lost their source."""
    refused: int = 0
    """Fetches of others turned down."""
    expired: int = 0
    """Leases that ran out."""


class KvEndpoint:
    """Serves the store's blocks to others and fetches theirs into it. On one event loop.

    `transports` names those to offer, best first: "shm", "tcp". `host_id` names the host for
    shared memory; by default it is found out. Lease and fetch durations in seconds; a read that
    takes longer than `stall_seconds` is given up, and leases are renewed every `renew_seconds` at
    most while a fetch goes on. `region` is what this sink says of itself to sources.
    """

    def __init__(
        self,
        store: KvStore,
        *,
        transports: Sequence[str] = ("shm", "tcp"),
        tcp_host: str = "127.0.0.1",
        tcp_port: int = 0,
        host_id: str | None = None,
        lease_seconds: float = 30.0,
        fetch_timeout_seconds: float = 30.0,
        stall_seconds: float = 15.0,
        renew_seconds: float = 5.0,
        region: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._offload = Offload()
        self._lease_seconds = lease_seconds
        self._fetch_seconds = fetch_timeout_seconds
        self._stall_seconds = stall_seconds
        self._renew_seconds = renew_seconds
        self._region = region
        self._clock = clock
        self._counters = Counters()
        self._channels = Channels()
        self._unusable: dict[str, dict[str, str]] = {}
        self._releasing: set[asyncio.Task[None]] = set()
        self._expiring: asyncio.Task[None] | None = None
        asked = make_transports(
            transports, store.segment, self._offload, host=tcp_host, port=tcp_port, host_id=host_id
        )
        self._not_offered = {t.name: t.why_not() for t in asked if t.why_not()}
        self._transports = [t for t in asked if not t.why_not()]
        self.servicer = KvTransferServicer(
            store, self._transports, self._not_offered, lease_seconds
        )
        """For the worker's gRPC server; its handlers raise KvErrors."""

    @property
    def counters(self) -> Counters:
        """Now."""
        self._counters.refused = self.servicer.refused
        self._counters.expired = self._store.stats().expired
        return self._counters

    async def start(self) -> None:
        """Listens where a transport needs it. Raises NoTransportError or TransportError."""
        for name, why in self._not_offered.items():
            log.warning("KV transport %s can't be offered: %s", name, why)
        if not self._transports:
            raise NoTransportError(
                "no KV transport can be offered: "
                + "; ".join(f"{name}: {why}" for name, why in self._not_offered.items())
            )
        for transport in self._transports:
            await transport.start()
        self._expiring = asyncio.create_task(self._expire())

    async def close(self) -> None:
        """Ends what start() began; releases under way are waited for. Idempotent.

        Fetches must have ended before.
        """
        if self._expiring is not None:
            self._expiring.cancel()
            await asyncio.gather(self._expiring, return_exceptions=True)
        await asyncio.gather(*self._releasing)
        await self._channels.close()
        for transport in self._transports:
            await transport.close()
        self._offload.close()

    async def fetch(
        self,
        address: str,
        lease_id: str,
        keys: Sequence[bytes],
        blocks: Sequence[int],
        *,
        timeout: float | None = None,
        partial_last: bool = True,
        on_progress: Progress | None = None,
        release: bool = True,
        held_only: bool = False,
        tenant: str = "",
    ) -> FetchReport:
        """Gets keys[i] from the source at `address` into blocks[i], which the caller holds.

        Full blocks are sealed in the store as they complete; with `partial_last` the last one only
        has its bytes in place, because it may be a partial block, which is nobody's prefix: say
        False if it is full. The rest as fetch_into().
        """
        if len(keys) != len(blocks):
            raise ValueError(f"{len(keys)} keys for {len(blocks)} blocks")
        landing = DirectLanding(
            self._store,
            keys,
            blocks,
            partial_last=partial_last,
            tenant=tenant,
            on_progress=on_progress,
        )
        return await self.fetch_into(
            address,
            lease_id,
            keys,
            landing,
            timeout=timeout,
            release=release,
            held_only=held_only,
            tenant=tenant,
        )

    async def fetch_into(
        self,
        address: str,
        lease_id: str,
        keys: Sequence[bytes],
        landing: Landing,
        *,
        timeout: float | None = None,
        release: bool = True,
        held_only: bool = False,
        tenant: str = "",
    ) -> FetchReport:
        """Gets `keys`, of the landing's layout, from the source at `address` to where it says.

        Every piece is verified before it counts. `timeout` in seconds (default:
        fetch_timeout_seconds) bounds it as a whole; a source that dies or stalls is noticed
        sooner (fetching.py). With `held_only` the source does not wait for blocks that are still
        to be computed. With `release` its lease is released at the end, however that comes,
        without waiting for it.

        When this returns, raises or is cancelled, nothing writes into the blocks any more.
        Raises KvSourceLostError (`complete` says what arrived), LayoutMismatchError,
        WrongTenantError, RegionDeniedError, NoTransportError, InvalidFetchError.
        """
        order = Order(
            secrets.token_hex(8), address, lease_id, keys, held_only, tenant, self._region
        )
        seconds = self._fetch_seconds if timeout is None else timeout
        channel, gone = self._channels.use(address), False
        try:
            if not keys:
                return _nothing(self._clock())
            return await self._attempts(channel, order, landing, seconds)
        except KvSourceLostError as error:
            gone = error.metadata.get("cause") == grpc.StatusCode.UNAVAILABLE.name
            self._counters.lost += 1
            raise
        finally:
            if gone:
                self._unusable.pop(address, None)
            if release:
                self.release(address, lease_id)
            await self._channels.done(address, gone=gone)

    def release(self, address: str, lease_id: str) -> None:
        """Tells a source that a lease is not needed any more. In the background, best effort."""
        channel = self._channels.use(address)
        task = asyncio.get_running_loop().create_task(self._release(channel, address, lease_id))
        self._releasing.add(task)
        task.add_done_callback(self._releasing.discard)

    async def _attempts(
        self, channel: grpc.aio.Channel, order: Order, landing: Landing, seconds: float
    ) -> FetchReport:
        """Fetches by the best transport that really works."""
        deadline = asyncio.get_running_loop().time() + seconds
        limits = Limits(deadline, self._stall_seconds, self._renew_seconds)
        while True:
            unusable = self._unusable.get(order.address, {})
            usable = [t for t in self._transports if t.name not in unusable]
            if not usable:
                raise NoTransportError(
                    f"no transport to {order.address} works: "
                    + "; ".join(f"{name}: {why}" for name, why in unusable.items())
                )
            fetch = SinkFetch(self._store, self._offload, order, landing, limits, self._clock)
            try:
                return await fetch.run(channel, usable)
            except TransportUnusableError as error:
                self._cross_off(order.address, fetch.transport, error.message)
            except KvSourceLostError as error:
                error.complete = fetch.core.arrivals.complete
                raise
            finally:
                self._count(fetch)

    def _cross_off(self, address: str, name: str, why: str) -> None:
        """A transport that should fit does not work with this source; until it is gone."""
        log.warning("KV transport %s to %s can't be used: %s", name, address, why)
        if len(self._unusable) >= REMEMBERED_SOURCES:
            self._unusable.clear()
        self._unusable.setdefault(address, {})[name] = why

    def _count(self, fetch: SinkFetch) -> None:
        counters, core = self._counters, fetch.core
        if core.bytes:
            counters.bytes[fetch.transport] = counters.bytes.get(fetch.transport, 0) + core.bytes
        counters.corrupt += core.arrivals.corrupt
        counters.reread += core.corrupt_reads
        counters.stale += core.stale

    async def _release(self, channel: grpc.aio.Channel, address: str, lease_id: str) -> None:
        stub, gone = kvtransfer_pb2_grpc.KvTransferServiceStub(channel), False
        try:
            await stub.Release(pb.ReleaseRequest(lease_id=lease_id), timeout=RELEASE_SECONDS)
        except grpc.aio.AioRpcError as error:
            # The lease then ends by itself: with the source, or by expiring.
            log.debug("release of %s at %s: %s", lease_id, address, error.code().name)
            gone = error.code() is grpc.StatusCode.UNAVAILABLE
        finally:
            await self._channels.done(address, gone=gone)

    async def _expire(self) -> None:
        """Leases are counted in seconds: a few looks in one's time are exact enough."""
        while True:
            await asyncio.sleep(min(1.0, self._lease_seconds / 8))
            for lease_id in self._store.expire():
                log.info("lease %s expired: its sink did not come for it", lease_id)


def _nothing(now: float) -> FetchReport:
    return FetchReport(
        transport="",
        why="nothing was missing",
        bytes=0,
        complete=(),
        corrupt_blocks=0,
        started=now,
        first_bytes=None,
        ended=now,
    )
