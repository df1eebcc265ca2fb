"""The frame of a process: event loop, signals, telling the parent it is ready, dying with it."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable

Stop = asyncio.Event
"""Set when the process should drain and end."""

Main = Callable[[Stop], Awaitable[int | None]]
"""What a process does; returns its exit status, None for 0."""

_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(main: Main) -> int:
    """Runs `main` on uvloop and returns the exit status it gave.

    The first SIGINT, SIGTERM or SIGHUP sets the event that `main` is given; the second cancels
    `main`, so that it ends at once but tidily; the third ends the process on the spot. A run that
    was cut short returns 128 + the signal's number.
    """
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_until_done(main))


async def _until_done(main: Main) -> int:
    loop = asyncio.get_running_loop()
    stop = Stop()
    task = asyncio.ensure_future(main(stop))
    received: list[int] = []

    def on_signal(number: int) -> None:
        received.append(number)
        if len(received) == 1:
            stop.set()
        elif len(received) == 2:
            task.cancel()
        else:
            os._exit(128 + number)

    # What nohup or a shell's background job made us ignore stays ignored.
    handled = [n for n in _SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
    for number in handled:
        loop.add_signal_handler(number, on_signal, number)
    try:
        return await task or 0
    except asyncio.CancelledError:
        if len(received) < 2:
            raise
        return 128 + received[-1]
    finally:
        for number in handled:
            loop.remove_signal_handler(number)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop

    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def notify_ready(fd: int, address: str) -> None:
    """Writes one line of JSON, {"address": "host:port"}, to a file descriptor and closes it."""
    with os.fdopen(fd, "w") as pipe:
        pipe.write(json.dumps({"address": address}) + "\n")


def die_with_parent(parent: int) -> None:
    """From here on this process is killed when its parent ends, however that ends.

    `parent` is the parent's pid as the parent knows it: if it is gone by now, this process ends
    at once. Elsewhere than on Linux the parent must hold the write end of our standard input,
    and keep it open; its closing is taken for the parent's end.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    else:
        threading.Thread(target=_die_at_eof, args=(0,), daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)


def _die_at_eof(fd: int) -> None:
    while os.read(fd, 4096):
        pass
    os._exit(1)
