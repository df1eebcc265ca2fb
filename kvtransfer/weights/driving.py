"""Gets the pieces that are missing: carries out what FetchPlan says."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from kvtransfer.channels import Channels
from kvtransfer.errors import NoTransportError
from kvtransfer.memory import NONCE_BYTES, Segment
from kvtransfer.offload import Offload
from kvtransfer.transports.base import Transport
from kvtransfer.transports.build import make_transports
from kvtransfer.weights import wire
from kvtransfer.weights.finding import Wanted, Watch
from kvtransfer.weights.giving import WINDOW
from kvtransfer.weights.landing import FolderLanding
from kvtransfer.weights.plan import (
    MOST_PEERS,
    Arrived,
    Ask,
    Command,
    Dial,
    Event,
    FetchPlan,
    HangUp,
    Tick,
)
from kvtransfer.weights.session import Memory, Session

VERIFIERS = 4
"""Threads that verify and write."""


@dataclass(slots=True)
class FromPeer:
    """What one peer brought."""

    transport: str = ""
    why: str = ""
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Means:
    """How this process reads from peers: transports, best first, and where TCP may listen.

    host_id: names the host for shared memory, None: found out. A peer that brings nothing for
    `stall_seconds` is lost.
    """

    transports: Sequence[str] = ("shm", "tcp")
    tcp_host: str = "127.0.0.1"
    host_id: str | None = None
    stall_seconds: float = 15.0


class PieceFetch:
    """The pieces `missing` of a folder; `here`: bytes of it that are not. `run` once."""

    def __init__(
        self,
        means: Means,
        wanted: Wanted,
        landing: FolderLanding,
        peers: Sequence[str],
        missing: Sequence[int],
        here: int,
        watch: Watch,
    ) -> None:
        self.plan = FetchPlan(missing, peers, means.stall_seconds)
        self.brought: dict[str, FromPeer] = {}
        self._means = means
        self._watch = watch
        self._wanted = wanted
        self._here = here
        self._landing = landing
        self._peers = peers
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[Session | None, Event]] = deque()
        self._news = asyncio.Event()
        self._fault: BaseException | None = None
        self._sessions: dict[int, Session] = {}
        self._tasks: dict[Session, asyncio.Task[None]] = {}
        self._channels = Channels()
        self._offload = Offload(VERIFIERS)
        piece_bytes = landing.manifest.piece_bytes
        count = min(MOST_PEERS * WINDOW, len(missing))
        nonce = secrets.token_bytes(NONCE_BYTES)
        self._segment = Segment(count * piece_bytes, nonce)
        self._memory = Memory(self._segment, piece_bytes)
        self._transports: list[Transport] = []

    async def run(self) -> None:
        """Raises WeightsLostError, NoTransportError, OSError."""
        asked = make_transports(
            self._means.transports,
            self._segment,
            self._offload,
            host=self._means.tcp_host,
            port=0,
            host_id=self._means.host_id,
        )
        self._transports = [t for t in asked if not t.why_not()]
        if not self._transports:
            said = "; ".join(f"{t.name}: {t.why_not()}" for t in asked)
            raise NoTransportError(f"no transport can be used here: {said}")
        try:
            for transport in self._transports:
                await transport.start()
            await self._drive()
        finally:
            await self._stop()
        assert self._landing.whole, "every piece is here, so every file has its name"

    async def _drive(self) -> None:
        manifest, plan = self._landing.manifest, self.plan
        total, done = manifest.nbytes, self._here
        self._told(None, Tick())
        while True:
            while self._events:
                session, event = self._events.popleft()
                if self._is_stale(session, event):
                    continue
                left = plan.left
                for command in plan.handle(event, self._loop.time()):
                    self._carry_out(command)
                if isinstance(event, Arrived) and plan.left < left:
                    done += manifest.piece(event.piece).length
                    self._watch("fetch", done, total)
            if self._fault is not None:
                raise self._fault
            if plan.error is not None:
                raise plan.error
            if plan.over:
                return
            await self._wait(plan.timer)

    def _is_stale(self, session: Session | None, event: Event) -> bool:
        """Whether it is of a call that was given up since; a right piece counts all the same."""
        if session is None or session in self._sessions.values():
            return False
        return not (isinstance(event, Arrived) and event.right)

    async def _wait(self, until: float) -> None:
        """Until something happens, or that time, which is an event, too."""
        self._news.clear()
        try:
            async with asyncio.timeout_at(until if until != float("inf") else None):
                await self._news.wait()
        except TimeoutError:
            self._told(None, Tick())

    def _carry_out(self, command: Command) -> None:
        match command:
            case Dial(peer):
                self._dial(peer)
            case Ask(peer, pieces):
                self._sessions[peer].ask(pieces)
            case HangUp(peer):
                self._hang_up(self._sessions.pop(peer))

    def _dial(self, peer: int) -> None:
        address = self._peers[peer]

        def told(event: Event) -> None:
            self._told(session, event)

        session = Session(
            peer,
            address,
            self._opening,
            self._landing,
            self._memory,
            self._offload,
            self._means.stall_seconds,
            told,
            self._failed,
        )
        self._sessions[peer] = session
        task = self._loop.create_task(self._run(session, address))
        self._tasks[session] = task

    async def _run(self, session: Session, address: str) -> None:
        try:
            await session.run(self._channels.use(address), self._transports)
        except Exception as error:
            self._failed(error)
        finally:
            # A dead peer's channel would go on with its own pauses between attempts.
            await self._channels.done(address, gone=True)
            brought = self.brought.setdefault(address, FromPeer())
            brought.transport, brought.why = session.transport, session.why
            brought.bytes += session.bytes

    def _hang_up(self, session: Session) -> None:
        self._tasks[session].cancel()

    def _told(self, session: Session | None, event: Event) -> None:
        self._events.append((session, event))
        self._news.set()

    def _failed(self, error: BaseException) -> None:
        self._fault = error
        self._news.set()

    def _opening(self, transports: Sequence[Transport]) -> wire.Opening:
        return wire.Opening(
            self._wanted.model,
            self._landing.manifest.digest,
            tuple(t.sink_offer() for t in transports),
            self._wanted.region,
        )

    async def _stop(self) -> None:
        """Ends every session; nothing is written afterwards."""
        cancelled = False
        tasks = set(self._tasks.values())
        for task in tasks:
            task.cancel()
        while tasks:
            try:
                _, tasks = await asyncio.wait(tasks)
            except asyncio.CancelledError:
                cancelled = True
        await self._channels.close()
        for transport in self._transports:
            await transport.close()
        self._offload.close()
        self._segment.close()
        if cancelled:
            raise asyncio.CancelledError
