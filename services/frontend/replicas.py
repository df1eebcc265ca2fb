"""The coordinators as a frontend sees them: which one it asks, and whether that one is there.

Coordinators are equals. Each frontend has an order of its own among them (rendezvous hashing), so
that frontends spread; it asks the first, and the next ones while that is away. It goes back to the
first when that has been there for HOME_SECONDS, by when workers have registered with it.

Away is who refuses the connection, says that it shuts down, or is silent: brings no answer to
anything for PING_AFTER_SECONDS, and then none to a ping for PING_SECONDS. A request that waits in
a coordinator's queue is thus never taken for silence. Whoever waits for a silent coordinator is
told to go elsewhere, if there is anywhere else to go.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import grpc
import xxhash
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.runtime.channels import Channels
from services.runtime.directory import Directory
from services.runtime.errors import CoordinatorUnavailableError, from_rpc
from tandem.coordinator.v1 import coordinator_pb2_grpc

log = logging.getLogger(__name__)

PING_AFTER_SECONDS = 0.3
PING_SECONDS = 0.7
LATE_SECONDS = 0.25
"""If this process itself wakes up so much too late, nobody else is to blame for a silence."""
FIRST_PAUSE_SECONDS = 0.05
LAST_PAUSE_SECONDS = 0.5
HOME_SECONDS = 10.0

T = TypeVar("T")
_Call = grpc.aio.UnaryUnaryCall[Any, Any]


class Replica:
    """One coordinator. `spare` says whether another one is there."""

    def __init__(
        self,
        address: str,
        channel: grpc.aio.Channel,
        clock: Callable[[], float],
        spare: Callable[[Replica], bool],
    ) -> None:
        self.address = address
        self.stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
        self.up = True
        """As far as is known."""
        self.up_since = -math.inf
        self._health = health_pb2_grpc.HealthStub(channel)
        self._clock = clock
        self._spare = spare
        self._heard_at = -math.inf
        self._calls: set[_Call] = set()
        self._given_up: set[_Call] = set()
        self._watch: asyncio.Task[None] | None = None

    async def answer(self, call: grpc.aio.UnaryUnaryCall[Any, T]) -> T:
        """What a call to it brings.

        Raises CoordinatorUnavailableError if it is away, and grpc.aio.AioRpcError.
        """
        self._calls.add(call)
        self._look()
        try:
            answer: T = await call
        except asyncio.CancelledError:
            if call not in self._given_up or _cancelled():
                raise
            raise self._away("it does not answer") from None
        except grpc.aio.AioRpcError as error:
            told = from_rpc(error)
            if isinstance(told, CoordinatorUnavailableError):
                self._lose(told.message)
                raise told from None
            code = error.code()
            if told is not None:
                self._hear()
            elif code is not grpc.StatusCode.DEADLINE_EXCEEDED:
                if code is grpc.StatusCode.UNAVAILABLE:
                    self._lose(code.name)
                raise self._away(code.name) from None
            raise
        else:
            self._hear()
            return answer
        finally:
            self._calls.discard(call)
            self._given_up.discard(call)

    async def close(self) -> None:
        """Looks after it no more. Who waits for it is told that it is away, and asks another."""
        self._give_up()
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)

    def _away(self, why: str) -> CoordinatorUnavailableError:
        return CoordinatorUnavailableError(
            f"the coordinator at {self.address} can't be reached ({why})", coordinator=self.address
        )

    def _hear(self) -> None:
        self._heard_at = self._clock()
        if not self.up:
            log.info("the coordinator at %s is back", self.address)
            self.up, self.up_since = True, self._heard_at

    def _lose(self, why: str) -> None:
        if self.up:
            log.warning("the coordinator at %s is away: %s", self.address, why)
            self.up = False
        self._look()

    def _look(self) -> None:
        """Sees to it that somebody looks whether it is there, while that matters."""
        if self._watch is None:
            self._watch = asyncio.create_task(self._keep_looking())

    async def _keep_looking(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        try:
            while self._calls or not self.up:
                if self.up:
                    pause = FIRST_PAUSE_SECONDS
                    if not await self._quiet():
                        continue
                there = await self._ping()
                if there:
                    self._hear()
                elif there is False:
                    self._lose("it does not answer")
                    if self._spare(self):
                        self._give_up()
                if not self.up:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LAST_PAUSE_SECONDS)
        finally:
            self._watch = None

    async def _quiet(self) -> bool:
        """Whether nothing came for a while in which this process ran."""
        began = self._clock()
        await asyncio.sleep(PING_AFTER_SECONDS)
        slept = self._clock() - began
        return self._heard_at < began and slept < PING_AFTER_SECONDS + LATE_SECONDS

    async def _ping(self) -> bool | None:
        """Whether it serves; None if this process was not there to hear the answer."""
        began = self._clock()
        try:
            request = health_pb2.HealthCheckRequest()
            answer = await self._health.Check(request, timeout=PING_SECONDS)
        except grpc.aio.AioRpcError as error:
            waited = self._clock() - began
            late = waited >= PING_SECONDS + LATE_SECONDS
            return None if late and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED else False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def _give_up(self) -> None:
        for call in self._calls:
            self._given_up.add(call)
            call.cancel()


class Replicas:
    """Those that the directory lists, and those off the list that answer."""

    def __init__(
        self,
        directory: Directory,
        channels: Channels,
        frontend_id: str,
        clock: Callable[[], float],
    ) -> None:
        self._directory = directory
        self._channels = channels
        self._frontend_id = frontend_id
        self._clock = clock
        self._listed: tuple[str, ...] = ()
        self._replicas: dict[str, Replica] = {}
        self._asked: Replica | None = None
        self._leaving: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Looks after none of them any more."""
        await asyncio.gather(*(r.close() for r in self._replicas.values()), *self._leaving)

    def pick(self, tried: Iterable[Replica] = ()) -> Replica | None:
        """The one to ask that is not in `tried`; None if there is none.

        Those that are away are asked only if all are.
        """
        replicas = self._in_order()
        some = [r for r in replicas if r.up] or replicas
        left = [r for r in some if r not in tried]
        if not left:
            return None
        first, asked = left[0], self._asked
        settled = self._clock() - first.up_since >= HOME_SECONDS
        if asked in left and not settled:
            return asked
        if not tried or asked is None or not asked.up:
            self._asked = first
        return first

    def up(self) -> list[Replica]:
        """All that are there."""
        return [r for r in self._in_order() if r.up]

    def _in_order(self) -> list[Replica]:
        self._follow()
        return list(self._replicas.values())

    def _follow(self) -> None:
        """Takes on who is new in the directory, and drops who is off it and away."""
        listed = self._directory.coordinators
        gone = [a for a, r in self._replicas.items() if not r.up and a not in listed]
        if listed is self._listed and not gone:
            return
        self._listed = listed
        for address in gone:
            self._drop(self._replicas.pop(address))
        new = {a: self._replica(a) for a in listed if a not in self._replicas}
        self._replicas = dict(sorted((self._replicas | new).items(), key=self._place_in_order))

    def _place_in_order(self, item: tuple[str, Replica]) -> int:
        return xxhash.xxh64_intdigest(f"{self._frontend_id} {item[0]}".encode())

    def _replica(self, address: str) -> Replica:
        return Replica(address, self._channels.get(address), self._clock, self._spare)

    def _spare(self, silent: Replica) -> bool:
        return any(r.up for r in self._replicas.values() if r is not silent)

    def _drop(self, replica: Replica) -> None:
        async def leave() -> None:
            await replica.close()
            await self._channels.drop(replica.address)

        task = asyncio.create_task(leave())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)


def _cancelled() -> bool:
    """Whether it is this task that is to end, and not only its call."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
