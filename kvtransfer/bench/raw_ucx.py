"""What UCX can do here: a message for each range, straight from ucxx's calls.

One sink and one source. Both sleep when there is nothing to move: on few cores that is faster than
polling.
"""

from __future__ import annotations

import asyncio
import select
import threading
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtransfer.memory import Segment
from kvtransfer.transports.base import Read
from kvtransfer.transports.ucx_settings import loopback_only
from kvtransfer.transports.ucx_worker import load

HELLO_BYTES = 4096
MOST = 2**14
"""Ranges of a read."""
LOOK_SECONDS = 0.1
_HELLO, _ASK, _DATA = 1, 2, 1000


class _End:
    """A context and worker, and the endpoint to the other one."""

    def __init__(self) -> None:
        library = load()
        self._ucx, self._array = library.ucx, library.array
        self._worker = self._ucx.UCXWorker(self._ucx.UCXContext(loopback_only("127.0.0.1")))
        self._worker.init_blocking_progress_mode()
        self._endpoint: Any = None

    @property
    def address(self) -> bytes:
        return bytes(self._worker.address.tobytes())

    def meet(self, address: bytes) -> None:
        where = self._ucx.UCXAddress.create_from_buffer(address)
        self._endpoint = self._ucx.UCXEndpoint.create_from_worker_address(self._worker, where, True)

    def send(self, data: NDArray[Any], tag: int) -> Any:
        return self._endpoint.tag_send(self._array(data), self._ucx.UCXXTag(tag))

    def receive(self, data: NDArray[Any], tag: int) -> Any:
        from_ = self._worker if self._endpoint is None else self._endpoint
        return from_.tag_recv(self._array(data), self._ucx.UCXXTag(tag))

    def finish(self, requests: Sequence[Any], gone: Callable[[], bool] = lambda: False) -> bool:
        """Moves everything on until all are over, asleep while nothing comes. False if `gone`."""
        left = list(requests)
        while left:
            if self._worker.progress_once():
                continue
            while left and left[-1].completed:
                left.pop().check_error()
            if left and self._worker.arm():
                select.select([self._worker.epoll_file_descriptor], [], [], LOOK_SECONDS)
                if gone():
                    return False
        return True


async def serve(segment: Segment, argument: object, stack: AsyncExitStack) -> bytes:
    """The source; returns its worker's address."""
    end, gone = await asyncio.to_thread(_End), threading.Event()
    thread = threading.Thread(target=_answer, args=(end, segment.data, gone.is_set))
    thread.start()
    stack.callback(thread.join)
    stack.callback(gone.set)
    return end.address


def _answer(end: _End, data: NDArray[np.uint8], gone: Callable[[], bool]) -> None:
    hello, asked = np.zeros(HELLO_BYTES, np.uint8), np.zeros(1 + 2 * MOST, np.uint64)
    if not end.finish([end.receive(hello, _HELLO)], gone):
        return
    size = int(hello[:2].view(np.uint16)[0])
    end.meet(hello[2 : 2 + size].tobytes())
    while end.finish([end.receive(asked, _ASK)], gone):
        ranges = asked[1 : 1 + 2 * int(asked[0])].reshape(-1, 2).tolist()
        sends = [end.send(data[at : at + n], _DATA + i) for i, (at, n) in enumerate(ranges)]
        end.finish(sends)


class RawUcx:
    """The sink."""

    def __init__(self, segment: Segment, address: bytes) -> None:
        self._data = segment.data
        self._end = _End()
        hello = np.zeros(HELLO_BYTES, np.uint8)
        mine = np.frombuffer(self._end.address, np.uint8)
        hello[:2] = np.array([len(mine)], np.uint16).view(np.uint8)
        hello[2 : 2 + len(mine)] = mine
        self._end.meet(address)
        self._end.finish([self._end.send(hello, _HELLO)])
        self._asked = np.zeros(1 + 2 * MOST, np.uint64)

    async def read(self, reads: Sequence[Read]) -> None:
        """Receives posted first, then one request for all of them."""
        under_way = [
            self._end.receive(self._data[r.local : r.local + r.length], _DATA + i)
            for i, r in enumerate(reads)
        ]
        self._asked[0] = len(reads)
        self._asked[1 : 1 + 2 * len(reads)] = [n for r in reads for n in (r.remote, r.length)]
        self._end.finish([self._end.send(self._asked, _ASK), *under_way])

    def close(self) -> None:
        """The source notices by being told."""
