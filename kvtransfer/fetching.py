"""The sink's side of a fetch: what to do about each thing that can happen to it. Pure.

    state     event                        -> state    what happens
    ------------------------------------------------------------------------------------------
    opening   Opened                       -> flowing  renewals begin
    opening   (stall_seconds)              -> failed   the source does not even answer
    flowing   Announced                    -> flowing  pieces queue up; a read starts if none runs
    flowing   ReadDone, all right          -> flowing  whole blocks complete; the next read starts
    flowing   ReadDone, wrong bytes        -> flowing  those are read once more; wrong again: their
                                                       block is corrupt, and given up alone
    flowing   ReadDone, stale              -> failed   the source gave the memory to other content
    flowing   Renewed(live)                -> flowing
    flowing   Renewed(ended)               -> failed   the lease is over: memory may be reused
    flowing   Renewed(no answer), twice    -> failed   the source is unreachable
    flowing   Ended                        -> flowing  what was announced is still read, then:
    flowing   everything in or corrupt     -> done
    flowing   nothing more can come        -> failed
    any       ReadFailed                   -> failed
    any       (deadline)                   -> failed
    done, failed  everything               -> same     nothing happens any more

A fetch so ends by its deadline whatever is lost, late or doubled, and sooner if the source dies: in
stall_seconds at most while it reads or opens, in about two renewals while it waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from kvtransfer.arrivals import Arrivals
from kvtransfer.errors import KvError, KvSourceLostError, TransportError
from kvtransfer.layout import KvLayout
from kvtransfer.pieces import Piece

BATCH_BYTES = 16 * 2**20
BATCH_PIECES = 4096
RENEWALS_PER_LEASE = 4
WAITING_PIECES = 1024
"""So many more pieces than layers there are may wait to be read; beyond, the source is mad."""
MISSES = 2
"""Renewals in a row without an answer that mean that the source is gone."""

Span = tuple[int, int]
"""First layer and layers of a piece."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a fetch may take. `deadline` by the clock of handle(), the others in seconds."""

    deadline: float
    stall_seconds: float
    """For one read of BATCH_BYTES at most, and for the source's first answer."""
    renew_seconds: float
    """Between renewals, at most; a quarter of the lease if that is less."""


# Events


@dataclass(frozen=True, slots=True)
class Opened:
    """The source agreed; its lease lasts so long after it was last heard of."""

    lease_seconds: float


@dataclass(frozen=True, slots=True)
class Announced:
    """Pieces that can be read."""

    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Ended:
    """The source announces no more: it has announced all, or `error` says what broke."""

    error: KvError | None = None


@dataclass(frozen=True, slots=True)
class ReadDone:
    """The read asked for last is in place. `wrong`: pieces whose checksum does not match.

    `stale`: a block's generation is not the announced one any more.
    """

    wrong: tuple[Piece, ...] = ()
    stale: bool = False


@dataclass(frozen=True, slots=True)
class ReadFailed:
    """The read asked for last came to nothing."""

    error: TransportError


@dataclass(frozen=True, slots=True)
class Renewed:
    """What came of a renewal: the lease is live, or ended, or (None) there was no answer."""

    live: bool | None


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: FetchCore.timer is due."""


Event = Opened | Announced | Ended | ReadDone | ReadFailed | Renewed | Tick

# Commands


@dataclass(frozen=True, slots=True)
class Read:
    """Read these pieces, check them, answer with ReadDone or ReadFailed within the timeout."""

    pieces: tuple[Piece, ...]
    timeout: float


@dataclass(frozen=True, slots=True)
class Renew:
    """Renew the lease; answer with Renewed."""


@dataclass(frozen=True, slots=True)
class Complete:
    """Every layer of this key's block is in place and right; checksums by layers."""

    index: int
    checksums: Mapping[Span, int]


Command = Read | Renew | Complete


class FetchCore:
    """One fetch of `keys` blocks from a source whose layout is `layout`."""

    def __init__(
        self, layout: KvLayout, keys: int, address: str, limits: Limits, now: float
    ) -> None:
        self.arrivals = Arrivals(layout, keys)
        self.over = False
        """Done or failed: no command follows."""
        self.error: KvError | None = None
        """Why it failed."""
        self.bytes = 0
        """Verified and in place."""
        self.corrupt_reads = 0
        """Pieces that were wrong the first time."""
        self._address = address
        self._limits = limits
        self._opened = False
        self._open_by = now + limits.stall_seconds
        self._queue: deque[Piece] = deque()
        self._most = WAITING_PIECES + keys * layout.layers
        self._reading: tuple[Piece, ...] = ()
        self._again = False
        """What is being read was wrong before."""
        self._ended: Ended | None = None
        self._renew_every = limits.renew_seconds
        self._renew_at = float("inf")
        self._misses = 0
        self._checksums: dict[int, dict[Span, int]] = {}

    @property
    def timer(self) -> float:
        """When a Tick is due at the latest."""
        return min(self._limits.deadline, self._renew_at if self._opened else self._open_by)

    def handle(self, event: Event, now: float) -> list[Command]:
        """What to do about an event, in this order."""
        if self.over:
            return []
        commands: list[Command] = []
        match event:
            case Opened(lease_seconds):
                self._open(lease_seconds, now)
            case Announced(pieces):
                self._announced(pieces)
            case Ended():
                self._ended = self._ended or event
            case ReadDone(wrong, stale):
                commands += self._read_done(wrong, stale, now)
            case ReadFailed(error):
                self._reading = ()
                self._lose(error.message, error.reason)
            case Renewed(live):
                self._renewed(live, now)
            case Tick():
                commands += self._tick(now)
        if not self.over and not self._reading:
            commands += self._next(now)
        return commands

    def _open(self, lease_seconds: float, now: float) -> None:
        self._opened = True
        self._renew_every = min(self._renew_every, lease_seconds / RENEWALS_PER_LEASE)
        self._renew_at = now + self._renew_every

    def _announced(self, pieces: tuple[Piece, ...]) -> None:
        self._queue.extend(pieces)
        if len(self._queue) > self._most:
            self._lose("it announced more pieces than there can be", "TRANSPORT_FAILED")

    def _tick(self, now: float) -> list[Command]:
        if now >= self._limits.deadline:
            self._lose("it did not have everything ready in time", "TIMEOUT")
        elif not self._opened and now >= self._open_by:
            self._lose(f"no answer in {self._limits.stall_seconds:g} s", "TIMEOUT")
        elif self._opened and now >= self._renew_at:
            self._renew_at = float("inf")  # One at a time.
            return [Renew()]
        return []

    def _renewed(self, live: bool | None, now: float) -> None:
        if live is False:
            self._lose("its lease ended", "LEASE_LOST")
        elif live is None and (misses := self._misses + 1) >= MISSES:
            self._lose(f"{misses} renewals were not answered", "UNAVAILABLE")
        else:
            self._misses = 0 if live else self._misses + 1
            self._renew_at = now + self._renew_every

    def _read_done(self, wrong: tuple[Piece, ...], stale: bool, now: float) -> list[Command]:
        pieces, self._reading = self._reading, ()
        if stale:
            self._lose("it gave a block's memory to other content while it was read", "STALE")
            return []
        bad = set(wrong)
        commands = self._verified([p for p in pieces if p not in bad] if bad else pieces)
        if wrong and not self._again:
            self.corrupt_reads += len(wrong)
            return [*commands, self._read(wrong, now, again=True)]
        for piece in wrong:
            self.arrivals.failed(piece)
            self._checksums.pop(piece.key_index, None)
        return commands

    def _verified(self, pieces: list[Piece] | tuple[Piece, ...]) -> list[Command]:
        commands: list[Command] = []
        for piece in pieces:
            self.bytes += piece.length
            spans = self._checksums.setdefault(piece.key_index, {})
            spans[piece.first_layer, piece.layers] = piece.checksum
            if self.arrivals.verified(piece):
                commands.append(Complete(piece.key_index, self._checksums.pop(piece.key_index)))
        return commands

    def _next(self, now: float) -> list[Command]:
        """Nothing is being read: the next batch, or the end."""
        if self.arrivals.done:
            self.over = True
            return []
        batch: list[Piece] = []
        size = 0
        while self._queue and len(batch) < BATCH_PIECES:
            if batch and size + self._queue[0].length > BATCH_BYTES:
                break
            piece = self._queue.popleft()
            try:
                wanted = self.arrivals.claim(piece)
            except TransportError as error:
                self._lose(error.message, error.reason)
                return []
            if wanted:
                size += piece.length
                batch.append(piece)
        if batch:
            return [self._read(tuple(batch), now, again=False)]
        if self._ended is not None:
            self._give_up(self._ended.error)
        return []

    def _read(self, pieces: tuple[Piece, ...], now: float, *, again: bool) -> Read:
        self._reading, self._again = pieces, again
        left = max(0.0, self._limits.deadline - now)
        return Read(pieces, min(self._limits.stall_seconds, left))

    def _give_up(self, error: KvError | None) -> None:
        if error is None:
            self._lose("it ended the fetch before it had announced all", "INCOMPLETE")
        else:
            self.over, self.error = True, error

    def _lose(self, words: str, cause: str) -> None:
        self.over = True
        self.error = KvSourceLostError(
            f"source {self._address}: {words}", cause=cause, address=self._address
        )
