"""Tables of what a cluster does, for `tandem up` and `tandem status`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvtransfer.observe import Figures, Traffic, total
from services.runtime.client import Status, Worker
from services.runtime.oneline import one_line

SHOWN_DIGITS = 12
"""Of an adapter's digest."""


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
    """Workers, their load and KV pools, how KV moved, and what the coordinator decided.

    It fits 80 columns, unless names are long.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("worker", no_wrap=True)
    for heading in ("pid", "run", "wait", "step", "done", "KV used", "cached", "leases"):
        table.add_column(heading, justify="right", no_wrap=True)
    for worker in status.workers:
        row = (_plain(cell) for cell in _row(worker))
        table.add_row(*row, style="yellow" if _state(worker) else "")
    remarks = [f"{w.worker_id} {_state(w)}" for w in status.workers if _state(w)]
    more = (
        *ranks(status),
        *transports(status),
        *tiers(status),
        *adapters(status),
        *drafts(status),
        summary(status),
    )
    lines = [_plain(line, "dim") for line in more]
    return Group(table, *(_plain(remark, "yellow") for remark in remarks), *lines)


def _plain(text: str, style: str = "") -> Text:
    """Words with names in them that workers chose: neither markup nor what drives a terminal."""
    return Text(one_line(text), style=style)


def summary(status: Status) -> str:
    """One line of all."""
    refused = ", ".join(f"{count} {reason}" for reason, count in sorted(status.refused.items()))
    moved = status.kv_bytes_gone + sum(sum(w.kv_bytes.values()) for w in status.workers)
    return one_line(
        f"{len(status.workers)} workers, "
        f"{sum(w.running for w in status.workers)} running, {status.queued} queued; "
        f"{status.placed} placed, {refused or 'none'} refused, "
        f"{size(moved)} of KV moved; "
        f"coordinator up {duration(status.uptime_seconds)}"
    )


def transports(status: Status) -> list[str]:
    """Which KV transports are offered, and a line for each that was used: what moved, and why."""
    lines = [*_offered(status.workers)]
    sums: dict[str, list[Traffic]] = {}
    for worker in status.workers:
        for traffic in worker.kv_traffic:
            if not traffic.peer:
                sums.setdefault(traffic.transport, []).append(traffic)
    for name, parts in sorted(sums.items()):
        why = "; ".join(dict.fromkeys(p.why for p in parts if p.why))
        lines.append(_moved(name, total(parts)) + (f" ({why})" if why else ""))
    return lines


def ranks(status: Status) -> list[str]:
    """A line for each worker of several data-parallel ranks: what each of them has."""
    return [
        f"{worker.worker_id} ranks: "
        + ", ".join(
            f"{number}: {rank.running} run, {rank.waiting} wait, {rank.free_blocks} blocks free"
            for number, rank in enumerate(worker.ranks)
        )
        for worker in status.workers
        if len(worker.ranks) > 1
    ]


def tiers(status: Status) -> list[str]:
    """A line for each tier under a worker's pool."""
    return [
        f"{worker.worker_id} {tier.name} tier: "
        + (
            f"off, {tier.off}"
            if tier.off
            else f"{size(tier.used_bytes)}/{size(tier.capacity_bytes)}"
        )
        + f", {tier.hits} blocks came back of {tier.stored} stored"
        + (f", {tier.corrupt} corrupt" if tier.corrupt else "")
        for worker in status.workers
        for tier in worker.kv_tiers
    ]


def adapters(status: Status) -> list[str]:
    """A line for each LoRA adapter: where it is."""
    having: dict[str, list[str]] = {}
    for worker in status.workers:
        for adapter in worker.adapters:
            having.setdefault(adapter, []).append(worker.worker_id)
    return [
        f"LoRA adapter {name[: name.find('@') + 1 + SHOWN_DIGITS]}: {', '.join(who)}"
        for name, who in sorted(having.items())
    ]


def drafts(status: Status) -> list[str]:
    """A line for each worker that drafts: what comes of it."""
    return [
        f"{w.worker_id} drafts: {1 + w.accepted_tokens / max(1, w.decode_steps):.2f} tokens a step "
        f"and request, {w.accepted_tokens / w.draft_tokens:.0%} of {w.draft_tokens} accepted"
        for w in status.workers
        if w.draft_tokens
    ]


def _offered(workers: Sequence[Worker]) -> Iterator[str]:
    """A line for each set of transports that workers offer."""
    sets: dict[tuple[tuple[str, ...], tuple[tuple[str, str], ...]], list[str]] = {}
    for worker in workers:
        key = worker.kv_transports, tuple(sorted(worker.kv_not_offered.items()))
        sets.setdefault(key, []).append(worker.worker_id)
    for (names, missing), who in sets.items():
        offered = ", ".join(names) or "none"
        where = f" by {', '.join(who)}" if len(sets) > 1 else ""
        not_offered = "".join(f"; not {name}: {why}" for name, why in missing)
        yield f"KV transports offered{where}: {offered}{not_offered}"


def _moved(name: str, figures: Figures) -> str:
    words = f"{name or 'no transport'}: {figures.fetches} fetches"
    if figures.bytes:
        words += f", {size(figures.bytes)}, {duration(figures.exposed_seconds)} of it exposed"
    bad = {
        "refused": figures.refused,
        "lost": figures.lost,
        "expired": figures.expired,
        "stale": figures.stale,
        "blocks corrupt": figures.corrupt,
        "pieces read twice": figures.reread,
    }
    return words + "".join(f", {count} {what}" for what, count in bad.items() if count)


def _row(worker: Worker) -> Iterable[str]:
    name = worker.worker_id
    return (
        name if name.startswith(worker.role) else f"{name} ({worker.role})",
        str(worker.pid),
        str(worker.running),
        str(worker.waiting),
        duration(worker.step_seconds) if worker.step_seconds else "-",
        str(worker.finished),
        f"{worker.held_blocks}/{worker.total_blocks}",
        str(worker.cached_blocks),
        str(worker.leases),
    )


def _state(worker: Worker) -> str:
    """What is to be said of it, if it is not simply up."""
    if worker.silent_seconds > 1:
        return f"was silent for {worker.silent_seconds:.0f} s"
    if worker.draining:
        return "is draining"
    return f"is avoided: {worker.avoided}" if worker.avoided else ""
