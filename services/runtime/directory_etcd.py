"""The directory in etcd: every process lists itself under a lease, and follows the coordinators.

    /tandem/CLUSTER/coordinators/ID    host:port       and so workers/ID, frontends/ID

Two tasks, each a session with one member of the etcd cluster that is begun anew, with the next
member, whenever it fails:

    following   reads the coordinators, then watches; any change leads to reading again
    being       a lease, the key under it, and the lease kept alive. A lease that was lost (etcd was
    listed      away for longer, or has lost its data) is followed by a new one.

A list is only ever replaced by another one: while etcd is away, or knows nobody (it has lost its
data, and coordinators are on their way to list themselves again), the last one holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
from collections.abc import Awaitable, Callable, Sequence

import grpc

from services.runtime.directory import Kind, Known, Member
from services.runtime.settings import DirectorySettings
from tandem.etcd.v1 import etcd_pb2 as pb

log = logging.getLogger(__name__)

CALL_SECONDS = 3.0
"""An etcd that takes longer for an answer is as good as away."""
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 3.0
LEAVE_SECONDS = 0.5
"""For the last words to etcd: the lease says the same, only later."""
RENEWALS = 3
"""Of a lease, in the time that it lasts."""

OPTIONS: tuple[tuple[str, int], ...] = (
    # etcd ends connections that ping more often than every 5 s, or without a call.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)

# A member of etcd that has lost its leader ends the streams that say so.
_WITH_LEADER = (("hasleader", "true"),)
_ADDRESS = re.compile(r"[^,\s]+:[0-9]+")


class Etcd:
    """One member of an etcd cluster: the calls that are used here, by their paths."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        self.range = self.channel.unary_unary(
            "/etcdserverpb.KV/Range", pb.RangeRequest.SerializeToString, pb.RangeResponse.FromString
        )
        self.put = self.channel.unary_unary(
            "/etcdserverpb.KV/Put", pb.PutRequest.SerializeToString, pb.PutResponse.FromString
        )
        self.grant = self.channel.unary_unary(
            "/etcdserverpb.Lease/LeaseGrant",
            pb.LeaseGrantRequest.SerializeToString,
            pb.LeaseGrantResponse.FromString,
        )
        self.revoke = self.channel.unary_unary(
            "/etcdserverpb.Lease/LeaseRevoke",
            pb.LeaseRevokeRequest.SerializeToString,
            pb.LeaseRevokeResponse.FromString,
        )
        self.keep_alive = self.channel.stream_stream(
            "/etcdserverpb.Lease/LeaseKeepAlive",
            pb.LeaseKeepAliveRequest.SerializeToString,
            pb.LeaseKeepAliveResponse.FromString,
        )
        self.watch = self.channel.stream_stream(
            "/etcdserverpb.Watch/Watch",
            pb.WatchRequest.SerializeToString,
            pb.WatchResponse.FromString,
        )


class EtcdDirectory:
    """See Directory. `draw` gives numbers in [0, 1), for jitter."""

    def __init__(
        self,
        settings: DirectorySettings,
        coordinators: Sequence[str],
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._settings = settings
        self._draw = draw
        self._known = Known(coordinators)
        self._etcds = [Etcd(address) for address in settings.etcd]
        self._leases: dict[Member, tuple[Etcd, int]] = {}
        self._tasks = [asyncio.create_task(self._keep_up("the list of coordinators", self._follow))]

    @property
    def coordinators(self) -> tuple[str, ...]:
        """See Directory."""
        return self._known.coordinators

    async def changed(self, known: tuple[str, ...]) -> tuple[str, ...]:
        """See Directory."""
        return await self._known.changed(known)

    def join(self, member: Member) -> None:
        """See Directory."""

        async def be_listed(etcd: Etcd, well: Callable[[], None]) -> None:
            await self._be_listed(member, etcd, well)

        keeping = self._keep_up("the entry of this process", be_listed)
        self._tasks.append(asyncio.create_task(keeping))

    async def close(self) -> None:
        """See Directory."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        leases, self._leases = self._leases, {}
        with contextlib.suppress(grpc.aio.AioRpcError, TimeoutError):
            async with asyncio.timeout(LEAVE_SECONDS):
                for etcd, lease in leases.values():
                    await etcd.revoke(pb.LeaseRevokeRequest(id=lease))
        await asyncio.gather(*(etcd.channel.close() for etcd in self._etcds))

    async def _keep_up(
        self, what: str, session: Callable[[Etcd, Callable[[], None]], Awaitable[None]]
    ) -> None:
        """Holds a session, with one etcd after the other, until cancelled.

        A session calls what it is given when all is well: the next pause is a short one then.
        """
        pause, said = FIRST_PAUSE_SECONDS, False

        def well() -> None:
            nonlocal pause, said
            if said:
                log.info("%s is kept again by etcd at %s", what, etcd.address)
            pause, said = FIRST_PAUSE_SECONDS, False

        turn = int(self._draw() * len(self._etcds))
        while True:
            etcd = self._etcds[turn % len(self._etcds)]
            try:
                await session(etcd, well)
                why = "it ended the stream"
            except grpc.aio.AioRpcError as error:
                why = error.details() or error.code().name
            except (TimeoutError, asyncio.InvalidStateError):
                why = "no answer in time"
            if not said:
                log.warning("%s is not kept up: etcd at %s: %s", what, etcd.address, why)
                said = True
            turn += 1
            # Between half and all of it: processes that lost the same etcd spread out.
            await asyncio.sleep(pause * (0.5 + self._draw() / 2))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _follow(self, etcd: Etcd, well: Callable[[], None]) -> None:
        """Reads the coordinators at every change, until the watch breaks."""
        first, last = _span(self._settings.cluster, Kind.COORDINATOR)
        found = await etcd.range(pb.RangeRequest(key=first, range_end=last), timeout=CALL_SECONDS)
        self._take(found)
        well()
        call = etcd.watch(metadata=_WITH_LEADER)
        try:
            since = pb.WatchCreateRequest(
                key=first, range_end=last, start_revision=found.header.revision + 1
            )
            await call.write(pb.WatchRequest(create_request=since))
            while isinstance(answer := await call.read(), pb.WatchResponse):
                if answer.canceled:
                    return
                if answer.events:
                    request = pb.RangeRequest(key=first, range_end=last)
                    self._take(await etcd.range(request, timeout=CALL_SECONDS))
        finally:
            call.cancel()

    def _take(self, found: pb.RangeResponse) -> None:
        """Goes by what etcd knows, unless it knows nobody."""
        members = _members(self._settings.cluster, Kind.COORDINATOR, found)
        if members and self._known.set([m.address for m in members]):
            log.info("coordinators: %s", ", ".join(self.coordinators))
        elif not members and self.coordinators:
            log.warning("etcd lists no coordinator: going on with those known")

    async def _be_listed(self, member: Member, etcd: Etcd, well: Callable[[], None]) -> None:
        """A lease and the key, until the lease is lost or etcd does not answer."""
        grant = pb.LeaseGrantRequest(ttl=self._settings.lease_seconds)
        granted = await etcd.grant(grant, timeout=CALL_SECONDS)
        key = _span(self._settings.cluster, member.kind)[0] + member.member_id.encode()
        put = pb.PutRequest(key=key, value=member.address.encode(), lease=granted.id)
        await etcd.put(put, timeout=CALL_SECONDS)
        self._leases[member] = etcd, granted.id
        well()
        call = etcd.keep_alive(metadata=_WITH_LEADER)
        try:
            while True:
                await asyncio.sleep(granted.ttl / RENEWALS * (0.5 + self._draw() / 2))
                async with asyncio.timeout(CALL_SECONDS):
                    await call.write(pb.LeaseKeepAliveRequest(id=granted.id))
                    answer = await call.read()
                if not isinstance(answer, pb.LeaseKeepAliveResponse) or answer.ttl <= 0:
                    return
        finally:
            call.cancel()


async def members(settings: DirectorySettings, kind: Kind) -> tuple[Member, ...]:
    """Everybody of a kind that is listed, by id. Raises grpc.aio.AioRpcError if no etcd answers."""
    first, last = _span(settings.cluster, kind)
    etcds = [Etcd(address) for address in settings.etcd]
    try:
        for etcd in etcds:
            try:
                request = pb.RangeRequest(key=first, range_end=last)
                found = await etcd.range(request, timeout=CALL_SECONDS)
                return _members(settings.cluster, kind, found)
            except grpc.aio.AioRpcError as error:
                failure = error
        raise failure
    finally:
        await asyncio.gather(*(etcd.channel.close() for etcd in etcds))


def _members(cluster: str, kind: Kind, found: pb.RangeResponse) -> tuple[Member, ...]:
    """Of etcd's keys those that say what they should."""
    first, _ = _span(cluster, kind)
    members = []
    for kv in found.kvs:
        address = kv.value.decode(errors="replace")
        if _ADDRESS.fullmatch(address):
            name = kv.key.removeprefix(first).decode(errors="replace")
            members.append(Member(kind, name, address))
        else:
            log.warning("etcd: %r says %.80r, which is no host:port", kv.key, address)
    return tuple(members)


def _span(cluster: str, kind: Kind) -> tuple[bytes, bytes]:
    """The first key of a kind, and the first one behind its last."""
    folder = f"/tandem/{cluster}/{kind}"
    return f"{folder}/".encode(), f"{folder}0".encode()  # "0" follows "/"
