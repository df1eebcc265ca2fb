"""A whole cluster of real processes on this machine, for `tandem up`, the demo and the tests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import BaseModel

from cli.child import Child, ChildFailedError
from cli.etcd import EtcdChild
from cli.gateway import GatewayChild
from cli.output import CommandError
from cli.silence import silences
from services.runtime.load import Given, load
from services.runtime.settings import CoordinatorProcess, FrontendProcess, WorkerProcess

READY_SECONDS = 180.0
"""Loading a model may take a while, on a slow disk or a busy machine."""

KILL_AFTER_DRAIN_SECONDS = 10.0
FIRST_BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 15.0
STEADY_SECONDS = 30.0
"""A process that ran this long starts over with the first backoff when it dies."""
KILL_SILENT_SECONDS = 60.0
"""A process that lives and answers nothing for this long is killed, and starts again as one that
died. What it had is not lost before: frontends place it elsewhere after some seconds."""


class ClusterError(CommandError):
    """The cluster did not start, or did not end in good order."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened to a process: starting, ready, silent, died, stopping, ended."""

    process: str
    phase: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class _Member:
    """What it takes to start one process of the cluster."""

    name: str
    role: str
    port: int = 0


def _members(role: str, count: int, port: int) -> list[_Member]:
    """Of one role; numbered if there are several, with ports in a row unless they are free ones."""
    if count == 1:
        return [_Member(role, role, port)]
    return [_Member(f"{role}-{i}", role, port and port + i) for i in range(count)]


_WORKERS = ("prefill", "decode", "both")
_STARTS = (("etcd",), ("coordinator",), ("frontend", *_WORKERS), ("gateway",))
_PROCESSES: dict[str, type[BaseModel]] = {
    "coordinator": CoordinatorProcess,
    "frontend": FrontendProcess,
    **dict.fromkeys(_WORKERS, WorkerProcess),
}
"""Roles with settings, and whose."""
_NO_HEALTH = ("etcd", "gateway")
"""Who answers no questions about its health by gRPC."""
_ENDS = (("gateway",), ("frontend",), _WORKERS, ("coordinator",), ("etcd",))
"""Who asks ends first, then those that it still needs."""


class LocalCluster:
    """An async context manager: `async with LocalCluster(prefill=1, decode=1) as cluster`.

    Processes are "etcd", "coordinator", "gateway", "frontend" (numbered if there are several:
    "frontend-0"...), "prefill-0", "decode-0", "both-0"...; worker ids are
    these names, a dash and a random suffix. `settings` ("section.key" to value) go to all of
    them, over `config` and the environment, and `own` to some, by role or name. Ports are free ones
    unless asked for (the first of several has it, the next ones those behind it); all but workers
    keep theirs when restarted. With `etcd`, coordinators are found there. With `gateway`, the
    program, there is one before the frontends. `restart` brings dead processes back, with backoff,
    and those that live and are silent for `kill_silent_seconds`.

    Leaving the context drains and ends every process; ClusterError says if one of them had to be
    killed or failed. An exception (a cancellation, too) on the way out kills all at once.
    """

    def __init__(
        self,
        *,
        prefill: int = 1,
        decode: int = 1,
        both: int = 0,
        coordinators: int = 1,
        frontends: int = 1,
        etcd: bool = False,
        gateway: Path | None = None,
        settings: Mapping[str, str] | None = None,
        own: Mapping[str, Mapping[str, str]] | None = None,
        config: Path | None = None,
        environment: Mapping[str, str] | None = None,
        frontend_port: int = 0,
        coordinator_port: int = 0,
        gateway_port: int = 0,
        restart: bool = False,
        kill_silent_seconds: float = KILL_SILENT_SECONDS,
        logs: Path | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self._config = config
        self._environment = environment
        self._restart = restart
        self._kill_silent_seconds = kill_silent_seconds
        self._gateway = gateway
        self._on_event = on_event
        self._settings = dict(settings or {})
        self._own = dict(own or {})
        workers = {"prefill": prefill, "decode": decode, "both": both}
        self._drain_seconds = self._settle(sum(workers.values()))
        self._passing_logs = logs is None
        self.logs = logs or Path(tempfile.mkdtemp(prefix="tandem-logs-"))
        """Folder with one log a process. If it was not asked for, a good end removes it."""
        self.etcd_data = self.logs / "etcd-data" if etcd else None
        """Folder that etcd keeps everything in; it goes with the cluster."""
        self._members = [
            *_members("etcd", int(etcd), 0),
            *_members("coordinator", coordinators, coordinator_port),
            *_members("frontend", frontends, frontend_port),
            *_members("gateway", int(gateway is not None), gateway_port),
            *(_Member(f"{role}-{i}", role) for role, n in workers.items() for i in range(n)),
        ]
        self._children: dict[str, Child] = {}
        self._addresses: dict[str, str] = {}
        self._supervisors: dict[str, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            await self.stop()
        else:
            await self.kill_all()
            if isinstance(error, asyncio.CancelledError):
                self._remove_logs()

    async def start(self) -> None:
        """Starts etcd, coordinators, all others; returns when every one is ready.

        Raises ClusterError; then, and when cancelled, no process is left.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        if self.etcd_data is not None:
            shutil.rmtree(self.etcd_data, ignore_errors=True)
        try:
            for roles in _STARTS:
                async with asyncio.TaskGroup() as group:
                    for member in self._of(roles):
                        group.create_task(self._launch(member))
        except BaseException as error:
            await self.kill_all()
            failures = error.exceptions if isinstance(error, BaseExceptionGroup) else (error,)
            for failure in failures:
                if isinstance(failure, ChildFailedError):
                    raise ClusterError(f"{failure}\nlogs: {self.logs}") from None
                if isinstance(failure, CommandError):
                    raise failure from None
            self._remove_logs()
            raise
        for member in self._members:
            self._supervise(member)

    def address(self, name: str) -> str:
        """host:port of a process. Raises KeyError."""
        return self._addresses[name]

    def addresses(self, role: str) -> list[str]:
        """host:port of all processes of a role ("frontend", "coordinator", "etcd", ...)."""
        return [self._addresses[member.name] for member in self._of((role,))]

    @property
    def names(self) -> list[str]:
        """Of all processes, whether they run or not."""
        return [member.name for member in self._members]

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of those that run."""
        return {n: c.pid for n, c in self._children.items() if c.returncode is None}

    def kill(self, name: str, number: int) -> None:
        """Sends a signal to a process."""
        self._children[name].kill(number)

    async def restart(self, name: str) -> None:
        """Ends a process if it runs, starts it again, and waits until it is ready."""
        await self._unsupervise(name)
        await self._children[name].end(self._drain_seconds + KILL_AFTER_DRAIN_SECONDS)
        member = next(m for m in self._members if m.name == name)
        await self._launch(member)
        self._supervise(member)

    async def stop(self) -> None:
        """Drains and ends all: frontends first, then workers, which they still need.

        Raises ClusterError if a process that ran had to be killed or ended with a failure.
        When cancelled, it kills what is left at once.
        """
        running = self.pids
        try:
            for name in list(self._supervisors):
                await self._unsupervise(name)
            for roles in _ENDS:
                await asyncio.gather(*(self._end(member) for member in self._of(roles)))
        finally:
            await self.kill_all()
        bad = [self._children[n] for n in running if self._children[n].returncode != 0]
        if bad:
            ends = "\n".join(f"{c.name} {c.how_it_ended()}\n{c.tail()}" for c in bad)
            raise ClusterError(f"not all processes ended in good order\n{ends}\nlogs: {self.logs}")
        self._remove_logs()

    async def kill_all(self) -> None:
        """SIGKILL to every process that is left; returns when they are gone."""
        for name in list(self._supervisors):
            await self._unsupervise(name)
        await asyncio.gather(*(child.end(0) for child in self._children.values()))
        if self.etcd_data is not None:
            shutil.rmtree(self.etcd_data, ignore_errors=True)

    async def wait_all_ended(self) -> None:
        """Until no process is left that runs or will be started again."""
        await asyncio.gather(*self._supervisors.values(), return_exceptions=True)

    async def _end(self, member: _Member) -> None:
        child = self._children.get(member.name)
        if child is not None and child.returncode is None:
            self._tell(member, "stopping")
            await child.end(self._drain_seconds + KILL_AFTER_DRAIN_SECONDS)
            self._tell(member, "ended", child.how_it_ended() if child.returncode else "")

    async def _launch(self, member: _Member) -> None:
        self._tell(member, "starting")
        log = self.logs / f"{member.name}.log"
        child: Child
        if self.etcd_data is not None and member.role == "etcd":
            child = await EtcdChild.launch(
                member.name, self.etcd_data, self._port(member), log=log, timeout=READY_SECONDS
            )
        elif self._gateway is not None and member.role == "gateway":
            child = await GatewayChild.launch(
                member.name,
                self._gateway,
                self.addresses("frontend"),
                self._port(member),
                drain_seconds=self._drain_seconds,
                log=log,
                timeout=READY_SECONDS,
            )
        else:
            child = await Child.start(
                member.name,
                self._arguments(member),
                log=log,
                environment=self._environment,
                timeout=READY_SECONDS,
            )
        self._children[member.name] = child
        self._addresses[member.name] = child.address
        self._tell(member, "ready", child.address)

    def _arguments(self, member: _Member) -> list[str]:
        named = {"server.port": str(self._port(member))}
        if self.etcd_data is not None:
            named["directory.etcd"] = ",".join(self.addresses("etcd"))
        if member.role != "coordinator":
            known = [] if self.etcd_data else self.addresses("coordinator")
            named["worker.coordinator"] = named["frontend.coordinator"] = ",".join(known)
            named["worker.name"] = member.name
        settings = self._settings | named | self._own_of(member.role) | self._own_of(member.name)
        config = ["--config", str(self._config)] if self._config else []
        sets = [text for key, value in settings.items() for text in ("--set", f"{key}={value}")]
        return [member.role, *config, *sets]

    def _own_of(self, name: str) -> dict[str, str]:
        return dict(self._own.get(name, {}))

    def _port(self, member: _Member) -> int:
        """Workers take a new one with each start; others keep theirs."""
        if member.role in _WORKERS or member.name not in self._addresses:
            return member.port
        return int(self.address(member.name).rpartition(":")[2])

    def _of(self, roles: Sequence[str]) -> list[_Member]:
        return [member for member in self._members if member.role in roles]

    def _supervise(self, member: _Member) -> None:
        self._supervisors[member.name] = asyncio.create_task(self._watch(member))

    async def _unsupervise(self, name: str) -> None:
        task = self._supervisors.pop(name, None)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _watch(self, member: _Member) -> None:
        """Sees a process die, and brings it back if that is wanted."""
        backoff = FIRST_BACKOFF_SECONDS
        while True:
            child, since = self._children[member.name], time.monotonic()
            await self._wait(member, child)
            if not self._restart:
                self._tell(member, "died", f"of {child.cause()}")
                return
            if time.monotonic() - since > STEADY_SECONDS:
                backoff = FIRST_BACKOFF_SECONDS
            self._tell(member, "died", f"of {child.cause()}; starts again in {backoff:g} s")
            while True:
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)
                try:
                    await self._launch(member)
                    break
                except ChildFailedError as error:
                    again = f"again: {str(error).splitlines()[0]}; next try in {backoff:g} s"
                    self._tell(member, "died", again)

    async def _wait(self, member: _Member, child: Child) -> None:
        """Until a process ends; meanwhile says if it is silent, and kills it if it stays so."""
        if member.role in _NO_HEALTH:
            await child.wait()
            return
        listening = asyncio.create_task(self._listen(member, child))
        try:
            await child.wait()
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    async def _listen(self, member: _Member, child: Child) -> None:
        kill, told = self._kill_silent_seconds, 0.0
        async for silent in silences(child.address):
            if not silent and told:
                self._tell(member, "ready", f"{child.address}, it answers again")
                told = 0.0
            elif silent >= kill and self._restart:
                self._tell(member, "silent", f"for {silent:g} s; pid {child.pid} is killed")
                child.kill(signal.SIGKILL)
                return
            elif silent >= 2 * told and silent > 0:
                then = f", and is killed after {kill:g} s" if self._restart else ""
                self._tell(member, "silent", f"for {silent:g} s; pid {child.pid} lives{then}")
                told = silent

    def _settle(self, workers: int) -> float:
        """Splits the CPU among the workers unless told otherwise; returns the drain's length.

        Raises SettingsError, before any process is started.
        """
        environment = os.environ if self._environment is None else self._environment
        flags = [Given(k, v, f"--set {k}={v}") for k, v in self._settings.items()]
        for role, process in _PROCESSES.items():
            own = [Given(k, v, f"--set {role}:{k}={v}") for k, v in self._own_of(role).items()]
            load(process, self._config, environment, [*flags, *own])
        worker, _ = load(WorkerProcess, self._config, environment, flags)
        if worker.engine.threads == 0:
            self._settings["engine.threads"] = str(max(1, cpus() // max(1, workers)))
        return worker.server.drain_seconds

    def _remove_logs(self) -> None:
        if self._passing_logs:
            shutil.rmtree(self.logs, ignore_errors=True)

    def _tell(self, member: _Member, phase: str, detail: str = "") -> None:
        self._on_event(Event(member.name, phase, detail))


def cpus() -> int:
    """CPUs this process may run on."""
    with contextlib.suppress(AttributeError):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
