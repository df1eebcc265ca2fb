"""Where ranks join their leader: GroupService, one stream a rank."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from importlib import metadata
from typing import Any, Protocol

import grpc

from services.engine.group.member import Member
from services.engine.group.task import Task
from services.runtime.errors import InvalidRequestError
from tandem.group.v1 import group_pb2 as pb
from tandem.group.v1 import group_pb2_grpc

PACKAGE = "tandem-serving"
SETTINGS = "SETTINGS"
"""Reason of a rank that could not begin because of a setting; not one that clients see."""

_Context = grpc.aio.ServicerContext[Any, Any]


class Group(Protocol):
    """What becomes of what ranks say."""

    def said(self, member: Member, message: pb.JoinRequest) -> None:
        """A message after the first one."""

    def lost(self, member: Member, why: str) -> None:
        """Its stream has ended."""


class GroupServicer(group_pb2_grpc.GroupServiceServicer):
    """Takes each rank once."""

    def __init__(self, task: Task, group: Group, ranks: range) -> None:
        """`ranks`: the numbers of those who join."""
        self.members = [Member(rank) for rank in ranks]
        self._ranks = ranks
        self._task = task
        self._group = group

    async def Join(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.JoinRequest], context: _Context
    ) -> AsyncIterator[pb.JoinResponse]:
        """A rank's life; see group.proto. Raises InvalidRequestError."""
        member = self._member(await anext(aiter(request_iterator), None))
        begin = pb.Begin(settings=self._task.of_rank(member.rank).to_json())
        member.send(pb.JoinResponse(begin=begin))
        reading = asyncio.create_task(self._read(request_iterator, member))
        try:
            async for message in member.commands():
                yield message
            await reading
        finally:
            reading.cancel()
            member.left.set()
            self._group.lost(member, "its connection ended")

    async def _read(self, messages: AsyncIterator[pb.JoinRequest], member: Member) -> None:
        try:
            async for message in messages:
                self._group.said(member, message)
        finally:
            member.end()

    def _member(self, first: pb.JoinRequest | None) -> Member:
        if first is None or first.WhichOneof("message") != "joined":
            raise InvalidRequestError("message", None, "a rank says first who it is: joined")
        joined, ranks = first.joined, self._ranks
        if joined.rank not in ranks or self.members[ranks.index(joined.rank)].joined:
            allowed = f"ranks are {ranks.start} to {ranks.stop - 1}, each once"
            raise InvalidRequestError("joined.rank", joined.rank, allowed)
        own = metadata.version(PACKAGE)
        if joined.version != own:
            raise InvalidRequestError("joined.version", joined.version, f"the leader is {own}")
        member = self.members[ranks.index(joined.rank)]
        member.joined = True
        return member
