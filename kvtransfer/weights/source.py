"""The source's end: WeightsService over a model's folder."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from kvtransfer.errors import (
    NoTransportError,
    WeightsDifferError,
    WeightsInvalidError,
    WeightsNotGivenError,
)
from kvtransfer.negotiate import choose
from kvtransfer.offload import Offload
from kvtransfer.policy import ExportPolicy
from kvtransfer.transports.base import Transport
from kvtransfer.transports.build import make_transports
from kvtransfer.weights import wire
from kvtransfer.weights.describing import Digests, describe, total_bytes
from kvtransfer.weights.giving import WINDOW, Giving, Slots
from kvtransfer.weights.manifest import PIECE_BYTES, Manifest
from kvtransfer.weights.pace import Pace
from tandem.weights.v1 import weights_pb2 as pb
from tandem.weights.v1 import weights_pb2_grpc

log = logging.getLogger(__name__)

TELL_SECONDS = 0.5
"""Between two words about how far reading a folder is."""

_Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class Given:
    """What is given: the folder of a model, under its name, and what is known of its files."""

    model: str
    folder: Path
    digests: Digests


class WeightsSource(weights_pb2_grpc.WeightsServiceServicer):
    """Raises KvErrors, which the server it is added to maps to statuses. On one event loop.

    `transports` names those to offer, best first; `policy` says to which regions weights may go.
    `rate` says how many bytes a second may be given now, to all together; 0: no limit. Nothing is
    read, listened on or allocated before somebody asks.
    """

    def __init__(
        self,
        given: Given,
        *,
        transports: Sequence[str] = ("shm", "tcp"),
        tcp_host: str = "127.0.0.1",
        tcp_port: int = 0,
        host_id: str | None = None,
        policy: ExportPolicy | None = None,
        rate: Callable[[], float] = lambda: 0.0,
        piece_bytes: int = PIECE_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.given_bytes = 0
        """Since the start."""
        self._given = given
        self._policy = policy or ExportPolicy()
        self._rate = rate
        self._piece_bytes = piece_bytes
        self._clock = clock
        self._pace = Pace()
        self._offload = Offload()
        self._make = partial(
            make_transports,
            transports,
            offload=self._offload,
            host=tcp_host,
            port=tcp_port,
            host_id=host_id,
        )
        self._starting = asyncio.Lock()
        self._started: _Started | None = None
        self._reading: asyncio.Task[Manifest] | None = None
        self._read = _Count()

    async def close(self) -> None:
        """Ends what calls have begun. Idempotent. Calls must have ended before."""
        if self._reading is not None:
            self._read.stop = True
            await asyncio.gather(self._reading, return_exceptions=True)
        if self._started is not None:
            for transport in self._started.transports.values():
                await transport.close()
            self._started.slots.segment.close()
        self._offload.close()

    async def Describe(  # noqa: N802
        self, request: pb.DescribeRequest, context: _Context
    ) -> AsyncIterator[pb.DescribeResponse]:
        """See weights.proto. Raises WeightsNotGivenError, RegionDeniedError."""
        self._admit(request.model, request.region)
        reading = self._manifest()
        while not reading.done():
            done, total = self._read.done, self._read.total
            yield pb.DescribeResponse(reading=pb.Reading(done=min(done, total), total=total))
            await asyncio.wait([reading], timeout=TELL_SECONDS)
        for message in wire.described(reading.result()):
            yield message

    async def Give(  # noqa: N802
        self, requests: AsyncIterator[pb.GiveRequest], context: _Context
    ) -> AsyncIterator[pb.GiveResponse]:
        """See weights.proto.

        Raises WeightsNotGivenError, WeightsDifferError, WeightsInvalidError, RegionDeniedError,
        NoTransportError.
        """
        opening = await _first(requests)
        self._admit(opening.model, opening.region)
        manifest = await asyncio.shield(self._manifest())
        if manifest.digest != opening.digest:
            raise WeightsDifferError(
                f"this worker has other files of {self._given.model}: its folder's digest is "
                f"{manifest.digest.hex()}, {opening.digest.hex()} is asked for",
                model=self._given.model,
            )
        started = await self._start()
        agreed = _agree(started, opening)
        giving = Giving(self._given.folder, manifest, started.slots, self._offload)
        listening = asyncio.create_task(giving.listen(requests))
        began = self._clock()
        log.info("%s fetches weights over %s: %s", context.peer(), agreed.ticket.name, agreed.why)
        try:
            yield wire.agreed_to(agreed)
            while (number := await giving.next()) is not None:
                await self._wait(manifest.piece(number).length)
                offset = await giving.lay_out(number)
                self.given_bytes += manifest.piece(number).length
                yield pb.GiveResponse(laid_out=pb.LaidOut(number=number, offset=offset))
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
            giving.close()
            log.info(
                "gave %s %.1f MB of weights in %.1f s",
                context.peer(),
                giving.bytes / 1e6,
                self._clock() - began,
            )

    def _admit(self, model: str, region: str) -> None:
        if len(region) > wire.NAME_BYTES:
            raise WeightsInvalidError(f"region: longer than {wire.NAME_BYTES} is not allowed")
        self._policy.check("", region)
        if model != self._given.model:
            raise WeightsNotGivenError(
                f"this worker serves {self._given.model}, not {model[:200]!r}",
                model=self._given.model,
            )

    async def _wait(self, nbytes: int) -> None:
        seconds = self._pace.wait(nbytes, self._rate(), self._clock())
        if seconds:
            await asyncio.sleep(seconds)

    def _manifest(self) -> asyncio.Task[Manifest]:
        """The folder as it is: what was read of its files before is not read again."""
        if self._reading is None or self._reading.done():
            self._read = _Count()
            self._reading = asyncio.create_task(asyncio.to_thread(self._describe))
            # Whoever asked may be gone before it fails.
            self._reading.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._reading

    def _describe(self) -> Manifest:
        given = self._given
        try:
            self._read.total = total_bytes(given.folder)
            return describe(
                given.folder, given.digests, self._read.add, piece_bytes=self._piece_bytes
            )
        except OSError as error:
            raise WeightsNotGivenError(f"{given.folder} can't be read: {error}") from error

    async def _start(self) -> _Started:
        async with self._starting:
            if self._started is None:
                slots = Slots(self._piece_bytes)
                asked = self._make(slots.segment)
                not_offered = {t.name: t.why_not() for t in asked if t.why_not()}
                usable = {t.name: t for t in asked if not t.why_not()}
                if not usable:
                    said = "; ".join(f"{name}: {why}" for name, why in not_offered.items())
                    raise NoTransportError(f"no transport can be offered: {said}")
                for transport in usable.values():
                    await transport.start()
                self._started = _Started(slots, usable, not_offered)
        return self._started


def _agree(started: _Started, opening: wire.Opening) -> wire.Agreed:
    choice = choose(
        [t.source_offer() for t in started.transports.values()],
        opening.offers,
        started.transports,
        started.not_offered,
    )
    return wire.Agreed(started.transports[choice.name].ticket(), choice.why, WINDOW)


@dataclass(frozen=True, slots=True)
class _Started:
    """What there is from the first call on."""

    slots: Slots
    transports: Mapping[str, Transport]
    not_offered: Mapping[str, str]


class _Count:
    """Bytes read; several threads add. With `stop` they end."""

    def __init__(self, total: int = 0) -> None:
        self.stop = False
        self.done = 0
        self.total = total
        self._lock = threading.Lock()

    def add(self, more: int) -> None:
        with self._lock:
            self.done += more
        if self.stop:
            raise WeightsNotGivenError("this worker is shutting down")


async def _first(requests: AsyncIterator[pb.GiveRequest]) -> wire.Opening:
    with suppress(StopAsyncIteration):
        return wire.opening_from(await anext(requests))
    raise WeightsInvalidError("a call for weights ends before it is opened")
