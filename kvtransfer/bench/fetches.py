"""Whole fetches: gRPC, negotiation, reads, verification, commit. And where their time goes."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable
from contextlib import AsyncExitStack

from kvtransfer.bench.figures import Row, Share, row, size_words
from kvtransfer.bench.peer import Peer
from kvtransfer.bench.rounds import Subject, Times, take_turns
from kvtransfer.bench.serving import (
    LAYERS_PER_PIECE,
    Served,
    keys,
    layout,
    serve_store,
    started,
)
from kvtransfer.blocks import checksum
from kvtransfer.endpoint import KvEndpoint
from kvtransfer.offload import Offload
from kvtransfer.store import KvStore
from kvtransfer.transports.base import Read

AT_ONCE = (1, 4, 16)
EACH = 16
"""Blocks of each of the fetches at once."""
ONE_BLOCK_ROUNDS = 8
"""As many times more rounds of single blocks: they are short."""


class _Sink:
    """A store and endpoint that fetch what the peer has."""

    def __init__(self, store: KvStore, endpoint: KvEndpoint, address: str) -> None:
        self._store = store
        self._endpoint = endpoint
        self._address = address
        self._names = (f"bench-{os.getpid()}-{n}" for n in itertools.count())
        self._keys = keys(store.total_blocks)

    def fetches(self, count: int, blocks: int) -> Subject:
        """`count` fetches at once of `blocks` blocks each, other ones each."""

        async def fetch(number: int) -> None:
            # What an earlier round cached is evicted by this.
            held = self._store.allocate(count * blocks)
            await asyncio.gather(
                *(self._one(at, held[at : at + blocks]) for at in range(0, len(held), blocks))
            )
            self._store.release(held)

        return fetch

    async def _one(self, first: int, held: list[int]) -> None:
        wanted = self._keys[first : first + len(held)]
        report = await self._endpoint.fetch(
            self._address, next(self._names), wanted, held, partial_last=False
        )
        report.require_sound()


async def measure(
    name: str, rounds: int, say: Callable[[str], None]
) -> tuple[list[Row], list[Share]]:
    """Rows and shares of one transport. Raises AbsentError, PeerError, KvError."""
    total = max(AT_ONCE) * EACH
    async with AsyncExitStack() as stack:
        store = KvStore(layout(), total, layers_per_piece=LAYERS_PER_PIECE)
        store.segment.data[:] = 1
        beside = await started(name, store.segment, stack)
        peer = stack.enter_context(Peer(4096))
        served: Served = peer.start(serve_store, (name, total))
        endpoint = KvEndpoint(store, transports=[name])
        await endpoint.start()
        stack.push_async_callback(endpoint.close)
        reader = await beside.connect(served.ticket, served.address, 10)
        stack.push_async_callback(reader.close)
        offload = Offload()
        stack.callback(offload.close)
        sink = _Sink(store, endpoint, served.address)
        await sink.fetches(1, total)(0)

        say(f"fetch over {name}: one block")
        one = await take_turns(
            {
                "fetch": sink.fetches(1, 1),
                "read": lambda number: reader.read(_reads(store, 1), 60),
                "checksum": _checksums(store, offload, 1),
            },
            ONE_BLOCK_ROUNDS * rounds,
            peer.pid,
        )
        say(f"fetch over {name}: {EACH} blocks")
        many = await take_turns(
            {
                "fetch": sink.fetches(1, EACH),
                "read": lambda number: reader.read(_reads(store, EACH), 60),
                "checksum": _checksums(store, offload, EACH),
            },
            rounds,
            peer.pid,
        )
        rows = [_row(name, 1, 1, one["fetch"]), _row(name, 1, EACH, many["fetch"])]
        for count in AT_ONCE[1:]:
            say(f"fetch over {name}: {count} at once")
            times = await take_turns({"fetch": sink.fetches(count, EACH)}, rounds, peer.pid)
            rows.append(_row(name, count, EACH, times["fetch"]))
        return rows, [_share(name, 1, one), _share(name, EACH, many)]


def _reads(store: KvStore, blocks: int) -> list[Read]:
    """What a fetch reads: contiguous on both sides here, where both stores are new."""
    return [Read(0, 0, blocks * store.block_bytes)]


def _checksums(store: KvStore, offload: Offload, blocks: int) -> Subject:
    pieces = blocks * store.grid.count
    size = store.block_bytes // store.grid.count

    def verify(stop: Callable[[], bool]) -> None:
        for at in range(pieces):
            checksum(store.segment.data[at * size : (at + 1) * size])

    async def run(number: int) -> None:
        await offload.run(verify, pieces * size)

    return run


def _words(count: int, blocks: int) -> str:
    what = "a block" if blocks == 1 else f"{blocks} blocks"
    words = f"{what} of {size_words(layout().block_bytes)}"
    return words if count == 1 else f"{count} at once, each {words}"


def _row(name: str, count: int, blocks: int, times: Times) -> Row:
    nbytes = count * blocks * layout().block_bytes
    return row(f"fetch, {name}", _words(count, blocks), nbytes, count * blocks, times)


def _share(name: str, blocks: int, times: dict[str, Times]) -> Share:
    total, read, check = (1e3 * times[key].median for key in ("fetch", "read", "checksum"))
    return Share(
        f"fetch, {name}", _words(1, blocks), total, read, check, max(0.0, total - read - check)
    )
