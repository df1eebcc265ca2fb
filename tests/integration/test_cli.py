"""`tandem` as a person runs it: real processes, real signals, free ports, the scripted engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import psutil
import pytest

from cli import silence
from cli.child import Child, ChildFailedError
from cli.cluster import ClusterError, Event, LocalCluster
from cli.demo import PROMPT, Show, Told, _failure
from services.runtime.client import Ask, Client, Turn

SCRIPTED = {"engine.kind": "scripted", "engine.block_tokens": "4"}
SLOW = SCRIPTED | {"engine.scripted_step_seconds": "0.05"}
COMMAND = [sys.executable, "-m", "cli.main"]
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("TANDEM_")}


def flags(settings: dict[str, str]) -> list[str]:
    return [text for key, value in settings.items() for text in ("--set", f"{key}={value}")]


def up(*more: str, settings: dict[str, str] = SCRIPTED) -> list[str]:
    ports = ("--port", "0", "--coordinator-port", "0", "--no-gateway")
    return [*COMMAND, "up", *ports, *flags(settings), *more]


class Running:
    """A command that runs, and what it has said so far."""

    def __init__(self, command: list[str]) -> None:
        self.process = psutil.Popen(
            command,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
        )
        self.said = ""

    def until(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        """Reads on until the pattern has been said."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.said)):
            left = deadline - time.monotonic()
            assert left > 0, f"not said in {seconds} s: {pattern}\n{self.said}"
            ready, _, _ = select.select([self.process.stdout], [], [], left)
            if ready:
                data = os.read(self.process.stdout.fileno(), 65536)
                assert data, f"ended without saying {pattern}\n{self.said}"
                self.said += data.decode(errors="replace")
        return match

    def rest(self, seconds: float = 60) -> int:
        """Waits for the end, and returns the exit status."""
        self.said += self.process.communicate(timeout=seconds)[0].decode(errors="replace")
        return self.process.returncode

    def children(self) -> list[psutil.Process]:
        return self.process.children(recursive=True)


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[Running]:
    """Ends it at the end, and proves that nothing it started is left."""
    run = Running(command)
    seen: set[psutil.Process] = set()
    try:
        yield run
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            seen.update(run.children())
            run.process.kill()
        run.process.wait(30)
        all_gone(seen)


def all_gone(processes, seconds: float = 30) -> None:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    for process in alive:
        process.kill()
    assert not alive


def roles(processes: list[psutil.Process]) -> list[str]:
    lines = [process.cmdline() for process in processes]
    return sorted(line[line.index("serve") + 1] for line in lines)


# --- one process -------------------------------------------------------------------------------


async def start(tmp_path, *arguments: str) -> Child:
    return await Child.start(
        "it", arguments, log=tmp_path / "it.log", environment=ENVIRONMENT, timeout=30
    )


async def test_a_child_starts_says_where_and_ends(tmp_path):
    child = await start(tmp_path, "coordinator", "--port", "0")
    assert re.fullmatch(r"127\.0\.0\.1:\d+", child.address)
    assert "ready at" in child.log.read_text()
    assert await child.end(10) == 0


async def test_a_child_that_can_not_start_shows_its_log(tmp_path):
    with pytest.raises(ChildFailedError) as caught:
        await start(tmp_path, "coordinator", "--host", "192.0.2.1")
    assert "it ended with exit status 1" in str(caught.value)
    assert "server.allow_unauthenticated_remote" in str(caught.value)


async def test_a_child_that_is_stopped_is_ended_too(tmp_path):
    child = await start(tmp_path, "coordinator", "--port", "0")
    child.kill(signal.SIGSTOP)
    assert await child.end(10) == 0


async def test_a_cancelled_start_leaves_no_process(tmp_path):
    starting = asyncio.create_task(start(tmp_path, "coordinator", "--port", "0"))
    me = psutil.Process()
    while not (mine := me.children()):  # noqa: ASYNC110 - what is awaited is the system's
        await asyncio.sleep(0.01)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    all_gone(mine)


# --- LocalCluster ------------------------------------------------------------------------------


async def test_a_cluster_starts_answers_and_leaves_nothing():
    events: list[Event] = []
    async with LocalCluster(prefill=1, decode=2, settings=SCRIPTED, on_event=events.append) as it:
        assert it.names == ["coordinator", "frontend", "prefill-0", "decode-0", "decode-1"]
        processes = [psutil.Process(pid) for pid in it.pids.values()]
        assert len(processes) == 5
        async with Client(it.address("frontend"), it.address("coordinator")) as client:
            status = await client.status()
            names = sorted(w.worker_id.rpartition("-")[0] for w in status.workers)
            assert names == ["decode-0", "decode-1", "prefill-0"]
            ask = Ask([Turn("user", "hi")], sampling={"max_tokens": 5, "ignore_eos": True})
            pieces = [piece async for piece in client.stream(ask)]
            assert sum(len(piece.token_ids) for piece in pieces) == 5
            assert pieces[-1].end.completion_tokens == 5
    all_gone(processes, seconds=0)
    assert next(e.process for e in events if e.phase == "ready") == "coordinator"
    assert sum(e.phase == "ended" for e in events) == 5


async def test_a_cluster_that_can_not_start_says_why_and_leaves_nothing():
    me = psutil.Process()
    before = set(me.children())
    with pytest.raises(ClusterError, match=r"no-such-folder"):
        await LocalCluster(settings=SCRIPTED | {"model.path": "/no-such-folder"}).start()
    assert set(me.children()) == before


async def test_dead_processes_come_back_under_their_names_and_where_they_were():
    ready: asyncio.Queue[str] = asyncio.Queue()

    def on_event(event: Event) -> None:
        if event.phase == "ready":
            ready.put_nowait(event.process)

    async def workers(it: LocalCluster) -> int:
        async with Client(it.address("frontend"), it.address("coordinator")) as client:
            return len((await client.status()).workers)

    async with LocalCluster(settings=SCRIPTED, restart=True, on_event=on_event) as it:
        for _ in range(4):
            await ready.get()
        addresses = {name: it.address(name) for name in ("frontend", "coordinator")}
        for name in ("frontend", "decode-0"):
            pid = it.pids[name]
            it.kill(name, signal.SIGKILL)
            assert await asyncio.wait_for(ready.get(), 60) == name
            assert it.pids[name] != pid
        it.kill("coordinator", signal.SIGKILL)
        await it.restart("coordinator")
        assert addresses == {name: it.address(name) for name in addresses}
        async with asyncio.timeout(30):
            while await workers(it) < 2:  # noqa: ASYNC110 - they register when they choose
                await asyncio.sleep(0.05)


async def test_a_process_that_lives_and_is_silent_is_told_killed_and_started_again(monkeypatch):
    monkeypatch.setattr(silence, "ASKED_SECONDS", 0.1)
    monkeypatch.setattr(silence, "ANSWER_SECONDS", 0.9)
    events: asyncio.Queue[Event] = asyncio.Queue()
    # Long enough for whoever is only starved of CPU to answer once.
    options = {"settings": SCRIPTED, "restart": True, "kill_silent_seconds": 12.0}
    async with LocalCluster(**options, on_event=events.put_nowait) as cluster, asyncio.timeout(120):

        async def until(process: str, words: str) -> None:
            while True:
                event = await events.get()
                if event.process == process and words in f"{event.phase} {event.detail}":
                    return

        pid = cluster.pids["decode-0"]
        await until("decode-0", "ready")
        cluster.kill("decode-0", signal.SIGSTOP)
        await until("decode-0", f"pid {pid} lives, and is killed after 12 s")
        cluster.kill("decode-0", signal.SIGCONT)
        await until("decode-0", "it answers again")
        cluster.kill("decode-0", signal.SIGSTOP)
        await until("decode-0", f"pid {pid} is killed")
        await until("decode-0", "died of SIGKILL; starts again")
        await until("decode-0", "ready")


async def test_a_process_that_ends_badly_is_told():
    def on_event(event: Event) -> None:
        if (event.process, event.phase) == ("decode-0", "stopping"):
            it.kill("decode-0", signal.SIGKILL)

    it = LocalCluster(settings=SCRIPTED, on_event=on_event)
    await it.start()
    with pytest.raises(ClusterError, match=r"decode-0 was ended by SIGKILL"):
        await it.stop()
    assert it.pids == {}


# --- tandem up ---------------------------------------------------------------------------------


def test_up_runs_until_a_signal_and_ends_in_good_order(tmp_path):
    logs = tmp_path / "logs"
    with running(up("--prefill", "2", "--decode", "2", "--logs", str(logs))) as it:
        address, port = it.until(r"frontend ([\d.]+:(\d+))").groups()
        processes = it.children()
        workers = ["decode", "decode", "prefill", "prefill"]
        assert roles(processes) == sorted(["coordinator", "frontend", *workers])
        answer = subprocess.run(
            [*COMMAND, "generate", "hello", "-a", address, "-n", "4", "--json"],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert answer.returncode == 0, answer.stderr
        assert json.loads(answer.stdout)["completion_tokens"] == 4
        other = subprocess.run(
            up("--port", port), env=ENVIRONMENT, capture_output=True, text=True, timeout=60
        )
        assert other.returncode == 1
        assert f"port {port} is taken" in other.stderr
        it.process.send_signal(signal.SIGTERM)
        assert it.rest() == 0, it.said
        all_gone(processes, seconds=0)
        assert "draining" in it.said
    names = {path.name for path in logs.iterdir()}
    names -= {"coordinator.log", "frontend.log"}
    assert names == {"prefill-0.log", "prefill-1.log", "decode-0.log", "decode-1.log"}


def test_ctrl_c_lets_a_running_answer_finish():
    with running(up(settings=SLOW)) as it:
        address = it.until(r"frontend ([\d.]+:\d+)")[1]
        asking = Running([*COMMAND, "generate", "hello", "-a", address, "-n", "40", "--stats"])
        asking.until(r"\S")
        it.process.send_signal(signal.SIGINT)
        assert asking.rest() == 0, asking.said
        assert re.search(r"40 generated|\(stop\)", asking.said)
        assert it.rest() == 0, it.said


def test_a_second_ctrl_c_ends_all_at_once():
    with running(up(settings=SLOW)) as it:
        address = it.until(r"frontend ([\d.]+:\d+)")[1]
        processes = it.children()
        asking = Running([*COMMAND, "generate", "hello", "-a", address, "-n", "4000"])
        asking.until(r"\S")
        it.process.send_signal(signal.SIGINT)
        it.until("draining")
        start = time.monotonic()
        it.process.send_signal(signal.SIGINT)
        assert it.rest() == 128 + signal.SIGINT
        assert time.monotonic() - start < 30, "an answer of 200 s runs"
        all_gone(processes, seconds=0)
        assert asking.rest() != 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs PDEATHSIG")
@pytest.mark.parametrize("when", ["starting", "up"])
def test_kill_9_of_up_leaves_no_child(when):
    with running(up()) as it:
        it.until("frontend: starting" if when == "starting" else r"frontend [\d.]+:\d+")
        processes = it.children()
        assert processes
        it.process.kill()
        it.process.wait()
        all_gone(processes)


def test_ctrl_c_while_it_starts():
    with running(up()) as it:
        it.until("frontend: starting")
        processes = it.children()
        it.process.send_signal(signal.SIGINT)
        assert it.rest() == 130
        all_gone(processes, seconds=0)


def test_a_killed_worker_is_shown_and_started_again():
    with running(up()) as it:
        it.until(r"frontend [\d.]+:\d+")
        (decode,) = [p for p in it.children() if "decode" in p.cmdline()]
        decode.kill()
        it.until(r"decode-0: died of SIGKILL; starts again in 0.5 s")
        it.until(r"(?s)died.*decode-0: ready")
        it.process.send_signal(signal.SIGTERM)
        assert it.rest() == 0, it.said


def test_without_restart_up_ends_when_nothing_is_left():
    with running(up("--no-restart")) as it:
        it.until(r"frontend [\d.]+:\d+")
        for process in it.children():
            process.kill()
        assert it.rest() == 1
        assert "every process has ended" in it.said


# --- on a terminal -----------------------------------------------------------------------------


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, command: list[str]) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(command[0], command, ENVIRONMENT | {"TERM": "xterm", "COLUMNS": "120"})
        self.said = ""

    def until(self, found: Callable[[str], object], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not found(self.said):
            left = deadline - time.monotonic()
            assert left > 0, self.said
            if select.select([self.fd], [], [], left)[0]:
                self.said += os.read(self.fd, 65536).decode(errors="replace")

    def type(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def end(self) -> int:
        with contextlib.suppress(OSError):  # how a pseudo-terminal says that it is over
            while data := os.read(self.fd, 65536):
                self.said += data.decode(errors="replace")
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_up_and_chat_on_terminals():
    """Ctrl-C as the terminal sends it: to the whole foreground group."""
    cluster = Terminal(up(settings=SLOW))
    try:
        cluster.until(lambda said: re.search(r"decode-0-\w+", said) and "KV used" in said)
        address = re.search(r"frontend ([\d.]+:\d+)", cluster.said)[1]
        processes = psutil.Process(cluster.pid).children(recursive=True)
        chat = Terminal([*COMMAND, "chat", "-a", address, "-n", "2000", "--stats"])
        chat.until(lambda said: said.count("> ") == 1)
        before = len(chat.said)
        chat.type("hello\n")
        chat.until(lambda said: len(said) > before + 30)
        chat.type("\x03")
        chat.until(lambda said: "(stopped)" in said and said.count("> ") == 2)
        chat.type("\x04")
        assert chat.end() == 0
        cluster.type("\x03")
        assert cluster.end() == 0, cluster.said
        all_gone(processes, seconds=0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(cluster.pid, signal.SIGKILL)


# --- tandem demo -------------------------------------------------------------------------------


def demo(*more: str) -> subprocess.CompletedProcess[str]:
    before = set(psutil.Process().children(recursive=True))
    ended = subprocess.run(
        [*COMMAND, "demo", "--engine", "scripted", *more],
        env=ENVIRONMENT | {"COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert set(psutil.Process().children(recursive=True)) == before
    return ended


def figures(said: str) -> dict[str, tuple[str, str]]:
    """The two columns of the demo's table, by heading."""
    rows = (re.split(r"\s{2,}", line.strip()) for line in said.splitlines())
    return {row[0]: (row[1], row[2]) for row in rows if len(row) == 3}


def test_the_demo_moves_kv_and_finds_it_cached():
    ended = demo("--prompt", "Count to a hundred, one by one.")
    assert ended.returncode == 0, ended.stderr
    assert "engine.block_tokens=16, coordinator.local_prefill_tokens=0" in ended.stdout
    table = figures(ended.stdout)
    assert table["of them cached"][0] == "0"
    assert int(table["of them cached"][1]) > 0
    assert table["transport"][0] == "shm"
    assert re.match(r"[\d.]+ KiB, blocks: \d+", table["KV moved"][0])
    assert table["prefill worker"][0].startswith("prefill-0-")
    assert table["decode worker"][0].startswith("decode-0-")
    for row in ("time to first token (TTFT)", "between tokens (ITL), p99", "transfer took"):
        assert re.match(r"[\d.]+ m?s", table[row][0])


def test_the_demo_fails_when_it_does_not_show_what_it_is_there_to_show():
    ended = demo("--set", "coordinator.local_prefill_tokens=100000")
    assert ended.returncode == 1
    assert "no KV moved from the prefill worker" in ended.stderr
    (logs,) = re.findall(r"logs: (\S+)", ended.stderr)
    assert "decode-0.log" in os.listdir(logs)
    shutil.rmtree(logs)


def test_the_demo_knows_the_answer_to_its_own_question():
    show = Show(PROMPT, 0, 1, {}, None, keep=False)
    assert "Tokyo" in _failure(show, Told(text="Paris."), Told())
    assert "Tokyo" not in _failure(show, Told(text="It is Tokyo."), Told())
    assert "Tokyo" in _failure(replace(show, model="tiny-deepseek"), Told(text="Paris."), Told())
    assert "Tokyo" not in _failure(replace(show, model="another"), Told(text="Paris."), Told())
    makes_up = replace(show, settings={"engine.kind": "scripted"})
    assert "Tokyo" not in _failure(makes_up, Told(text="Paris."), Told())


@pytest.mark.model
@pytest.mark.timeout(300)  # two processes load and compile, maybe on a busy machine
def test_the_demo_with_a_real_model():
    ended = subprocess.run(
        [*COMMAND, "demo"], env=ENVIRONMENT, capture_output=True, text=True, timeout=280
    )
    assert ended.returncode == 0, ended.stderr
    # Streamed, in one, and once more by HTTP where the gateway is built.
    assert ended.stdout.count("Tokyo") == 2 + ("The same by HTTP" in ended.stdout)
    assert int(figures(ended.stdout)["of them cached"][1]) >= 16
