"""A rank as its leader sees it: a stream of commands out, and what it said last."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import grpc

from services.engine.adapters import Adapter
from services.engine.api import EngineInfo, EngineStats
from services.engine.group.sums import RankLoad
from tandem.group.v1 import group_pb2 as pb

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 4_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
)


@dataclass(slots=True)
class Given:
    """A request that a rank has."""

    number: int
    """Of requests given to the rank, from 1."""
    rank: int
    prompt_tokens: int
    """To be computed, as far as is known."""
    adapter: str = ""


@dataclass(slots=True)
class Member:
    """Everything of one rank. Belongs to the event loop."""

    rank: int
    info: EngineInfo | None = None
    channel: grpc.aio.Channel | None = None
    """To its KvTransferService."""
    stats: EngineStats = field(default_factory=EngineStats)
    given: int = 0
    taken: int = 0
    """Of `given`, those that `stats` knows of."""
    heard: float = 0.0
    joined: bool = False
    left: asyncio.Event = field(default_factory=asyncio.Event)
    """Its stream has ended."""
    answers: dict[int, asyncio.Future[Adapter]] = field(default_factory=dict)
    _commands: asyncio.Queue[pb.JoinResponse | None] = field(default_factory=asyncio.Queue)

    def send(self, message: pb.JoinResponse) -> None:
        """Goes out behind what was sent before."""
        self._commands.put_nowait(message)

    def end(self) -> None:
        """There are no more commands."""
        self._commands.put_nowait(None)

    async def commands(self) -> AsyncIterator[pb.JoinResponse]:
        """What was sent, until end()."""
        while (message := await self._commands.get()) is not None:
            yield message

    def load(self, live: list[Given]) -> RankLoad:
        """How busy it is; `live`: what it has of requests."""
        unseen = sum(g.prompt_tokens for g in live if g.number > self.taken)
        return RankLoad(self.stats, len(live), unseen)


async def all_left(members: Sequence[Member], seconds: float) -> None:
    """Waits at most so long until the streams of those that joined have ended.

    Their Close may be on its way still, and streams that we cut would not bring it.
    """
    leaving = [asyncio.create_task(m.left.wait()) for m in members if m.joined]
    if leaving and seconds > 0:
        await asyncio.wait(leaving, timeout=seconds)
    for left in leaving:
        left.cancel()


async def watch_silence(
    members: Sequence[Member],
    most_seconds: float,
    clock: Callable[[], float],
    ended: Callable[[int, str], None],
) -> None:
    """Tells `ended` of a rank that says nothing for longer, until it is cancelled.

    A process that is stopped, or hangs, ends no connection.
    """
    for member in members:
        member.heard = clock()
    why = f"it has said nothing for {most_seconds:g} s (engine.rank_silence_seconds)"
    while True:
        await asyncio.sleep(most_seconds / 10)
        for member in members:
            if clock() - member.heard > most_seconds:
                ended(member.rank, why)
