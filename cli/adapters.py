"""`tandem adapters`: LoRA adapters of a cluster's workers: list, load, unload."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli import found
from cli.output import CommandError, plain_errors, printable
from cli.view import SHOWN_DIGITS, size
from services.runtime.client import CallFailedError, Client, HeldAdapter, Worker
from services.runtime.oneline import one_line

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="List, load and unload LoRA adapters, on all workers of a cluster or on some.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

T = TypeVar("T")

SEEN_SECONDS = 10.0
"""A change that the coordinator has not heard of by then is said to be on its way."""
LOOK_SECONDS = 0.05
Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Settings file (TOML). Default: $TANDEM_CONFIG."),
]
Coordinator = Annotated[
    str | None,
    typer.Option(
        "--coordinator",
        metavar="HOST:PORT",
        help="One that answers, of several with commas. Default: as settings say.",
    ),
]
Only = Annotated[
    list[str],
    typer.Option("--worker", help="Only this one, by id or name; may be repeated."),
]
Name = Annotated[str, typer.Argument(help="Name that requests ask for it by.")]


@app.command("list")
def list_(coordinator: Coordinator = None, config: Config = None) -> None:
    """Show which adapters each worker has, and how many requests run with them."""
    with plain_errors():
        asyncio.run(_list(_where(coordinator, config)))


@app.command()
def load(
    name: Name,
    path: Annotated[
        str,
        typer.Argument(help="Folder below the workers' engine.adapter_folder. Default: the name."),
    ] = "",
    worker: Only = [],  # noqa: B006 - typer copies it
    coordinator: Coordinator = None,
    config: Config = None,
) -> None:
    """Load an adapter on every worker; one of the same name is replaced, and its requests finish.

    Each worker reads it from its own disk: the folder has to be there on all machines.

    \b
    tandem up --set engine.adapter_folder=/srv/adapters
    tandem adapters load legal
    tandem adapters load legal legal-2026-11
    tandem generate "Is this binding?" --adapter legal
    """  # noqa: D301 - click's mark for lines to keep
    with plain_errors():
        asyncio.run(_load(_where(coordinator, config), name, path, worker))


@app.command()
def unload(
    name: Name,
    worker: Only = [],  # noqa: B006
    coordinator: Coordinator = None,
    config: Config = None,
) -> None:
    """Take no new requests with an adapter; it is gone when those that have it have ended."""
    with plain_errors():
        asyncio.run(_unload(_where(coordinator, config), name, worker))


def _where(coordinator: str | None, config: Path | None) -> str:
    given = None if coordinator is None else found.named([coordinator])
    return given or found.coordinators(config, os.environ)


async def _list(coordinator: str) -> None:
    async with Client("", coordinator) as client:
        workers = (await client.status()).workers
        told = await _each(workers, lambda worker: client.adapters(worker.address))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for heading in ("adapter", "weights", "worker", "rank", "size", "requests", ""):
        table.add_column(heading, justify="right" if heading in _NUMBERS else "left")
    rows = sorted(
        (a.name, a.leaving, a.id, worker.worker_id, a)
        for worker, held in told
        if isinstance(held, list)
        for a in held
    )
    for *_, worker_id, held in rows:
        table.add_row(*map(_plain, _row(worker_id, held)))
    Console().print(table if rows else _plain("no worker has an adapter"))
    _complain(told)


_NUMBERS = frozenset({"rank", "size", "requests"})


def _row(worker_id: str, held: HeldAdapter) -> Iterable[str]:
    digest = held.id.partition("@")[2][:SHOWN_DIGITS]
    state = "leaving" if held.leaving else ""
    return held.name, digest, worker_id, str(held.rank), size(held.bytes), str(held.requests), state


async def _load(coordinator: str, name: str, path: str, only: Sequence[str]) -> None:
    async with Client("", coordinator) as client:
        workers = _chosen((await client.status()).workers, only)
        told = await _each(workers, lambda w: client.load_adapter(w.address, name, path))
        loaded = {w.worker_id: a for w, a in told if isinstance(a, HeldAdapter)}
        for worker_id, adapter in loaded.items():
            print(printable(f"{worker_id}: {adapter.id}, rank {adapter.rank}"))
        if len({adapter.id for adapter in loaded.values()}) > 1:
            print("The weights differ: each request is served by workers with the same ones.")

        def done(worker: Worker) -> bool:
            adapter = loaded.get(worker.worker_id)
            return adapter is None or adapter.id in worker.adapters

        await _until(client, done)
    _complain(told)


async def _unload(coordinator: str, name: str, only: Sequence[str]) -> None:
    async with Client("", coordinator) as client:
        workers = _chosen((await client.status()).workers, only)
        having = [w for w in workers if any(a.partition("@")[0] == name for a in w.adapters)]
        if not having:
            have = ", ".join(sorted({a for w in workers for a in w.adapters})) or "none"
            raise CommandError(f"no worker has adapter {name!r}; loaded: {have}")
        told = await _each(having, lambda w: client.unload_adapter(w.address, name))
        for worker, leaving in told:
            if isinstance(leaving, list):
                requests = sum(adapter.requests for adapter in leaving)
                when = f"when its requests have ended ({requests} now)" if requests else "at once"
                print(printable(f"{worker.worker_id}: {name} goes {when}"))
        gone = {w.worker_id for w, leaving in told if isinstance(leaving, list)}

        def done(worker: Worker) -> bool:
            names = {a.partition("@")[0] for a in worker.adapters}
            return worker.worker_id not in gone or name not in names

        await _until(client, done)
    _complain(told)


def _chosen(workers: Sequence[Worker], only: Sequence[str]) -> Sequence[Worker]:
    """All, or those that are named, by id or by the name that it begins with."""
    if not workers:
        raise CommandError("the coordinator knows no worker")
    if not only:
        return workers
    chosen = []
    for name in only:
        some = [w for w in workers if name in (w.worker_id, w.worker_id.rpartition("-")[0])]
        if not some:
            have = ", ".join(w.worker_id for w in workers)
            raise CommandError(f"no worker {name!r}; there are: {have}")
        chosen += some
    return chosen


async def _each(
    workers: Sequence[Worker], call: Callable[[Worker], Awaitable[T]]
) -> list[tuple[Worker, T | CallFailedError]]:
    """What each worker answers, or why not."""
    answers = await asyncio.gather(*map(call, workers), return_exceptions=True)
    told: list[tuple[Worker, T | CallFailedError]] = []
    for worker, answer in zip(workers, answers, strict=True):
        if isinstance(answer, BaseException) and not isinstance(answer, CallFailedError):
            raise answer
        told.append((worker, answer))
    return told


async def _until(client: Client, done: Callable[[Worker], bool]) -> None:
    """Waits until the coordinator knows: then the next request finds it so."""
    try:
        async with asyncio.timeout(SEEN_SECONDS):
            # The coordinator gives no event: its view is asked for.
            while not all(done(worker) for worker in (await client.status()).workers):  # noqa: ASYNC110
                await asyncio.sleep(LOOK_SECONDS)
    except TimeoutError:
        print("The coordinator has not heard of it yet.")


def _complain(told: Sequence[tuple[Worker, object]]) -> None:
    """Raises CommandError if a worker did not do it."""
    failed = [(w, e) for w, e in told if isinstance(e, CallFailedError)]
    if failed:
        lines = [f"{w.worker_id}: {e.message} ({e.reason or e.code})" for w, e in failed]
        raise CommandError("\n".join(lines))


def _plain(text: str) -> Text:
    return Text(one_line(text))
