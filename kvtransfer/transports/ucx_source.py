"""The source's end of the UCX transport: sends ranges of one segment to whoever has its ticket."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtransfer.errors import TransportError
from kvtransfer.memory import Segment
from kvtransfer.transports import ucx_protocol as protocol
from kvtransfer.transports.ucx_worker import UcxRequest, UcxWorker

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 4096
STALL_SECONDS = 30.0
"""A sink that takes nothing for this long is gone."""
LINGER_SECONDS = 1.0
"""A refusal has so long to arrive."""


class UcxSource:
    """Serves a segment by a worker. `idle_seconds`: sinks that ask for nothing so long are gone."""

    def __init__(self, segment: Segment, worker: UcxWorker, idle_seconds: float) -> None:
        self._data = segment.data
        self._nonce = segment.nonce
        self._worker = worker
        self._idle_seconds = idle_seconds
        self._hello = np.zeros(protocol.HELLO_BYTES, np.uint8)
        self._greeting = asyncio.get_running_loop().create_task(self._greet())
        self._serving: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Ends every connection; the worker is to be closed after it. Idempotent."""
        tasks = [self._greeting, *self._serving]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _greet(self) -> None:
        while True:
            request = self._worker.receive_message(self._hello, protocol.HELLO_TAG)
            await self._worker.finished([request])
            try:
                request.check()
                hello = protocol.unpack_hello(self._hello.tobytes())
            except (protocol.ProtocolError, self._worker.error) as error:
                log.warning("a KV connection was refused: %s", error)
                continue
            if len(self._serving) < MAX_CONNECTIONS:
                task = asyncio.get_running_loop().create_task(self._serve(hello))
                self._serving.add(task)
                task.add_done_callback(self._serving.discard)

    async def _serve(self, hello: protocol.Hello) -> None:
        """One connection until it ends, in whatever way."""
        under_way: list[UcxRequest] = []
        # Before anything else, and without an answer: UCX ends a process that gives it an address
        # that is none, so only those are looked at who may have everything else.
        if not hmac.compare_digest(hello.nonce, self._nonce):
            log.warning("a KV sink was not answered: it has no ticket of this source")
            return
        try:
            endpoint = self._worker.endpoint(hello.address)
        except self._worker.error as error:
            log.warning("a KV sink can't be reached: %s", error)
            return
        try:
            await self._converse(endpoint, under_way)
        except protocol.ProtocolError as error:
            log.warning("a KV sink was refused: %s", error)
            with contextlib.suppress(TimeoutError, TransportError, self._worker.error):
                await self._refuse(endpoint, under_way, str(error))
        except (TimeoutError, TransportError, self._worker.error):
            pass  # The sink went away; whatever it still needs, it asks for anew.
        finally:
            self._worker.end(endpoint, under_way)

    async def _converse(self, endpoint: Any, under_way: list[UcxRequest]) -> None:
        """Answers requests. `under_way` has at any time what is."""
        welcome = _bytes(protocol.pack_reply(""))
        under_way[:] = [self._worker.send(endpoint, welcome)]
        raw = np.zeros(protocol.REQUEST_BYTES, np.uint8)
        while True:
            await self._sent(endpoint, under_way)
            under_way[:] = [self._worker.receive(endpoint, raw)]
            async with asyncio.timeout(self._idle_seconds):
                await self._worker.finished(under_way, endpoint)
            under_way[0].check()
            ranges = protocol.unpack_request(raw.tobytes(), self._data.nbytes)
            under_way[:] = [self._worker.send(endpoint, welcome)]
            for offset, length in ranges:
                data = self._data[offset : offset + length]
                under_way.append(self._worker.send(endpoint, data))

    async def _refuse(self, endpoint: Any, under_way: list[UcxRequest], why: str) -> None:
        under_way[:] = [self._worker.send(endpoint, _bytes(protocol.pack_reply(why)))]
        await self._sent(endpoint, under_way)
        # An endpoint that is closed drops what it has not sent; the sink goes when it has read it.
        under_way[:] = [self._worker.receive(endpoint, np.zeros(1, np.uint8))]
        async with asyncio.timeout(LINGER_SECONDS):
            await self._worker.finished(under_way, endpoint)

    async def _sent(self, endpoint: Any, under_way: list[UcxRequest]) -> None:
        async with asyncio.timeout(STALL_SECONDS):
            await self._worker.finished(under_way, endpoint)
        for request in under_way:
            request.check()


def _bytes(raw: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(bytearray(raw), np.uint8)
