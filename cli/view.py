"""Tables of what a cluster does, for `tandem up` and `tandem status`."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from services.runtime.client import Status, Worker


def size(count: float) -> str:
    """Bytes for people: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds for people: 12.3 ms, 4.56 s, 5 min 3 s."""
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 60:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def cluster(status: Status) -> RenderableType:
    """Workers, their load and KV pools, and what the coordinator decided."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("worker", "role", "pid", "state"):
        table.add_column(heading)
    for heading in ("running", "waiting", "step", "done", "KV used", "cached", "leases", "fetched"):
        table.add_column(heading, justify="right")
    for worker in status.workers:
        table.add_row(*_row(worker))
    return Group(table, Text(summary(status), style="dim"))


def summary(status: Status) -> str:
    """One line of all."""
    refused = ", ".join(f"{count} {reason}" for reason, count in sorted(status.refused.items()))
    return (
        f"{len(status.workers)} workers, "
        f"{sum(w.running for w in status.workers)} running, {status.queued} queued; "
        f"{status.placed} placed, {refused or 'none'} refused, "
        f"{size(sum(sum(w.kv_bytes.values()) for w in status.workers))} of KV moved; "
        f"coordinator up {duration(status.uptime_seconds)}"
    )


def _row(worker: Worker) -> Iterable[str]:
    state = "draining" if worker.draining else "up"
    if worker.silent_seconds > 1:
        state += f", silent {worker.silent_seconds:.0f} s"
    fetched = ", ".join(f"{name} {size(n)}" for name, n in sorted(worker.kv_bytes.items()) if n)
    return (
        worker.worker_id,
        worker.role,
        str(worker.pid),
        state,
        str(worker.running),
        str(worker.waiting),
        duration(worker.step_seconds) if worker.step_seconds else "-",
        str(worker.finished),
        f"{worker.held_blocks}/{worker.total_blocks}",
        str(worker.cached_blocks),
        str(worker.leases),
        fetched or "-",
    )
