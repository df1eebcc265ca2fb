"""The source's end of the KV plane: KvTransferService over a store."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import grpc

from kvtransfer import wire
from kvtransfer.errors import (
    InvalidFetchError,
    KvError,
    LayoutMismatchError,
    TooManyFetchesError,
)
from kvtransfer.negotiate import choose
from kvtransfer.policy import ExportPolicy
from kvtransfer.store import KvStore
from kvtransfer.transports.base import Transport
from tandem.kvtransfer.v1 import kvtransfer_pb2 as pb
from tandem.kvtransfer.v1 import kvtransfer_pb2_grpc

log = logging.getLogger(__name__)

PIECES_PER_MESSAGE = 256

SERVED_POOLS = 16
SERVED_KEYS = 65_536
"""Keys that all fetches being served may ask for together: so many times the pool, and this much at
least. Each takes some 200 bytes while its fetch waits."""

_Context = grpc.aio.ServicerContext[Any, Any]


class KvTransferServicer(kvtransfer_pb2_grpc.KvTransferServiceServicer):
    """Raises KvErrors, which the server it is added to maps to statuses.

    `transports` are those offered, best first; `not_offered` says of others why they can't be;
    `policy` says where blocks may go.
    Runs on one event loop; the engine's thread talks to the store, never to this.
    """

    def __init__(
        self,
        store: KvStore,
        transports: Sequence[Transport],
        not_offered: Mapping[str, str],
        lease_seconds: float,
        policy: ExportPolicy,
    ) -> None:
        self.refused = 0
        """Fetches turned down before they began."""
        self._store = store
        self._transports = {t.name: t for t in transports}
        self._not_offered = not_offered
        self._lease_seconds = lease_seconds
        self._policy = policy
        self._serving_keys = 0
        self._most_keys = max(SERVED_KEYS, SERVED_POOLS * store.total_blocks)

    async def Describe(  # noqa: N802
        self, request: pb.DescribeRequest, context: _Context
    ) -> pb.DescribeResponse:
        """The layout and the offers."""
        layout = self._store.layout
        return pb.DescribeResponse(
            kv_layout=layout.fingerprint,
            layout_fields=layout.fields(),
            offers=[wire.offer_to(t.source_offer()) for t in self._transports.values()],
            layout=wire.layout_to(layout),
            region=self._policy.region,
        )

    async def Fetch(  # noqa: N802
        self, request: pb.FetchRequest, context: _Context
    ) -> AsyncIterator[pb.FetchResponse]:
        """Announces pieces as they become readable, until all were.

        Raises InvalidFetchError, RegionDeniedError, LayoutMismatchError, NoTransportError,
        TooManyFetchesError, WrongTenantError, LeaseLostError, BlocksNotHeldError. When the
        deadline passes, gRPC cancels it like any call.
        """
        news, loop = asyncio.Event(), asyncio.get_running_loop()
        count = len(request.keys)
        try:
            if self._serving_keys + count > self._most_keys:
                raise TooManyFetchesError(
                    f"fetches of {self._serving_keys} blocks are being served; "
                    f"{count} more would be over {self._most_keys}",
                    limit=self._most_keys,
                )
            wanted, opened = self._open(request, context)
            async with self._store.restored(wanted.lease_id, wanted.keys, wanted.tenant):
                watch = self._store.watch(
                    wanted.lease_id,
                    wanted.keys,
                    lambda: _wake(loop, news),
                    self._lease_seconds,
                    held_only=wanted.held_only,
                    tenant=wanted.tenant,
                )
        except KvError:
            self.refused += 1
            raise
        self._serving_keys += count
        try:
            yield opened
            while watch.remaining:
                news.clear()
                pieces = self._store.take(watch, PIECES_PER_MESSAGE)
                if pieces:
                    yield wire.ready_to(pieces)
                else:
                    await news.wait()
        finally:
            self._serving_keys -= count
            self._store.unwatch(watch)

    async def Renew(  # noqa: N802
        self, request: pb.RenewRequest, context: _Context
    ) -> pb.RenewResponse:
        """Touches a lease."""
        lease_id = wire.lease_id_from(request.lease_id)
        return pb.RenewResponse(live=self._store.touch_lease(lease_id))

    async def Release(  # noqa: N802
        self, request: pb.ReleaseRequest, context: _Context
    ) -> pb.ReleaseResponse:
        """Ends a lease; any number of times."""
        lease_id = wire.lease_id_from(request.lease_id)
        return pb.ReleaseResponse(was_live=self._store.release_lease(lease_id))

    def _open(
        self, request: pb.FetchRequest, context: _Context
    ) -> tuple[wire.Wanted, pb.FetchResponse]:
        wanted = wire.wanted_from(request, self._store.total_blocks)
        # First: whoever may not have the blocks need not know what can be had.
        self._policy.check(wanted.tenant, wanted.region)
        layout = self._store.layout
        if wanted.kv_layout != layout.fingerprint:
            raise LayoutMismatchError.between(layout.fields(), wanted.layout_fields)
        if context.time_remaining() is None:
            raise InvalidFetchError("a fetch needs a deadline", field="deadline")
        choice = choose(
            [t.source_offer() for t in self._transports.values()],
            wanted.offers,
            self._transports,
            self._not_offered,
        )
        log.debug("fetch %s of lease %s: %s", wanted.fetch_id, wanted.lease_id, choice.why)
        ticket = self._transports[choice.name].ticket()
        agreement = wire.Agreement(
            ticket, choice.why, self._lease_seconds, self._store.generations_offset
        )
        return wanted, wire.opened_to(agreement)


def _wake(loop: asyncio.AbstractEventLoop, news: asyncio.Event) -> None:
    """From any thread; a loop that is gone has nobody to wake."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(news.set)
