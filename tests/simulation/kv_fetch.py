"""The sink in the simulation of the KV hand-off (kv_world.py): sink.py, without waiting."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kvtransfer.blocks import checksum
from kvtransfer.errors import KvError, KvSourceLostError, TransportError
from kvtransfer.fetching import (
    Complete,
    Ended,
    Event,
    FetchCore,
    Limits,
    Read,
    ReadDone,
    ReadFailed,
    Renew,
    Renewed,
    Tick,
)
from kvtransfer.landing import DirectLanding
from kvtransfer.pieces import Piece
from tests.simulation.kv_peer import LAYOUT, Call, Source, ViolationError, content

if TYPE_CHECKING:
    from tests.simulation.kv_world import World

RENEW_SECONDS = 2.5
RENEW_TIMEOUT = 3.0
KEEPALIVE_SECONDS = 8.0
"""A peer that does not answer at all is noticed by the connection in this time."""


class Fetch:
    """A sink's fetch, carried out as sink.py does."""

    def __init__(self, world: World, lease_id: str, keys: list[bytes], *, held_only: bool) -> None:
        self.world = world
        self.lease_id, self.keys, self.held_only = lease_id, keys, held_only
        self.ended = False
        self.call: Call | None = None
        self.source: Source | None = None
        self.began = world.now
        self.deadline = world.now + world.random.choice((4.0, 20.0, 60.0))
        self.core = FetchCore(
            LAYOUT,
            len(keys),
            "source",
            Limits(self.deadline, world.stall_seconds, RENEW_SECONDS),
            world.now,
        )
        self.blocks = world.sink.allocate(len(keys))
        self.landing = DirectLanding(world.sink, keys, self.blocks, partial_last=True)
        self._reads = 0
        self._arm()
        world.unary(self._requested, twice=False)

    def _requested(self, source: Source) -> None:
        if self.ended:
            return
        self.source = source
        try:
            self.call = Call(self.world, source, self)
        except KvError as error:
            refused = Ended(KvSourceLostError(error.message, cause=error.reason))
            self.world.at(self.world.latency(), lambda: self.tell(refused))

    def tell(self, event: Event) -> None:
        if self.ended:
            return
        for command in self.core.handle(event, self.world.now):
            match command:
                case Read(pieces, timeout):
                    self._read(pieces, timeout)
                case Renew():
                    self._renew()
                case Complete(index, checksums):
                    self.landing.complete(index, checksums)
        if self.core.over:
            self.finish("done" if self.core.error is None else self._cause())
        else:
            self._arm()

    def _cause(self) -> str:
        assert self.core.error is not None
        return self.core.error.metadata.get("cause", self.core.error.reason)

    def _arm(self) -> None:
        self.world.at(max(0.0, self.core.timer - self.world.now), self._tick)

    def _tick(self) -> None:
        if not self.ended and self.world.now >= self.core.timer:
            self.tell(Tick())

    def _renew(self) -> None:
        """A unary call: request or answer may be lost, and then nothing comes until its timeout."""
        answered = [False]

        def answer(live: bool | None) -> None:
            if not answered[0]:
                answered[0] = True
                self.tell(Renewed(live))

        def asked(source: Source) -> None:
            live = source.store.touch_lease(self.lease_id)
            if not self.world.lost():
                self.world.at(self.world.latency(), lambda: answer(live))

        self.world.at(RENEW_TIMEOUT, lambda: answer(None))
        self.world.unary(asked)

    def _read(self, pieces: tuple[Piece, ...], timeout: float) -> None:
        """Bytes come over a while, then the generations. One-sided: the source does nothing."""
        world, source = self.world, self.source
        assert source is not None
        self._reads += 1
        number, duration = self._reads, world.read_seconds()
        if duration > timeout:
            world.at(timeout, lambda: self._read_failed(number, "too little came in time"))
            return
        for piece in pieces:
            half, when = piece.length // 2, world.random.uniform(0, duration)
            later = world.random.uniform(when, duration)
            world.at(when, partial(self._copy, source, piece, 0, half))
            world.at(later, partial(self._copy, source, piece, half, piece.length))
        world.at(duration, lambda: self._read_done(number, source, pieces))

    def _reachable(self, source: Source) -> bool:
        """Mapped memory outlives the process that it was of; a connection does not."""
        return source.alive or self.world.one_host

    def _copy(self, source: Source, piece: Piece, first: int, last: int) -> None:
        if not self.ended and self._reachable(source):
            at = self.landing._place(piece)
            data = source.store.segment.data[piece.offset + first : piece.offset + last]
            self.world.sink.segment.data[at + first : at + last] = data

    def _read_failed(self, number: int, words: str) -> None:
        if number == self._reads:
            self.tell(ReadFailed(TransportError(words)))

    def _read_done(self, number: int, source: Source, pieces: tuple[Piece, ...]) -> None:
        if self.ended or number != self._reads:
            return
        if not self._reachable(source):
            self._read_failed(number, "the connection broke")
            return
        world, table = self.world, source.store._generations
        stale = any(int(table[p.offset // LAYOUT.block_bytes]) != p.generation for p in pieces)
        wrong = tuple(p for p in pieces if self._checksum(p) != p.checksum)
        world.count["reads of other bytes"] += bool(wrong)
        world.count["reads of other generations"] += stale
        checks = world.checks
        self.tell(ReadDone(wrong if checks.checksums else (), stale and checks.generations))

    def _checksum(self, piece: Piece) -> int:
        at = self.landing._place(piece)
        return checksum(self.world.sink.segment.data[at : at + piece.length])

    def finish(self, how: str) -> None:
        """However it ends: what is complete is right; the blocks go back; the lease is released."""
        self.ended = True
        world = self.world
        world.count[how] += 1
        if world.now > self.deadline + 1e-6:
            raise ViolationError(f"a fetch ended {world.now - self.deadline} s after its deadline")
        for i, (key, block) in enumerate(zip(self.keys, self.blocks, strict=True)):
            if self.core.arrivals.is_complete(i) and not np.array_equal(
                world.sink.memory[block], content(key)
            ):
                raise ViolationError(f"block {i} was taken for {key.hex()} and is not it")
        world.sink.release(self.blocks)
        if self.call is not None and not self.call.broken:
            self.call.cut()
        if how != "sink died":
            lease_id = self.lease_id
            for _ in range(1 + (world.random.random() < 0.1)):
                world.unary(lambda source: source.store.release_lease(lease_id) and None)
        if world.died_at is not None and how != "sink died":
            self._bounded(world.died_at)

    def _bounded(self, died_at: float) -> None:
        """A fetch from a source that died must not outlive it for long, whatever its deadline."""
        if self.source is None or self.source.alive or self.began > died_at:
            return
        bound = died_at + KEEPALIVE_SECONDS + 3 * self.world.stall_seconds
        if self.world.now > bound:
            raise ViolationError(
                f"a fetch noticed only after {self.world.now - died_at} s that it lost"
            )
