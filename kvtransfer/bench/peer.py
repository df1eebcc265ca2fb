"""The other process: a source of each transport, and of the loops it is compared with.

It does what it is told over a pipe. `Peer` is this process's end of it.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import secrets
from collections.abc import Callable
from contextlib import AsyncExitStack
from multiprocessing.connection import Connection
from typing import Any, Self

import uvloop

from kvtransfer.memory import NONCE_BYTES, Segment

Serve = Callable[[Segment, Any, AsyncExitStack], Any]
"""Starts something over the segment: an async function of (segment, argument, what is to be left at
the end) whose result, which must be picklable, goes back. At the top level of a module."""


class Peer:
    """A context manager. `start(serve, argument)` runs a Serve over there."""

    def __init__(self, nbytes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_main, args=(there, nbytes), daemon=True)
        self._process.start()
        there.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pipe.close()
        self._process.join()

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process.pid is not None
        return self._process.pid

    def start(self, serve: Serve, argument: Any = None) -> Any:
        """Raises PeerError with the words of whatever went wrong over there."""
        self._pipe.send((serve, argument))
        try:
            fine, result = self._pipe.recv()
        except EOFError:
            raise PeerError("the source process ended") from None
        if not fine:
            raise PeerError(result)
        return result


class PeerError(Exception):
    """The other process could not do what it was told."""


def _main(pipe: Connection, nbytes: int) -> None:
    uvloop.run(_obey(pipe, nbytes))


async def _obey(pipe: Connection, nbytes: int) -> None:
    segment = Segment(nbytes, secrets.token_bytes(NONCE_BYTES))
    segment.data[:] = 7
    async with AsyncExitStack() as stack:
        while True:
            try:
                serve, argument = await asyncio.to_thread(pipe.recv)
            except EOFError:
                return
            try:
                answer = True, await serve(segment, argument, stack)
            except Exception as error:
                answer = False, f"{type(error).__name__}: {error}"
            pipe.send(answer)
