"""The source's end of the UCX transport: sends ranges of one segment to whoever has its ticket."""

from __future__ import annotations

import asyncio
import hmac
import logging
from typing import Any

import numpy as np

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
            request = self._worker.receive(None, self._hello, protocol.HELLO_TAG)
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
        task = asyncio.current_task()
        assert task is not None
        under_way: list[UcxRequest] = []
        try:
            endpoint = self._worker.endpoint(hello.address)
        except self._worker.error as error:
            log.warning("a KV connection was refused: its sink can't be reached: %s", error)
            return
        try:
            endpoint.set_close_callback(task.cancel)
            if hmac.compare_digest(hello.nonce, self._nonce):
                await self._answer(endpoint, under_way, hello.connection, "")
                while await self._reply(endpoint, under_way, hello.connection):
                    pass
            else:
                await self._refuse(endpoint, under_way, hello.connection, "not its ticket")
        except (TimeoutError, TransportError, self._worker.error):
            pass  # The sink went away; whatever it still needs, it asks for anew.
        finally:
            endpoint.remove_close_callback()
            await self._worker.end(endpoint, under_way)

    async def _reply(self, endpoint: Any, under_way: list[UcxRequest], connection: int) -> bool:
        """Waits for a request and sends what it asks for; False if there is to be no other."""
        raw = np.zeros(protocol.REQUEST_BYTES, np.uint8)
        under_way[:] = [self._worker.receive(endpoint, raw, connection)]
        async with asyncio.timeout(self._idle_seconds):
            await self._worker.finished(under_way)
        under_way[0].check()
        try:
            asked = protocol.unpack_request(raw.tobytes(), self._data.nbytes)
        except protocol.ProtocolError as error:
            await self._refuse(endpoint, under_way, connection, str(error))
            return False
        under_way.clear()
        if not asked.ranges:
            return False
        for at, (offset, length) in enumerate(asked.ranges):
            data = self._data[offset : offset + length]
            under_way.append(self._worker.send(endpoint, data, asked.tag + at))
        await self._sent(under_way)
        return True

    async def _refuse(
        self, endpoint: Any, under_way: list[UcxRequest], connection: int, why: str
    ) -> None:
        log.warning("a KV sink was refused: %s", why)
        await self._answer(endpoint, under_way, connection, why)
        # An endpoint that is closed drops what it has not sent; the sink goes when it has read it.
        under_way[:] = [self._worker.receive(endpoint, np.zeros(1, np.uint8), connection)]
        async with asyncio.timeout(LINGER_SECONDS):
            await self._worker.finished(under_way)

    async def _answer(
        self, endpoint: Any, under_way: list[UcxRequest], connection: int, words: str
    ) -> None:
        data = np.frombuffer(bytearray(protocol.pack_reply(words)), np.uint8)
        under_way[:] = [self._worker.send(endpoint, data, connection)]
        await self._sent(under_way)

    async def _sent(self, under_way: list[UcxRequest]) -> None:
        async with asyncio.timeout(STALL_SECONDS):
            await self._worker.finished(under_way)
        for request in under_way:
            request.check()
