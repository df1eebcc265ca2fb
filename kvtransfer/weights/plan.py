"""What is asked of which peer, and what is done when one fails. A pure state machine.

A fetch lacks pieces, and knows peers, best first, that say they have all of them. Rules:

 1. Every open peer is kept busy: it has as many pieces asked of it as its window has room, so that
    faster ones bring more. A few peers are used at a time; the others are in reserve.
 2. Once every piece is asked for, an idle peer is asked for what another one owes longest, so that
    the slowest does not decide about the end. Nobody is asked twice at once for one piece, and
    no piece of more than two peers.
 3. A peer that is lost, or brings nothing for `stall_seconds`, is dialled again after a pause;
    after MOST_DIALS without a piece it is dropped. One that refuses is dropped at once.
 4. Wrong bytes are asked for again. A peer that brought MOST_WRONG wrong pieces is dropped.
 5. What a peer that is gone owed is asked of others. The fetch fails when all are dropped.

    state     event                    → state     what happens
    reserve   fewer used than may be   → dialling  Dial
    dialling  opened                   → open      Ask
    open      arrived, right           → open      Ask; done when nothing is missing
    open      arrived, wrong           → open      Ask; the second time → dropped, HangUp
    open      silent too long          → away      HangUp
    dialling, open  lost               → away
    dialling, open  refused            → dropped
    away      pause is over            → dialling  Dial
    away      no dials left            → dropped
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvtransfer.errors import WeightsLostError

MOST_PEERS = 4
MOST_DIALS = 5
MOST_WRONG = 2
FIRST_PAUSE_SECONDS = 0.5
"""Before a peer is dialled again; twice as long each time."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A peer is ready to give, `window` pieces at a time."""

    peer: int
    window: int


@dataclass(frozen=True, slots=True)
class Arrived:
    """A piece asked of a peer is here; `right`: it is what it should be, and kept."""

    peer: int
    piece: int
    right: bool


@dataclass(frozen=True, slots=True)
class Lost:
    """A peer gives no more. `refused`: by its own will, so that asking again is in vain."""

    peer: int
    why: str
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Tick:
    """`FetchPlan.timer` has come; also the beginning."""


Event = Opened | Arrived | Lost | Tick


@dataclass(frozen=True, slots=True)
class Dial:
    """Open a connection; answered by Opened or Lost."""

    peer: int


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask for pieces; each is answered by Arrived, or all by Lost."""

    peer: int
    pieces: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class HangUp:
    """Give the connection up; nothing that still comes of it counts."""

    peer: int


Command = Dial | Ask | HangUp


class _State(enum.Enum):
    RESERVE = enum.auto()
    DIALLING = enum.auto()
    OPEN = enum.auto()
    AWAY = enum.auto()
    DROPPED = enum.auto()


_USED = (_State.DIALLING, _State.OPEN, _State.AWAY)


@dataclass(slots=True)
class _Peer:
    name: str
    state: _State = _State.RESERVE
    window: int = 0
    owes: dict[int, float] = field(default_factory=dict)
    """Pieces asked of it, in the order asked; since when."""
    heard: float = 0.0
    dials: int = 0
    """Since it last brought a piece."""
    wrong: int = 0
    until: float = 0.0
    """AWAY: when it is dialled again."""
    why: str = ""


class FetchPlan:
    """See the module's docstring. Times are one clock's, in seconds."""

    def __init__(self, missing: Iterable[int], peers: Sequence[str], stall_seconds: float) -> None:
        self._todo = deque(missing)
        self._missing = set(self._todo)
        self._peers = [_Peer(name) for name in peers]
        self._stall_seconds = stall_seconds

    @property
    def missing(self) -> frozenset[int]:
        """Pieces that are not here yet."""
        return frozenset(self._missing)

    @property
    def left(self) -> int:
        """How many those are."""
        return len(self._missing)

    @property
    def error(self) -> WeightsLostError | None:
        """Why the fetch has failed, if it has."""
        if not self._missing or any(p.state is not _State.DROPPED for p in self._peers):
            return None
        said = "; ".join(f"{peer.name}: {peer.why}" for peer in self._peers) or "there are none"
        return WeightsLostError(
            f"no peer can give the weights, {len(self._missing)} pieces are missing. {said}",
            missing=len(self._missing),
        )

    @property
    def over(self) -> bool:
        """Done, or failed."""
        return not self._missing or self.error is not None

    @property
    def dropped(self) -> dict[str, str]:
        """Peers that are not asked any more: name to why."""
        return {p.name: p.why for p in self._peers if p.state is _State.DROPPED}

    @property
    def timer(self) -> float:
        """When a Tick is due."""
        due = [p.until for p in self._peers if p.state is _State.AWAY]
        due += [
            p.heard + self._stall_seconds for p in self._peers if p.state is _State.OPEN and p.owes
        ]
        return min(due, default=float("inf"))

    def handle(self, event: Event, now: float) -> list[Command]:
        """What is to be done about an event."""
        commands: list[Command] = []
        match event:
            case Opened(peer, window):
                self._opened(self._peers[peer], window, now)
            case Arrived(peer, piece, right):
                self._arrived(peer, piece, right, now, commands)
            case Lost(peer, why, refused):
                self._lost(self._peers[peer], why, refused, now)
            case Tick():
                self._look(now, commands)
        if not self.over:
            self._use(commands)
            self._ask(now, commands)
        return commands

    def _opened(self, peer: _Peer, window: int, now: float) -> None:
        if peer.state is _State.DIALLING:
            peer.state, peer.window, peer.heard = _State.OPEN, max(1, window), now

    def _arrived(
        self, index: int, piece: int, right: bool, now: float, commands: list[Command]
    ) -> None:
        if right and piece in self._missing:
            self._missing.remove(piece)
        peer = self._peers[index]
        if peer.owes.pop(piece, None) is None:
            return  # it has been given up, or never asked
        peer.heard = now
        if right:
            peer.dials = 0
            return
        self._again([piece])
        peer.wrong += 1
        if peer.wrong >= MOST_WRONG:
            why = f"it brought {peer.wrong} pieces whose bytes are not those described"
            self._drop(peer, why)
            commands.append(HangUp(index))

    def _lost(self, peer: _Peer, why: str, refused: bool, now: float) -> None:
        if peer.state not in (_State.DIALLING, _State.OPEN):
            return
        if refused or peer.dials >= MOST_DIALS:
            self._drop(peer, why)
            return
        self._give_up(peer)
        peer.why = why
        peer.until = now + FIRST_PAUSE_SECONDS * 2 ** (peer.dials - 1)
        peer.state = _State.AWAY

    def _look(self, now: float, commands: list[Command]) -> None:
        for index, peer in enumerate(self._peers):
            stalled = now >= peer.heard + self._stall_seconds
            if peer.state is _State.AWAY and now >= peer.until:
                self._dial(index, commands)
            elif peer.state is _State.OPEN and peer.owes and stalled:
                why = f"it brought nothing for {self._stall_seconds:g} s"
                self._lost(peer, why, refused=False, now=now)
                commands.append(HangUp(index))

    def _use(self, commands: list[Command]) -> None:
        """Takes peers out of reserve."""
        used = sum(peer.state in _USED for peer in self._peers)
        for index, peer in enumerate(self._peers):
            if used < MOST_PEERS and peer.state is _State.RESERVE:
                self._dial(index, commands)
                used += 1

    def _dial(self, index: int, commands: list[Command]) -> None:
        peer = self._peers[index]
        peer.state = _State.DIALLING
        peer.dials += 1
        commands.append(Dial(index))

    def _ask(self, now: float, commands: list[Command]) -> None:
        for index, peer in enumerate(self._peers):
            if peer.state is not _State.OPEN:
                continue
            asked = []
            while len(peer.owes) < peer.window and (piece := self._next(peer)) is not None:
                if not peer.owes:
                    peer.heard = now
                peer.owes[piece] = now
                asked.append(piece)
            if asked:
                commands.append(Ask(index, tuple(asked)))

    def _next(self, peer: _Peer) -> int | None:
        """A piece that nobody is asked for; else, for who owes nothing, one that another owes."""
        while self._todo:
            piece = self._todo.popleft()
            if piece in self._missing and not self._owed(piece):
                return piece
        if peer.owes:
            return None
        owed = [
            (since, piece)
            for other in self._peers
            for piece, since in other.owes.items()
            if piece in self._missing and self._owed(piece) == 1
        ]
        return min(owed)[1] if owed else None

    def _owed(self, piece: int) -> int:
        """How many peers are asked for it."""
        return sum(piece in peer.owes for peer in self._peers)

    def _drop(self, peer: _Peer, why: str) -> None:
        self._give_up(peer)
        peer.state, peer.why = _State.DROPPED, why

    def _give_up(self, peer: _Peer) -> None:
        owed = list(peer.owes)
        peer.owes.clear()
        self._again(owed)

    def _again(self, pieces: Sequence[int]) -> None:
        """Puts pieces back that nobody is asked for now, in front."""
        for piece in reversed(pieces):
            if piece in self._missing and not self._owed(piece):
                self._todo.appendleft(piece)
