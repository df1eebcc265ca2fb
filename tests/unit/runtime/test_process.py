"""Real processes and real signals: stop, cancel, ready, and dying with a parent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import textwrap

import psutil
import pytest

HEAD = """
    import asyncio, os, signal, sys
    from services.runtime import process
"""

LOOP = """
    async def main(stop):
        print("started", type(asyncio.get_running_loop()).__module__, flush=True)
        await stop.wait()
        print("stopping", flush=True)
        try:
            {after}
        except asyncio.CancelledError:
            print("cancelled", flush=True)
            {on_cancel}

    sys.exit(process.run(main))
"""


async def python(source: str, *arguments: str, **more) -> asyncio.subprocess.Process:
    code = textwrap.dedent(HEAD) + textwrap.dedent(source)
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, *arguments, stdout=asyncio.subprocess.PIPE, **more
    )


async def line(process: asyncio.subprocess.Process) -> str:
    async with asyncio.timeout(20):
        return (await process.stdout.readline()).decode().strip()


@contextlib.asynccontextmanager
async def waiting(after: str = "pass", on_cancel: str = "raise"):
    process = await python(LOOP.format(after=after, on_cancel=on_cancel))
    try:
        assert await line(process) == "started uvloop"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_the_first_signal_stops_in_good_order(number):
    async with waiting() as process:
        process.send_signal(number)
        assert await line(process) == "stopping"
        assert await process.wait() == 0


async def test_the_second_signal_cancels():
    async with waiting("await asyncio.sleep(60)") as process:
        process.send_signal(signal.SIGTERM)
        assert await line(process) == "stopping"
        process.send_signal(signal.SIGINT)
        assert await line(process) == "cancelled"
        assert await process.wait() == 128 + signal.SIGINT


async def test_the_third_signal_ends_what_can_not_be_cancelled():
    async with waiting("await asyncio.sleep(60)", "await asyncio.sleep(60)") as process:
        process.send_signal(signal.SIGTERM)
        assert await line(process) == "stopping"
        process.send_signal(signal.SIGTERM)
        assert await line(process) == "cancelled"
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 128 + signal.SIGTERM


async def test_an_exit_status_and_an_exception_pass_through():
    async def ends(body: str) -> tuple[int, bytes]:
        source = f"async def main(stop):\n    {body}\nsys.exit(process.run(main))\n"
        process = await python(source, stderr=asyncio.subprocess.PIPE)
        _, errors = await process.communicate()
        return process.returncode, errors

    assert await ends("return 7") == (7, b"")
    assert await ends("return None") == (0, b"")
    status, errors = await ends("raise ValueError('words')")
    assert status == 1
    assert b"ValueError: words" in errors


async def test_an_ignored_hangup_stays_ignored():
    ignoring = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    process = await python(ignoring + textwrap.dedent(LOOP.format(after="pass", on_cancel="raise")))
    assert await line(process) == "started uvloop"
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert await line(process) == "stopping"
    assert await process.wait() == 0


async def test_ready_is_one_line_of_json_and_then_the_end():
    read_fd, write_fd = os.pipe()
    source = "process.notify_ready(int(sys.argv[1]), '127.0.0.1:7')\nprint('done')\n"
    process = await python(source, str(write_fd), pass_fds=(write_fd,))
    os.close(write_fd)
    assert await line(process) == "done"
    with open(read_fd) as pipe:  # noqa: ASYNC230 - all of it is there
        text = pipe.read()
    assert text.count("\n") == 1
    assert json.loads(text) == {"address": "127.0.0.1:7"}
    await process.wait()


PARENT = """
    import subprocess
    code = '''
    import sys, time
    from services.runtime import process
    {arm}
    print("armed", flush=True)
    time.sleep(60)
    '''
    import textwrap
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(os.getpid())],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )
    assert child.stdout.readline() == b"armed\\n"
    print(child.pid, flush=True)
    {then}
"""

PDEATHSIG = "process.die_with_parent(int(sys.argv[1]))"
PIPE = (
    "import threading; threading.Thread(target=process._die_at_eof, args=(0,), daemon=True).start()"
)


@pytest.mark.parametrize(
    "arm",
    [
        pytest.param(
            PDEATHSIG, marks=pytest.mark.skipif(sys.platform != "linux", reason="PDEATHSIG")
        ),
        PIPE,
    ],
)
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
async def test_a_child_dies_with_its_parent_however_that_ends(arm, end):
    parent = await python(PARENT.format(arm=arm, then="import time; time.sleep(60)"))
    child = psutil.Process(int(await line(parent)))
    parent.send_signal(end)
    await parent.wait()
    await asyncio.to_thread(child.wait, 10)


async def test_a_child_whose_parent_has_gone_before_it_looked_ends_at_once():
    source = "process.die_with_parent(int(sys.argv[1]))\nprint('alive')\n"
    process = await python(source, "999999999")
    output, _ = await process.communicate()
    assert (process.returncode, output) == (1, b"")
