"""CPU time and memory of processes on this machine, by process id."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from loadtest.errors import ProcessError

OWN_NAME = "loadtest"
"""Name of this process among the measured ones."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of a process."""

    rss_bytes: int
    private_bytes: int
    """Without what other processes can map too: KV pools, libraries. Not on Linux: all of it."""


@dataclass(frozen=True, slots=True)
class ProcessUsage:
    """What one process used between the first and the last sample."""

    name: str
    pid: int
    cpu_seconds: float
    """User and system time together."""
    cpu_ms_per_request: float | None
    """Divided by the requests that ended well; None without any."""
    rss_first_bytes: int
    rss_last_bytes: int
    rss_most_bytes: int
    """Of the samples."""
    gone: bool
    """It ended during the run: the numbers are of the time before."""


class ProcessMeter:
    """Samples processes; `sample` often, since what was not sampled is lost if one dies.

    Raises ProcessError for a pid that does not exist or may not be read.
    """

    def __init__(self, pids: Mapping[str, int], *, own: bool = True) -> None:
        named = dict(pids)
        if own:
            named[OWN_NAME] = os.getpid()
        self._processes: dict[str, psutil.Process] = {}
        self._first: dict[str, tuple[float, Memory]] = {}
        for name, pid in named.items():
            try:
                self._processes[name] = psutil.Process(pid)
                self._first[name] = _read(self._processes[name])
            except psutil.Error as error:
                raise ProcessError(f"{name}, pid {pid}, can't be measured: {error}") from None
        self._last = dict(self._first)
        self._most = {name: memory.rss_bytes for name, (_, memory) in self._first.items()}
        self._gone: set[str] = set()

    def sample(self) -> dict[str, Memory]:
        """Reads all that are left. Returns each one's memory now."""
        found = {}
        for name, process in self._processes.items():
            if name in self._gone:
                continue
            try:
                cpu, memory = _read(process)
            except psutil.NoSuchProcess:
                self._gone.add(name)
                continue
            self._last[name] = (cpu, memory)
            self._most[name] = max(self._most[name], memory.rss_bytes)
            found[name] = memory
        return found

    def usage(self, requests: int) -> tuple[ProcessUsage, ...]:
        """Between creation and the last sample; `requests` ended well in that time."""
        return tuple(self._usage(name, requests) for name in self._processes)

    def _usage(self, name: str, requests: int) -> ProcessUsage:
        (cpu_first, first), (cpu_last, last) = self._first[name], self._last[name]
        cpu = cpu_last - cpu_first
        return ProcessUsage(
            name=name,
            pid=self._processes[name].pid,
            cpu_seconds=cpu,
            cpu_ms_per_request=1e3 * cpu / requests if requests else None,
            rss_first_bytes=first.rss_bytes,
            rss_last_bytes=last.rss_bytes,
            rss_most_bytes=self._most[name],
            gone=name in self._gone,
        )


def _read(process: psutil.Process) -> tuple[float, Memory]:
    """CPU seconds so far and memory now. Raises NoSuchProcess, for a zombie too."""
    with process.oneshot():
        times = process.cpu_times()
        memory = process.memory_info()
    if memory.rss == 0 and process.status() == psutil.STATUS_ZOMBIE:
        raise psutil.NoSuchProcess(process.pid)
    found = Memory(memory.rss, memory.rss - getattr(memory, "shared", 0))
    return times.user + times.system, found


def listener(address: str) -> int | None:
    """The local process that listens on host:port; None: none that this user may see."""
    port = int(address.rpartition(":")[2])
    for connection in psutil.net_connections(kind="tcp"):
        local = connection.laddr
        if connection.status == psutil.CONN_LISTEN and local and local.port == port:
            return connection.pid
    return None
