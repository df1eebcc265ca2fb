"""`tandem bench start`: how long a worker takes from exec to its first token, and on what."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console

from cli import flags
from cli import load_flags as f
from cli.cluster import LocalCluster
from cli.loadtest import plain_refusals
from cli.output import INTERRUPTED, plain_errors
from cli.prepare import prepare
from cli.up import started
from loadtest import bench_start, environment
from loadtest.bench_start import Start, StartReport
from services.runtime import process
from services.runtime.client import Ask, Client
from services.runtime.settings import ANY_WORKER

WORKER = "decode-0"
FETCHES = "decode-1"
FOREVER = 600.0


def start(
    rounds: Annotated[int, typer.Option(min=1, help="Starts after the first.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: all cores.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model name, or path of a folder or GGUF.")
    ] = None,
    config: f.Config = None,
    sets: Annotated[
        list[str], typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="A setting.")
    ] = [],  # noqa: B006 - typer copies it
    peer: Annotated[
        bool, typer.Option("--peer", help="Also start a worker that fetches its files from it.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers here.")
    ] = None,
) -> None:
    """Measure a worker's start, from exec to its first token, phase by phase.

    Starts a cluster of one worker, then restarts the worker. Files are in the page cache from the
    first start on. With --peer there is a second worker, whose files are removed before each of
    its starts.
    """
    with plain_errors(), plain_refusals():
        file = flags.config(config, os.environ)
        count = threads or environment.here().cores
        settings = flags.texts(sets, model, None)
        settings |= {"engine.threads": str(count), "log.format": "json"}
        prepare(file, os.environ, settings, fetch=False)
        stopped: list[bool] = []

        async def main(stop: asyncio.Event) -> None:
            before = environment.here()
            with (
                tempfile.TemporaryDirectory(prefix="tandem-fetched-") as folder,
                Console(stderr=True).status("starting") as status,
            ):
                fetched = {"model.path": folder, "weights.sources": ANY_WORKER}
                cluster = LocalCluster(
                    prefill=0,
                    decode=1 + peer,
                    settings=settings,
                    own={FETCHES: fetched},
                    config=file,
                )
                if not await started(cluster, stop):
                    raise typer.Exit(INTERRUPTED)
                async with AsyncExitStack() as stack:
                    stack.push_async_exit(cluster)
                    starts = [await _measured(cluster, WORKER)]
                    fetches: list[Start] = []
                    while len(starts) <= rounds and not stop.is_set():
                        status.update(f"start {len(starts)} of {rounds}")
                        await cluster.restart(WORKER)
                        starts.append(await _measured(cluster, WORKER))
                    while peer and len(fetches) < rounds and not stop.is_set():
                        status.update(f"start {len(fetches) + 1} of {rounds} from a worker")
                        _empty(Path(folder))
                        await cluster.restart(FETCHES)
                        fetches.append(await _measured(cluster, FETCHES))
                    async with Client(cluster.address("frontend")) as client:
                        (name,) = await client.models()
                size = _size(Path(folder))
            stopped.append(stop.is_set())
            report = StartReport(name, count, before, tuple(starts), tuple(fetches), size)
            bench_start.show(report, Console())
            if json_file is not None:
                bench_start.write(report, json_file)

        raise typer.Exit(process.run(main) or (INTERRUPTED if stopped[0] else 0))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


async def _measured(cluster: LocalCluster, worker: str) -> Start:
    """The start of a worker that has just ended, and the first token now.

    Where there are two workers the token may be the other one's.
    """
    began = psutil.Process(cluster.pids[worker]).create_time()
    lines = (cluster.logs / f"{worker}.log").read_text(errors="replace").splitlines()
    reached = bench_start.milestones_of(lines, began)
    asked = time.perf_counter()
    ask = Ask(prompt="Once upon a time", sampling={"max_tokens": 1})
    async with Client(cluster.address("frontend")) as client:
        async for _ in client.stream(ask, timeout=FOREVER):
            break
    return bench_start.start_of(reached, began, time.perf_counter() - asked)
