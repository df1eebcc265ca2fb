"""Reads by each transport beside the plainest way to move the same bytes.

Both sides' memory is touched before; each round moves other parts of it, so that bytes come from
memory and not from a cache, as KV does.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import numpy as np

from kvtransfer.bench.figures import Row, row, size_words
from kvtransfer.bench.peer import Peer
from kvtransfer.bench.raw_nixl import RawNixl
from kvtransfer.bench.raw_tcp import RawTcp
from kvtransfer.bench.raw_tcp import serve as serve_raw_tcp
from kvtransfer.bench.raw_ucx import RawUcx
from kvtransfer.bench.raw_ucx import serve as serve_raw_ucx
from kvtransfer.bench.rounds import rounds_for, take_turns
from kvtransfer.bench.serving import serve_transport, started
from kvtransfer.memory import NONCE_BYTES, Segment
from kvtransfer.transports import shm, tcp
from kvtransfer.transports.base import Offer, Read

TIMEOUT = 60.0
BLOCK = 64 * 2**10
"""Of scattered reads: a few layers of a block of KV."""

Raw = Callable[[Sequence[Read]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Shape:
    """A read of `nbytes` in `blocks` parts; one part is contiguous, more are scattered."""

    nbytes: int
    blocks: int = 1

    @property
    def words(self) -> str:
        """For the table."""
        if self.blocks == 1:
            return size_words(self.nbytes)
        return f"{size_words(self.nbytes)} in blocks of {size_words(self.nbytes // self.blocks)}"

    def reads(self, number: int, span: int) -> list[Read]:
        """Of run `number`, in memories of `span` bytes: places that the last runs did not use."""
        places = span // self.nbytes
        remote, local = (self.nbytes * (n % places) for n in (number, number + 1))
        if self.blocks == 1:
            return [Read(remote, local, self.nbytes)]
        part = self.nbytes // self.blocks
        order = list(range(self.blocks))
        random.Random(number).shuffle(order)
        return [Read(remote + at * part, local + i * part, part) for i, at in enumerate(order)]


@dataclass(frozen=True, slots=True)
class _Subject:
    against: str
    target: float
    target_from: int
    """Bytes of a read from which on it holds."""


SUBJECTS = {
    "shm": _Subject("memcpy (numpy)", 0.9, 2**20),
    "tcp": _Subject("socket loop, as many streams", 0.9, 2**20),
    "nixl": _Subject("NIXL's API, busy polling", 0.95, 2**20),
    "ucx": _Subject("ucxx's calls", 0.9, 2**20),
}


def shapes(most: int) -> Iterator[Shape]:
    """From 64 KiB to `most` bytes contiguous; the largest once more, scattered."""
    size = 64 * 2**10
    while size < most:
        yield Shape(size)
        size *= 4
    yield Shape(most)
    yield Shape(most, most // BLOCK)


async def measure(name: str, most: int, rounds: int, say: Callable[[str], None]) -> list[Row]:
    """Rows of one transport. Raises AbsentError, PeerError, TransportError."""
    span = 4 * most
    subject = SUBJECTS[name]
    rows = []
    async with AsyncExitStack() as stack:
        segment = Segment(span, secrets.token_bytes(NONCE_BYTES))
        segment.data[:] = 1
        transport = await started(name, segment, stack)
        peer = stack.enter_context(Peer(span))
        ticket: Offer = peer.start(serve_transport, name)
        raw = _raw(name, segment, ticket, peer, stack)
        reader = await transport.connect(ticket, "127.0.0.1:0", TIMEOUT)
        stack.push_async_callback(reader.close)
        for number in range(span // most):  # Touches every page once, through both.
            await reader.read(Shape(most).reads(number, span), TIMEOUT)
            await raw(Shape(most).reads(number, span))
        for shape in shapes(most):
            say(f"{name}: {shape.words}")

            async def ours(number: int, shape: Shape = shape) -> None:
                await reader.read(shape.reads(number, span), TIMEOUT)

            async def baseline(number: int, shape: Shape = shape) -> None:
                await raw(shape.reads(number, span))

            times = await take_turns(
                {"raw": baseline, "ours": ours},
                rounds_for(shape.nbytes, rounds, 16 * most),
                peer.pid,
            )
            rows.append(
                row(
                    name,
                    shape.words,
                    shape.nbytes,
                    shape.blocks,
                    times["ours"],
                    against=subject.against,
                    baseline=times["raw"],
                    target=subject.target if shape.nbytes >= subject.target_from else None,
                )
            )
    return rows


def _raw(name: str, segment: Segment, ticket: Offer, peer: Peer, stack: AsyncExitStack) -> Raw:
    """The baseline of a transport."""
    if name == "shm":
        return _memcpy(segment, ticket)
    if name == "tcp":
        loop = RawTcp(peer.start(serve_raw_tcp), tcp.STREAMS, segment)
        stack.callback(loop.close)
        return _over_streams(loop)
    if name == "nixl":
        agent = RawNixl(segment, ticket)
        stack.callback(agent.close)
        return agent.read
    worker = RawUcx(segment, peer.start(serve_raw_ucx))
    stack.callback(worker.close)
    return worker.read


def _memcpy(segment: Segment, ticket: Offer) -> Raw:
    remote, local = shm.mapped(ticket), segment.data

    async def copy(reads: Sequence[Read]) -> None:
        for read in reads:
            np.copyto(
                local[read.local : read.local + read.length],
                remote[read.remote : read.remote + read.length],
            )

    return copy


def _over_streams(loop: RawTcp) -> Raw:
    async def read(reads: Sequence[Read]) -> None:
        """Contiguous even where ours is scattered: no loop is plainer."""
        size = sum(r.length for r in reads)
        streams = max(1, min(tcp.STREAMS, size // tcp.STREAM_BYTES))
        remote, local = (min(r.remote for r in reads), min(r.local for r in reads))
        part = size // streams
        loop.read([Read(remote + i * part, local + i * part, part) for i in range(streams)])

    return read
