"""Where a run was made: what a reader must know before comparing its numbers."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

PACKAGES = ("tandem-serving", "grpcio", "protobuf", "numpy", "torch", "uvloop")


@dataclass(frozen=True, slots=True)
class Environment:
    """The machine that the load generator ran on."""

    cpu: str
    cores: int
    """That this process may use."""
    memory_bytes: int
    system: str
    python: str
    load_before: float
    """The system's one-minute load average before the run: above 0, others were working."""
    packages: dict[str, str]
    """Version by name; absent where not installed."""


def here() -> Environment:
    """The machine as it is now."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    return Environment(
        cpu=_cpu_model(),
        cores=cores,
        memory_bytes=psutil.virtual_memory().total,
        system=platform.platform(terse=True),
        python=platform.python_version(),
        load_before=psutil.getloadavg()[0],
        packages={name: version for name in PACKAGES if (version := _version(name))},
    )


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
