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

    def note(self, lease_id: str, rank: int) -> None:
        """It is, or is about to be, at this rank."""
        self._ranks[lease_id] = rank
        self._ranks.move_to_end(lease_id)
        if len(self._ranks) > LEASES_REMEMBERED:
            self._ranks.popitem(last=False)

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
        """From the rank with the lease; for a new one from that which has the most of the keys."""
        rank = self._leases.find(request.lease_id)
        if rank is None:
            rank = self._keys.holder(request.keys) or 0
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
        """At the rank that has it."""
        answers = await self._calls(request.lease_id, "Release", request, context)
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
    status = rpc_status.from_call(error)
    if status is not None:
        await context.abort_with_status(rpc_status.to_status(status))
    await context.abort(error.code(), error.details() or "")
