"""`tandem bench start`: how long a worker takes from exec to its first token, and on what."""

from __future__ import annotations

import asyncio
import os
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

WORKER = "decode-0"
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
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers here.")
    ] = None,
) -> None:
    """Measure a worker's start, from exec to its first token, phase by phase.

    Starts a cluster of one worker, then restarts the worker. Files are in the page cache from the
    first start on.
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
            cluster = LocalCluster(prefill=0, settings=settings, config=file)
            with Console(stderr=True).status("starting") as status:
                if not await started(cluster, stop):
                    raise typer.Exit(INTERRUPTED)
                async with AsyncExitStack() as stack:
                    stack.push_async_exit(cluster)
                    starts = [await _measured(cluster)]
                    while len(starts) <= rounds and not stop.is_set():
                        status.update(f"start {len(starts)} of {rounds}")
                        await cluster.restart(WORKER)
                        starts.append(await _measured(cluster))
                    async with Client(cluster.address("frontend")) as client:
                        (name,) = await client.models()
            stopped.append(stop.is_set())
            report = StartReport(name, count, before, tuple(starts))
            bench_start.show(report, Console())
            if json_file is not None:
                bench_start.write(report, json_file)

        raise typer.Exit(process.run(main) or (INTERRUPTED if stopped[0] else 0))


async def _measured(cluster: LocalCluster) -> Start:
    """The start that has just ended, and the first token now."""
    began = psutil.Process(cluster.pids[WORKER]).create_time()
    lines = (cluster.logs / f"{WORKER}.log").read_text(errors="replace").splitlines()
    reached = bench_start.milestones_of(lines, began)
    asked = time.perf_counter()
    ask = Ask(prompt="Once upon a time", sampling={"max_tokens": 1})
    async with Client(cluster.address("frontend")) as client:
        async for _ in client.stream(ask, timeout=FOREVER):
            break
    return bench_start.start_of(reached, began, time.perf_counter() - asked)
