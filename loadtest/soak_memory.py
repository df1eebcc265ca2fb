"""Memory of a cluster's processes during a soak, and which processes there ever were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import psutil

WARM_UP_SHARE = 0.25
"""Of a process's samples: caches fill, allocators find their size."""
JUDGED_SECONDS = 240.0
"""After warm-up: growth is no trend in less."""
FLAT_BYTES = 16 * 2**20
FLAT_SHARE = 0.05
"""Growth after warm-up that is still flat: so many bytes, or this part of the process."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A process, told from a later one with the same id."""

    name: str
    pid: int
    started: float


@dataclass(frozen=True, slots=True)
class Trend:
    """Private memory of one process (its own, without the KV pool and libraries)."""

    name: str
    seconds: float
    """Seen, after warm-up."""
    first_bytes: int
    last_bytes: int
    bytes_per_minute: float
    """Slope of the least-squares line."""
    flat: bool | None
    """None: it did not live long enough to tell."""


class Watch:
    """`look` often: a process that was never seen is not known."""

    def __init__(self) -> None:
        self._samples: dict[Identity, list[tuple[float, int]]] = {}

    def look(self, pids: Mapping[str, int], now: float) -> None:
        """Samples processes by name, and notes their children."""
        for name, pid in pids.items():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                self._note(name, process, now)
                for child in process.children(recursive=True):
                    self._note(f"child of {name}", child, now)

    def _note(self, name: str, process: psutil.Process, now: float) -> None:
        with process.oneshot():
            identity = Identity(name, process.pid, process.create_time())
            memory = process.memory_info()
        private = memory.rss - getattr(memory, "shared", 0)
        if private > 0:  # not of a zombie
            self._samples.setdefault(identity, []).append((now, private))

    @property
    def seen(self) -> tuple[Identity, ...]:
        """Every process there was."""
        return tuple(self._samples)

    def trends(self, pids: Mapping[str, int]) -> tuple[Trend, ...]:
        """Of the processes that run now."""
        found = [
            trend(identity.name, samples)
            for identity, samples in self._samples.items()
            if pids.get(identity.name) == identity.pid
        ]
        return tuple(sorted(found, key=lambda t: t.name))


def trend(name: str, samples: list[tuple[float, int]]) -> Trend:
    """Of (seconds, bytes) samples, at least one."""
    began, ended = samples[0][0], samples[-1][0]
    warm = began + WARM_UP_SHARE * (ended - began)
    kept = [sample for sample in samples if sample[0] >= warm]
    times, sizes = (np.array(column, np.float64) for column in zip(*kept, strict=True))
    seconds = float(times[-1] - times[0])
    slope = float(np.polyfit(times, sizes, 1)[0]) if len(kept) > 2 and seconds else 0.0
    growth = slope * seconds
    flat = growth <= max(FLAT_BYTES, FLAT_SHARE * float(sizes[0]))
    return Trend(
        name,
        seconds,
        int(sizes[0]),
        int(sizes[-1]),
        60 * slope,
        flat if seconds >= JUDGED_SECONDS else None,
    )


def still_running(seen: Iterable[Identity]) -> tuple[str, ...]:
    """Names and pids of those that run, zombies left out."""
    left = []
    for identity in seen:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(identity.pid)
            same = process.create_time() == identity.started
            if same and process.status() != psutil.STATUS_ZOMBIE:
                left.append(f"{identity.name}, pid {identity.pid}")
    return tuple(left)
