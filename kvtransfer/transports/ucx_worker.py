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
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtransfer.errors import TransportError
from kvtransfer.offload import outlast

PACKAGES = ("ucxx-cu12", "ucxx-cu13")
TURN_SECONDS = 0.5e-3
HEARTBEAT_SECONDS = 0.5
"""It is moved on so often even if its descriptor is silent, as UCX loses an event at times."""
GRACE_SECONDS = 0.5


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
    endpoint: Any | None
    ended: asyncio.Future[None]


class UcxWorker:
    """One worker of a context, moved on by the event loop that it is made on.

    `context` is ucxx's UCXContext. Raises ucxx's UCXError.
    """

    def __init__(self, context: Any) -> None:
        library = load()
        self._ucx, self._array = library.ucx, library.array
        self.error: type[Exception] = self._ucx.UCXError
        """What calls and requests raise."""
        self._worker = self._ucx.UCXWorker(context)
        self._worker.init_blocking_progress_mode()
        self._waiting: list[_Waiting] = []
        self._lingering: list[UcxRequest] = []
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

    def send(self, endpoint: Any, data: NDArray[np.uint8]) -> UcxRequest:
        """Begins to, in the endpoint's stream. Raises `error`."""
        endpoint.raise_on_error()  # What is begun after the end never ends.
        request = endpoint.stream_send(self._array(data))
        self._soon()
        return UcxRequest(data, request)

    def receive(self, endpoint: Any, into: NDArray[np.uint8]) -> UcxRequest:
        """Begins to fill it from the endpoint's stream. Raises `error`."""
        endpoint.raise_on_error()
        request = endpoint.stream_recv(self._array(into))
        self._soon()
        return UcxRequest(into, request)

    def send_message(self, endpoint: Any, data: NDArray[np.uint8], tag: int) -> UcxRequest:
        """Begins to send a message that is no part of the stream. Raises `error`."""
        request = endpoint.tag_send(self._array(data), self._ucx.UCXXTag(tag))
        self._soon()
        return UcxRequest(data, request)

    def receive_message(self, into: NDArray[np.uint8], tag: int) -> UcxRequest:
        """Begins to wait for a message from anyone. Ends with the worker. Raises `error`."""
        request = self._worker.tag_recv(self._array(into), self._ucx.UCXXTag(tag))
        self._soon()
        return UcxRequest(into, request)

    async def finished(self, requests: Sequence[UcxRequest], endpoint: Any | None = None) -> None:
        """Waits until all are over.

        Raises TransportError if `endpoint` breaks before, or the worker is closed.
        """
        waiting = _Waiting(list(requests), endpoint, self._loop.create_future())
        self._waiting.append(waiting)
        self._soon()
        try:
            await waiting.ended
        finally:
            self._waiting.remove(waiting)

    def end(self, endpoint: Any, requests: Sequence[UcxRequest]) -> None:
        """Closes an endpoint at once. The peer's death, sleep or silence do not delay it.

        Its requests end, most of them before this returns; until then they are held on to, since
        UCX still knows their memory.
        """
        endpoint.remove_close_callback()
        endpoint.close_blocking()
        self._lingering += [request for request in requests if not request.over]
        self._soon()

    async def close_after(self, endpoint: Any, requests: Sequence[UcxRequest]) -> None:
        """Closes an endpoint and the worker; when this returns nothing is written to any more.

        Requests get GRACE_SECONDS to end by themselves, since ucxx never frees the worker of an
        endpoint that was closed under them. A cancellation waits for it.
        """
        if endpoint.alive and not all(request.over for request in requests):
            ending = self._loop.create_task(self.finished(requests, endpoint))
            last_resort = self._loop.call_later(GRACE_SECONDS, ending.cancel)
            await outlast(ending)
            last_resort.cancel()
        # What comes by a stream is put in place in _turn(), and after this there is none.
        self.end(endpoint, requests)
        self.close()

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
        if self._lingering:
            self._lingering = [request for request in self._lingering if not request.over]
        for waiting in self._waiting:
            requests = waiting.requests
            while requests and requests[-1].over:
                requests.pop()
            if waiting.ended.done():
                continue
            if not requests:
                waiting.ended.set_result(None)
            elif waiting.endpoint is not None and not waiting.endpoint.alive:
                waiting.ended.set_exception(TransportError("the connection broke"))
