"""KvTransferService of a group: each call goes to the rank that has the lease, or the blocks.

Only words pass through here. Bytes go from the rank's memory to whoever fetches them.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
from grpc_status import rpc_status

from kvtransfer.rpc_status import status_of
from services.engine.group.keys import GroupKeys
from services.engine.group.member import Member
from tandem.kvtransfer.v1 import kvtransfer_pb2 as pb
from tandem.kvtransfer.v1 import kvtransfer_pb2_grpc

LEASES_REMEMBERED = 65_536
CALL_SECONDS = 5.0

_Context = grpc.aio.ServicerContext[Any, Any]


class Leases:
    """Which rank has which lease, of the latest ones: most have ended long before."""

    def __init__(self) -> None:
        self._ranks: OrderedDict[str, int] = OrderedDict()
        self.awaited: dict[str, list[asyncio.Future[int]]] = {}
        """Those asked for before anybody knew them, and who asks."""

    def note(self, lease_id: str, rank: int) -> None:
        """It is, or is about to be, at this rank."""
        self._ranks[lease_id] = rank
        self._ranks.move_to_end(lease_id)
        if len(self._ranks) > LEASES_REMEMBERED:
            self._ranks.popitem(last=False)
        for asking in self.awaited.pop(lease_id, ()):
            if not asking.done():
                asking.set_result(rank)

    def end(self, lease_id: str) -> None:
        """It is over, and every rank that could have it knows: those who wait are told by any."""
        if lease_id in self.awaited:
            self.note(lease_id, 0)

    async def wait(self, lease_id: str) -> int:
        """Its rank, as soon as that is known."""
        rank = self.find(lease_id)
        if rank is not None:
            return rank
        asking: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.awaited.setdefault(lease_id, []).append(asking)
        try:
            return await asking
        finally:
            others = self.awaited.get(lease_id, [])
            if asking in others:
                others.remove(asking)
                if not others:
                    del self.awaited[lease_id]

    def find(self, lease_id: str) -> int | None:
        """None: not known."""
        return self._ranks.get(lease_id)


class KvForwarder(kvtransfer_pb2_grpc.KvTransferServiceServicer):
    """What ranks answer, and how they refuse, is passed on as it is."""

    def __init__(self, members: Sequence[Member], keys: GroupKeys, leases: Leases) -> None:
        self._members = members
        self._keys = keys
        self._leases = leases

    async def Describe(  # noqa: N802
        self, request: pb.DescribeRequest, context: _Context
    ) -> pb.DescribeResponse:
        """Ranks are alike."""
        answer: pb.DescribeResponse = await self._call(0, "Describe", request, context)
        return answer

    async def Fetch(  # noqa: N802
        self, request: pb.FetchRequest, context: _Context
    ) -> AsyncIterator[pb.FetchResponse]:
        """From the rank with the lease, or, if only what is there is wanted, with most of the keys.

        A prompt and the fetch of its KV are sent at the same time. A fetch that comes first waits
        here: at a rank that is not the prompt's it would wait in vain.
        """
        if not request.held_only and context.time_remaining() is not None:
            rank = await self._leases.wait(request.lease_id)
        else:
            known = self._leases.find(request.lease_id)
            rank = (self._keys.holder(request.keys) or 0) if known is None else known
            self._leases.note(request.lease_id, rank)
        call = self._stub(rank).Fetch(request, timeout=context.time_remaining())
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            await _pass_on(error, context)
        finally:
            call.cancel()

    async def Renew(  # noqa: N802
        self, request: pb.RenewRequest, context: _Context
    ) -> pb.RenewResponse:
        """At the rank that has it."""
        answers = await self._calls(request.lease_id, "Renew", request, context)
        return pb.RenewResponse(live=any(answer.live for answer in answers))

    async def Release(  # noqa: N802
        self, request: pb.ReleaseRequest, context: _Context
    ) -> pb.ReleaseResponse:
        """At the rank that has it. From here on every rank knows that it has ended."""
        answers = await self._calls(request.lease_id, "Release", request, context)
        self._leases.end(request.lease_id)
        return pb.ReleaseResponse(was_live=any(answer.was_live for answer in answers))

    async def _calls(self, lease_id: str, name: str, request: Any, context: _Context) -> list[Any]:
        """The rank's answer; where that isn't known, all ranks'."""
        rank = self._leases.find(lease_id)
        ranks = range(len(self._members)) if rank is None else (rank,)
        return await asyncio.gather(*(self._call(r, name, request, context) for r in ranks))

    async def _call(self, rank: int, name: str, request: Any, context: _Context) -> Any:
        left = context.time_remaining()
        timeout = CALL_SECONDS if left is None else min(left, CALL_SECONDS)
        try:
            return await getattr(self._stub(rank), name)(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            await _pass_on(error, context)

    def _stub(self, rank: int) -> kvtransfer_pb2_grpc.KvTransferServiceStub:
        channel = self._members[rank].channel
        assert channel is not None, "a group serves when its ranks are ready"
        return kvtransfer_pb2_grpc.KvTransferServiceStub(channel)


async def _pass_on(error: grpc.aio.AioRpcError, context: _Context) -> None:
    """Ends a call as the rank ended its own, details included."""
    status = status_of(error)
    if status is not None:
        await context.abort_with_status(rpc_status.to_status(status))
    await context.abort(error.code(), error.details() or "")
