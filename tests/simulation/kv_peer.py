"""The source in the simulation of the KV hand-off (kv_world.py): its engine and its servicer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvtransfer.errors import KvError, KvSourceLostError, OutOfBlocksError
from kvtransfer.fetching import Announced, Ended, Opened
from kvtransfer.layout import gqa_layout
from kvtransfer.store import KvStore

if TYPE_CHECKING:
    from tests.simulation.kv_fetch import Fetch
    from tests.simulation.kv_world import World

LAYOUT = gqa_layout("sim", layers=2, kv_heads=1, head_dim=8, dtype="bfloat16", block_tokens=4)
BLOCKS = 8
EXPIRE_EVERY = 1.0
NONCE = bytes(16)
_content: dict[bytes, np.ndarray] = {}


def content(key: bytes) -> np.ndarray:
    """The bytes of the block of a key."""
    known = _content.get(key)
    if known is None:
        seed = np.frombuffer(key, np.uint8)
        known = np.resize(np.concatenate([seed, seed[::-1] ^ 0x5A, seed + 1]), LAYOUT.block_bytes)
        _content[key] = known
    return known


class ViolationError(AssertionError):
    """What must never be."""


@dataclass(slots=True)
class Prompt:
    """A prompt that the source computes for a sink to fetch."""

    lease_id: str
    keys: list[bytes]
    blocks: list[int] = field(default_factory=list)
    left: list[tuple[int, int]] = field(default_factory=list)
    over: bool = False


class Source:
    """One life of the source process."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.alive = True
        self.frozen_until = 0.0
        self.store = KvStore(
            LAYOUT,
            BLOCKS,
            layers_per_piece=1,
            scratch_bytes=0,
            clock=lambda: world.now,
            nonce=NONCE,
        )
        self.calls: list[Call] = []
        self.at(EXPIRE_EVERY, self._expire)

    def at(self, delay: float, action: Callable[[], None]) -> None:
        """Later, if this life lasts that long; a frozen process does nothing until it thaws."""

        def run() -> None:
            if not self.alive:
                return
            if self.frozen_until > self.world.now:
                self.world.at(self.frozen_until - self.world.now, run)
            else:
                action()

        self.world.at(delay, run)

    def allocate(self, count: int) -> list[int]:
        leased = set(self.store._leases.held())
        blocks = self.store.allocate(count)
        if leased & set(blocks):
            raise ViolationError(f"leased blocks {leased & set(blocks)} were given away")
        return blocks

    # As the engine does

    def begin(self, prompt: Prompt) -> None:
        if not self.store.open_lease(prompt.lease_id, self.world.lease_seconds):
            prompt.over = True
            return
        self.at(self.world.delay(), lambda: self._place(prompt, 20))

    def _place(self, prompt: Prompt, patience: int) -> None:
        if prompt.over:
            return
        try:
            cached = self.store.match(prompt.keys[:-1])
            rest = len(prompt.keys) - len(cached)
            try:
                prompt.blocks = cached + self.allocate(rest)
            except OutOfBlocksError:
                self.store.release(cached)
                raise
        except OutOfBlocksError:
            if patience:
                self.at(self.world.delay(), lambda: self._place(prompt, patience - 1))
            else:
                self.cancel(prompt)
            return
        self.store.lease_add(prompt.lease_id, prompt.blocks, prompt.keys)
        new = range(len(cached), len(prompt.keys))
        prompt.left = [(i, layer) for layer in range(LAYOUT.layers) for i in new]
        self.at(self.world.delay(), lambda: self._compute(prompt))

    def _compute(self, prompt: Prompt) -> None:
        if prompt.over:
            return
        for _ in range(self.world.random.randint(1, 3)):
            if not prompt.left:
                self._finish(prompt)
                return
            index, layer = prompt.left.pop(0)
            self.write(prompt.blocks[index], prompt.keys[index], layer)
        self.at(self.world.delay(), lambda: self._compute(prompt))

    def write(self, block: int, key: bytes, layer: int) -> None:
        if layer == 0:
            self.store.begin(block, key)
        size = LAYOUT.layer_bytes
        span = slice(layer * size, (layer + 1) * size)
        self.store.memory[block][span] = content(key)[span]
        self.store.piece_done(block, layer, 1)

    def _finish(self, prompt: Prompt) -> None:
        prompt.over = True
        self.store.lease_complete(prompt.lease_id)
        for block in prompt.blocks[:-1]:
            self.store.commit(block)
        self.store.release(prompt.blocks)

    def cancel(self, prompt: Prompt) -> None:
        if prompt.over:
            return
        prompt.over = True
        self.store.release_lease(prompt.lease_id, "cancelled")
        self.store.release(prompt.blocks)

    def crowd(self) -> None:
        """Another prompt: takes what memory it can get, writes into it, goes."""
        room = self.store.available()
        if room:
            blocks = self.allocate(self.world.random.randint(1, room))
            for block in blocks:
                key = self.world.fresh_key()
                for layer in range(LAYOUT.layers):
                    self.write(block, key, layer)
                if self.world.random.random() < 0.5:
                    self.store.commit(block)
            self.at(self.world.delay(), lambda: self.store.release(blocks))

    def _expire(self) -> None:
        self.world.count["leases expired"] += len(self.store.expire())
        self.at(EXPIRE_EVERY, self._expire)

    def die(self) -> None:
        self.alive = False
        for call in list(self.calls):
            call.peer_died()


class Call:
    """One Fetch: the source's handler and the stream of its answers."""

    def __init__(self, world: World, source: Source, fetch: Fetch) -> None:
        self.world, self.source, self.fetch = world, source, fetch
        self.broken = False
        self._busy = False
        self._last = 0.0
        self._wakes = 0
        self._watch = source.store.watch(
            fetch.lease_id,
            fetch.keys,
            lambda: source.at(0.0, self._serve),
            world.lease_seconds,
            held_only=fetch.held_only,
        )
        source.calls.append(self)
        self._send(Opened(world.lease_seconds))
        source.at(0.0, self._serve)

    def _serve(self) -> None:
        while self._watch.remaining and not self.broken:
            try:
                pieces = self.source.store.take(self._watch, self.world.random.randint(1, 4))
            except KvError as error:
                words = f"{error.reason}: {error.message}"
                self._send(Ended(KvSourceLostError(words, cause=error.reason)))
                self.end()
                return
            if not pieces:
                return
            self._send(Announced(tuple(self.world.shuffled(pieces))))
        if not self.broken:
            self._send(Ended())
            self.end()

    def end(self) -> None:
        """The handler is over."""
        self.source.store.unwatch(self._watch)
        if self in self.source.calls:
            self.source.calls.remove(self)

    def _send(self, event: object) -> None:
        """A stream keeps its order; whoever loses one message of it loses the stream."""
        if self.world.lost():
            self.cut()
            return
        self._last = max(self._last, self.world.now + self.world.latency())
        self.world.at(self._last - self.world.now, lambda: self._arrive(event))

    def _arrive(self, event: object) -> None:
        if not self.broken:
            self.fetch.tell(event)

    def cut(self) -> None:
        """The connection is gone, which either side notices in its own time."""
        if self.broken:
            return
        self.broken = True
        gone = Ended(KvSourceLostError("the call broke", cause="UNAVAILABLE"))
        self.world.at(self.world.notice(), lambda: self.fetch.tell(gone))
        self.source.at(self.world.notice(), self.end)

    def peer_died(self) -> None:
        self.cut()
