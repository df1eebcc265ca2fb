"""A UCX worker on an event loop: moved on when its descriptor says so, and otherwise asleep.

ucxx's own asyncio layer is not used: it keeps one worker for the whole process, is set up by
environment variables, and wraps the event loop's close(). Its layer below is plain calls.

Everything here belongs to the event loop. What UCX copies it copies in _turn(), which lets the
loop do something else after TURN_SECONDS.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import importlib.metadata
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtransfer.errors import TransportError
from kvtransfer.offload import outlast

PACKAGES = ("ucxx-cu12", "ucxx-cu13")
log = logging.getLogger(__name__)

TURN_SECONDS = 0.5e-3
HEARTBEAT_SECONDS = 0.5
"""It is moved on so often even if its descriptor is silent, as UCX loses an event at times."""
END_SECONDS = 5.0
"""Nothing of a closed connection takes longer to end; if it does, the worker ends."""


@dataclass(frozen=True, slots=True)
class Library:
    """ucxx, or why there is none."""

    ucx: Any
    array: Any
    version: str
    why_not: str


@functools.cache
def load() -> Library:
    """Imports ucxx, which sets some UCX_* variables of this process's environment as it pleases."""
    try:
        ucx = importlib.import_module("ucxx").libucxx
        array = importlib.import_module("ucxx._lib.arr").Array
    except ModuleNotFoundError as error:
        if error.name != "ucxx":
            return Library(None, None, "", f"ucxx is installed and can't be loaded: {error}")
        why = 'UCX is not installed: pip install "tandem-serving[ucx]"'
        return Library(None, None, "", why)
    except ImportError as error:
        return Library(None, None, "", f"ucxx is installed and can't be loaded: {error}")
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return Library(ucx, array, importlib.metadata.version(package), "")
    return Library(ucx, array, "", "")


@dataclass(frozen=True, slots=True, eq=False)
class UcxRequest:
    """A message under way, and the memory that it comes from or goes to, which must stay."""

    data: NDArray[np.uint8]
    request: Any

    @property
    def over(self) -> bool:
        """Whether UCX is through with the memory."""
        return bool(self.request.completed)

    def check(self) -> None:
        """Once it is over: raises UcxWorker.error if it failed."""
        self.request.check_error()


@dataclass(slots=True, eq=False)
class _Waiting:
    requests: list[UcxRequest]
    unless: UcxRequest | None
    ended: asyncio.Future[None]


class UcxWorker:
    """One context and worker; `settings` are UCX's, without the prefix UCX_.

    Made on the event loop that it serves. Raises ucxx's UCXError.
    """

    def __init__(self, settings: Mapping[str, str]) -> None:
        library = load()
        self._ucx, self._array = library.ucx, library.array
        self.error: type[Exception] = self._ucx.UCXError
        """What calls and requests raise."""
        self._worker = self._ucx.UCXWorker(self._ucx.UCXContext(dict(settings)))
        self._worker.init_blocking_progress_mode()
        self._waiting: list[_Waiting] = []
        self._turn_due = False
        self._loop = asyncio.get_running_loop()
        self._descriptor = self._worker.epoll_file_descriptor
        self._loop.add_reader(self._descriptor, self._turn)
        self._heartbeat = self._loop.call_later(HEARTBEAT_SECONDS, self._beat)
        self.closed = False
        self._turn()

    @property
    def address(self) -> bytes:
        """Where others find it."""
        return bytes(self._worker.address.tobytes())

    def endpoint(self, address: bytes) -> Any:
        """A way to another worker; its death ends what is under way. Raises `error`."""
        where = self._ucx.UCXAddress.create_from_buffer(address)
        return self._ucx.UCXEndpoint.create_from_worker_address(self._worker, where, True)

    def send(self, endpoint: Any, data: NDArray[np.uint8], tag: int) -> UcxRequest:
        """Begins to. Raises `error`."""
        request = endpoint.tag_send(self._array(data), self._ucx.UCXXTag(tag))
        self._soon()
        return UcxRequest(data, request)

    def receive(self, endpoint: Any | None, into: NDArray[np.uint8], tag: int) -> UcxRequest:
        """Begins to. Raises `error`.

        It ends with the endpoint at the latest, or without one with the worker.
        """
        receiver = self._worker if endpoint is None else endpoint
        request = receiver.tag_recv(self._array(into), self._ucx.UCXXTag(tag))
        self._soon()
        return UcxRequest(into, request)

    async def finished(
        self, requests: Sequence[UcxRequest], unless: UcxRequest | None = None
    ) -> None:
        """Waits until all are over, or `unless` is. Raises TransportError if it is closed."""
        waiting = _Waiting(list(requests), unless, self._loop.create_future())
        self._waiting.append(waiting)
        self._soon()
        try:
            await waiting.ended
        finally:
            self._waiting.remove(waiting)

    async def end(self, endpoint: Any, requests: Sequence[UcxRequest]) -> None:
        """Closes an endpoint at once; returns when nothing moves any more for its requests.

        The peer's death, sleep or silence do not delay it. A cancellation waits for it.
        """
        endpoint.close_blocking()
        self._soon()
        if all(request.over for request in requests):
            return
        ending = self._loop.create_task(self.finished(requests))
        last_resort = self._loop.call_later(END_SECONDS, self._give_up)
        await outlast(ending)
        last_resort.cancel()

    def discard(self, tags: Sequence[int]) -> None:
        """Frees messages that came and that nobody will receive any more."""
        for tag in tags:
            found = self._worker.tag_probe(self._ucx.UCXXTag(tag), remove=True)
            if found.matched:
                into = np.empty(max(1, found.length), np.uint8)
                self._worker.tag_recv_with_handle(self._array(into), found)

    def close(self) -> None:
        """Ends everything. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._heartbeat.cancel()
        self._loop.remove_reader(self._descriptor)
        self._worker.cancel_inflight_requests()
        for waiting in self._waiting:
            if not waiting.ended.done():
                waiting.ended.set_exception(TransportError("UCX is closed"))
        self._worker.progress()
        del self._worker

    def _give_up(self) -> None:
        log.error("UCX did not end a closed connection: all of its connections end")
        self.close()

    def _soon(self) -> None:
        if not self._turn_due and not self.closed:
            self._turn_due = True
            self._loop.call_soon(self._turn)

    def _beat(self) -> None:
        self._heartbeat = self._loop.call_later(HEARTBEAT_SECONDS, self._beat)
        self._turn()

    def _turn(self) -> None:
        """Moves everything on, until there is nothing to do or it took long enough."""
        self._turn_due = False
        if self.closed:
            return
        until = time.monotonic() + TURN_SECONDS
        while True:
            if self._worker.progress_once():
                if time.monotonic() > until:
                    self._soon()
                    break
                continue
            # What is left is short. It cancels the requests of endpoints that broke, too.
            self._worker.progress()
            if self._worker.arm():
                break  # The descriptor tells from here on.
        self._settle()

    def _settle(self) -> None:
        for waiting in self._waiting:
            requests = waiting.requests
            while requests and requests[-1].over:
                requests.pop()
            ended = not requests or (waiting.unless is not None and waiting.unless.over)
            if ended and not waiting.ended.done():
                waiting.ended.set_result(None)
