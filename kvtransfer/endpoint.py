"""What a worker puts together to hand KV over and to get it: both ends, over one store."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import grpc

from kvtransfer import wire
from kvtransfer.channels import Channels
from kvtransfer.errors import (
    KvSourceLostError,
    NoTransportError,
    TransportUnusableError,
)
from kvtransfer.fetching import Limits
from kvtransfer.landing import DirectLanding, Landing
from kvtransfer.layout import KvLayout
from kvtransfer.observe import FetchStats
from kvtransfer.observer import Needed, Observer, Seen, not_needed
from kvtransfer.offload import Offload
from kvtransfer.policy import ExportPolicy
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
CROSSED_OFF_SECONDS = 60.0
"""A transport that did not work with a source is tried again after this long: it may only have been
frozen, or overloaded, for a while."""


@dataclass(frozen=True, slots=True)
class Counters:
    """Since the start. `refused` is of what was served, the rest of fetches here.

    KvEndpoint.stats has them by transport and peer.
    """

    bytes: Mapping[str, int]
    """Bytes fetched and verified, by transport."""
    corrupt: int
    """Blocks given up because their bytes were wrong twice."""
    reread: int
    """Pieces that were read twice because they were wrong the first time."""
    stale: int
    """Fetches given up because the source reused memory that was still being read."""
    lost: int
    """Fetches that lost their source, for whatever reason."""
    refused: int
    """Fetches of others turned down."""


class KvEndpoint:
    """Serves the store's blocks to others and fetches theirs into it. On one event loop.

    `transports` names those to offer, best first (transports/build.py). `host_id` names the host
    for shared memory; by default it is found out. Lease and fetch durations in seconds; a read that
    takes longer than `stall_seconds` is given up, and leases are renewed every `renew_seconds` at
    most while a fetch goes on. `policy` says where blocks may go, and has the region that this
    sink says it is in.
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
        policy: ExportPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._offload = Offload()
        self._lease_seconds = lease_seconds
        self._fetch_seconds = fetch_timeout_seconds
        self._stall_seconds = stall_seconds
        self._renew_seconds = renew_seconds
        self._policy = policy or ExportPolicy()
        self._clock = clock
        self._observer = Observer(clock)
        self._channels = Channels()
        self._unusable: OrderedDict[str, dict[str, tuple[str, float]]] = OrderedDict()
        """By source and transport: why it can't be used, and until when that is believed."""
        self._releasing: set[asyncio.Task[None]] = set()
        self._expiring: asyncio.Task[None] | None = None
        asked = make_transports(
            transports, store.segment, self._offload, host=tcp_host, port=tcp_port, host_id=host_id
        )
        self._not_offered = {t.name: t.why_not() for t in asked if t.why_not()}
        self._transports = [t for t in asked if not t.why_not()]
        self.servicer = KvTransferServicer(
            store, self._transports, self._not_offered, lease_seconds, self._policy
        )
        """For the worker's gRPC server; its handlers raise KvErrors."""

    @property
    def offered(self) -> tuple[str, ...]:
        """Names of the transports that this end offers, best first."""
        return tuple(t.name for t in self._transports)

    @property
    def not_offered(self) -> Mapping[str, str]:
        """Transports that it was told to offer and can't: why not."""
        return self._not_offered

    @property
    def stats(self) -> FetchStats:
        """What fetches came to, by transport and peer."""
        return self._observer.stats

    @property
    def counters(self) -> Counters:
        """Now."""
        total = self.stats.total
        moved = {t.transport: t.figures.bytes for t in self.stats.transports if t.figures.bytes}
        return Counters(
            bytes=moved,
            corrupt=total.corrupt,
            reread=total.reread,
            stale=total.stale,
            lost=total.lost + total.expired + total.stale,
            refused=self.servicer.refused,
        )

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
        needed: Needed = not_needed,
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
            needed=needed,
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
        needed: Needed = not_needed,
    ) -> FetchReport:
        """Gets `keys`, of the landing's layout, from the source at `address` to where it says.

        Every piece is verified before it counts. `timeout` in seconds (default:
        fetch_timeout_seconds) bounds it as a whole; a source that dies or stalls is noticed
        sooner (fetching.py). With `held_only` the source does not wait for blocks that are still
        to be computed. With `release` its lease is released at the end, however that comes,
        without waiting for it. `needed` tells, at the end, since when a request waited for nothing
        else, by the endpoint's clock.

        When this returns, raises or is cancelled, nothing writes into the blocks any more.
        Raises KvSourceLostError (`complete` says what arrived), LayoutMismatchError,
        WrongTenantError, RegionDeniedError, NoTransportError, InvalidFetchError.
        """
        order = Order(
            secrets.token_hex(8), address, lease_id, keys, held_only, tenant, self._policy.region
        )
        seconds = self._fetch_seconds if timeout is None else timeout
        channel, gone = self._channels.use(address), False
        try:
            if not keys:
                return _nothing(self._clock())
            watched = self._observer.fetch(
                address, lease_id, len(keys), needed, held_only=held_only
            )
            with watched as seen:
                seen.report = await self._attempts(channel, order, landing, seconds, seen)
                return seen.report
        except KvSourceLostError as error:
            gone = error.metadata.get("cause") == grpc.StatusCode.UNAVAILABLE.name
            raise
        finally:
            if gone:
                self._unusable.pop(address, None)
            if release:
                self.release(address, lease_id)
            await self._channels.done(address, gone=gone)

    async def describe(self, address: str, *, timeout: float | None = None) -> KvLayout:
        """The layout of the blocks at `address`, of which one converts (converting.py).

        `timeout` in seconds (default: stall_seconds). Raises KvSourceLostError,
        LayoutMismatchError.
        """
        seconds = self._stall_seconds if timeout is None else min(timeout, self._stall_seconds)
        channel, gone = self._channels.use(address), False
        stub = kvtransfer_pb2_grpc.KvTransferServiceStub(channel)
        try:
            return wire.layout_from(await stub.Describe(pb.DescribeRequest(), timeout=seconds))
        except grpc.aio.AioRpcError as error:
            gone = error.code() is grpc.StatusCode.UNAVAILABLE
            raise wire.error_from(error, address) from error
        finally:
            await self._channels.done(address, gone=gone)

    def release(self, address: str, lease_id: str) -> None:
        """Tells a source that a lease is not needed any more. In the background, best effort."""
        channel = self._channels.use(address)
        task = asyncio.get_running_loop().create_task(self._release(channel, address, lease_id))
        self._releasing.add(task)
        task.add_done_callback(self._releasing.discard)

    async def _attempts(
        self,
        channel: grpc.aio.Channel,
        order: Order,
        landing: Landing,
        seconds: float,
        seen: Seen,
    ) -> FetchReport:
        """Fetches by the best transport that really works."""
        deadline = asyncio.get_running_loop().time() + seconds
        limits = Limits(deadline, self._stall_seconds, self._renew_seconds)
        while True:
            unusable = self._crossed_off(order.address)
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
                _note(seen, fetch)

    def _cross_off(self, address: str, name: str, why: str) -> None:
        """A transport that should fit does not work with this source."""
        log.warning("KV transport %s to %s can't be used: %s", name, address, why)
        until = self._clock() + CROSSED_OFF_SECONDS
        self._unusable.setdefault(address, {})[name] = why, until
        self._unusable.move_to_end(address)
        if len(self._unusable) > REMEMBERED_SOURCES:
            self._unusable.popitem(last=False)

    def _crossed_off(self, address: str) -> dict[str, str]:
        """Transports that are not tried with a source now: name to why."""
        now, found = self._clock(), self._unusable.get(address, {})
        return {name: why for name, (why, until) in found.items() if now < until}

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
            await asyncio.sleep(min(1.0, max(0.02, self._lease_seconds / 8)))
            for lease_id in self._store.expire():
                log.info("lease %s expired: its sink did not come for it", lease_id)


def _note(seen: Seen, fetch: SinkFetch) -> None:
    arrivals = fetch.core.arrivals
    seen.transport, seen.why = fetch.transport, fetch.why
    seen.bytes += fetch.core.bytes
    seen.blocks += sum(arrivals.complete)
    seen.corrupt += arrivals.corrupt
    seen.reread += fetch.core.corrupt_reads


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
