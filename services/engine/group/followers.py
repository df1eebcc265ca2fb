"""Processes that share an engine's model with it: the engine's side, beside its event loop.

Each computes columns of every layer, and can't be done without: if one is lost so is the worker. So
all are ended then, which also ends the exchange that the engine's step thread may wait in.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import time
from collections.abc import Callable

from services.engine.group.launch import Launch
from services.engine.group.member import Member, all_left, watch_silence
from services.engine.group.part import Part
from services.engine.group.servicer import SETTINGS, GroupServicer
from services.engine.group.task import Task
from services.runtime.errors import InvalidRequestError, WorkerLostError
from services.runtime.load import SettingsError
from services.runtime.server import Server
from services.runtime.settings import ServerSettings
from tandem.group.v1 import group_pb2 as pb
from tandem.group.v1 import group_pb2_grpc

log = logging.getLogger(__name__)

Lost = Callable[[WorkerLostError | SettingsError], None]


class Followers:
    """Of one engine. Belongs to the event loop, but for part and wait()."""

    def __init__(
        self,
        task: Task,
        launch: Launch,
        server: ServerSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`launch` starts them; `server` is where they meet us."""
        self._silence = task.engine.rank_silence_seconds
        self._launch = launch
        self._clock = clock
        ranks = range(1, task.engine.tensor_parallel)
        self._servicer = GroupServicer(task, self, ranks)
        self._members = self._servicer.members
        self._server = Server(server, "group")
        self._loaded: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._loading = set(ranks)
        self._over = False
        self._bad_setting = False
        self._watching: asyncio.Task[None] | None = None
        self._killing: asyncio.Task[None] | None = None
        self.failure: WorkerLostError | SettingsError | None = None
        """Why they are lost."""
        self.part = Part(
            rank=0,
            ranks=task.engine.tensor_parallel,
            host=server.host,
            announce=lambda address: self._soon(self._announce, address),
            find=lambda: "",
            want_round=lambda _number: None,
        )

    async def start(self, lost: Lost) -> None:
        """Has them started; they read their weights meanwhile. `lost` is called once, with why."""
        self._loop = asyncio.get_running_loop()
        self._lost = lost
        self._server.add(
            group_pb2_grpc.add_GroupServiceServicer_to_server,
            self._servicer,
            "tandem.group.v1.GroupService",
        )
        address = await self._server.start()
        await self._launch.start(address, [m.rank for m in self._members], self._ended)

    def wait(self) -> None:
        """Until all have read their weights, and could be met. Any thread but the loop's.

        Raises what `lost` is called with.
        """
        self._loaded.result()

    def watch(self) -> None:
        """From now on one that is silent is lost: it says something every second."""
        watching = watch_silence(self._members, self._silence, self._clock, self._ended)
        self._watching = asyncio.create_task(watching)

    async def close(self, grace_seconds: float) -> None:
        """Has them end, and kills those here that take longer. Idempotent."""
        self._over = True
        if self._watching is not None:
            self._watching.cancel()
        if grace_seconds > 0:
            for member in self._members:
                member.send(pb.JoinResponse(close=pb.Close()))
        else:
            self._cut()
        await all_left(self._members, max(grace_seconds, 1.0))
        await (self._killing or self._launch.end(grace_seconds))
        await self._server.stop(0)

    def _cut(self) -> None:
        """They end when their streams do."""
        for member in self._members:
            member.end()

    # What they say

    def said(self, member: Member, message: pb.JoinRequest) -> None:
        """See servicer.Group."""
        member.heard = self._clock()
        match message.WhichOneof("message"):
            case "following":
                if message.following.loaded:
                    self._is_loaded(member.rank)
            case "failed":
                self._bad_setting = message.failed.reason == SETTINGS
                self._ended(member.rank, message.failed.message)
            case other:
                raise InvalidRequestError("message", other, "what a rank without engine says")

    def _is_loaded(self, rank: int) -> None:
        log.info("rank %d has its weights", rank)
        self._loading.discard(rank)
        if not self._loading and not self._loaded.done():
            self._loaded.set_result(None)

    def lost(self, member: Member, why: str) -> None:
        """See servicer.Group."""
        self._ended(member.rank, why)

    def _ended(self, rank: int, why: str) -> None:
        if self._over:
            return
        self._over = True
        words = f"rank {rank} of {self.part.ranks} is lost: {why}"
        log.error("the model can't be computed any more: %s", words)
        self.failure = SettingsError(why) if self._bad_setting else WorkerLostError(words)
        if not self._loaded.done():
            self._loaded.set_exception(self.failure)
        self._cut()
        self._killing = asyncio.create_task(self._launch.end(0))
        self._lost(self.failure)

    # Rank 0's part in their meeting

    def _soon(self, call: Callable[[str], None], said: str) -> None:
        self._loop.call_soon_threadsafe(call, said)

    def _announce(self, address: str) -> None:
        for member in self._members:
            member.send(pb.JoinResponse(store=pb.Store(address=address)))
