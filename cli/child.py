"""One `tandem serve` process as its parent sees it: start, ready, end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

TAIL_LINES = 30


class ChildFailedError(Exception):
    """A process ended before it was ready. The words include the end of its log."""


class Child:
    """A running process. Created by start(); a restarted process is another Child."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.log = log
        self.address = ""
        self._process = process

    @classmethod
    async def start(
        cls,
        name: str,
        arguments: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str] | None,
        timeout: float,
    ) -> Child:
        """Starts `tandem serve` with these arguments and waits until it is ready.

        Its output is appended to `log`. It is a session of its own, so that Ctrl-C in a terminal
        reaches only the parent, and it dies with the parent (and with the thread that calls this).
        Raises ChildFailedError; then, and when cancelled, no process is left.
        """
        read_fd, write_fd = os.pipe()
        with open(read_fd, "rb", buffering=0) as ready:  # noqa: ASYNC230 - a pipe
            try:
                child = cls(name, await _spawn(arguments, log, environment, write_fd), log)
            except OSError as error:
                raise ChildFailedError(f"{name} can't be started: {error}") from None
            finally:
                os.close(write_fd)
            try:
                child.address = await child._ready(ready, timeout)
            except BaseException:
                await child.end(0)
                raise
        return child

    async def _ready(self, pipe: object, timeout: float) -> str:
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), pipe
        )
        try:
            async with asyncio.timeout(timeout):
                line = await reader.readline()
        except TimeoutError:
            raise ChildFailedError(
                f"{self.name} was not ready in {timeout:g} s\n{self.tail()}"
            ) from None
        finally:
            transport.close()
        if not line:
            await self._process.wait()
            raise ChildFailedError(f"{self.name} {self.how_it_ended()}\n{self.tail()}")
        address: str = json.loads(line)["address"]
        return address

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs, minus the signal's number if one ended it."""
        return self._process.returncode

    def how_it_ended(self) -> str:
        """In words."""
        code = self._process.returncode
        if code is None:
            return "runs"
        return f"was ended by {self.cause()}" if code < 0 else f"ended with {self.cause()}"

    def cause(self) -> str:
        """The signal that ended it, or its exit status."""
        code = self._process.returncode or 0
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"

    def tail(self) -> str:
        """The end of its log."""
        lines = self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return "\n".join(f"  {self.name} | {line}" for line in lines)

    def kill(self, number: int) -> None:
        """Sends a signal; a process that has ended is left alone."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def wait(self) -> int:
        """Until it ends."""
        return await self._process.wait()

    async def end(self, grace_seconds: float) -> int:
        """SIGTERM, and SIGKILL if it has not ended in `grace_seconds`. Returns the exit status.

        When cancelled it kills at once, and still waits for the process to be gone.
        """
        try:
            if grace_seconds > 0:
                # A stopped process could not take the other one. Nothing is sent after that: it
                # looks whether the process is there, and takes its status if it has just ended.
                self.kill(signal.SIGCONT)
                self.kill(signal.SIGTERM)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(grace_seconds):
                        return await self._process.wait()
        finally:
            if self._process.returncode is None:
                self.kill(signal.SIGKILL)
                await self._process.wait()
        return await self._process.wait()


async def _spawn(
    arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None, ready_fd: int
) -> asyncio.subprocess.Process:
    inherited = ["--ready-fd", str(ready_fd), "--parent-pid", str(os.getpid())]
    with log.open("ab") as output:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # what stands in the current folder is not ours to import
            "-m",
            "cli.main",
            "serve",
            *arguments,
            *inherited,
            # Held open by us: where there is no PDEATHSIG, its end tells the child of ours.
            stdin=asyncio.subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=environment,
            pass_fds=(ready_fd,),
            start_new_session=True,
        )
