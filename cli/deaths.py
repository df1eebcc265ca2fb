"""`tandem bench deaths`: what users see when each process of a replicated cluster dies."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cli import flags
from cli import load_flags as f
from cli.cluster import LocalCluster
from cli.loadtest import plain_refusals
from cli.output import INTERRUPTED, plain_errors
from cli.prepare import prepare
from cli.up import started
from loadtest import bench_deaths, deaths_report
from loadtest.bench_deaths import DeathsOptions
from services.runtime import process

SETTINGS = {"coordinator.local_prefill_tokens": "0"}
"""Every prompt goes to a prefill worker, so that their deaths are felt."""


def deaths(
    users: Annotated[int, typer.Option("--users", "-u", min=2, help="Requests in flight.")] = 8,
    coordinators: Annotated[int, typer.Option(min=2, help="Coordinators.")] = 2,
    frontends: Annotated[int, typer.Option(min=2, help="Frontends.")] = 2,
    prefill: Annotated[int, typer.Option(min=2, help="Prefill workers.")] = 2,
    decode: Annotated[int, typer.Option(min=2, help="Decode workers.")] = 2,
    etcd: Annotated[bool, typer.Option(help="Find coordinators in etcd, which dies too.")] = True,
    down: Annotated[
        float, typer.Option(min=0, help="Seconds from a death until it is started again.")
    ] = 2.0,
    stopped: Annotated[float, typer.Option(min=0, help="Seconds a coordinator is stopped.")] = 6.0,
    calm: Annotated[
        float, typer.Option(min=0, help="Seconds from one's return to the next one's death.")
    ] = 3.0,
    input_tokens: Annotated[str, typer.Option("--input", help="Prompt tokens.")] = "uniform:8:200",
    output_tokens: Annotated[
        str, typer.Option("--output", help="Output tokens.")
    ] = "uniform:60:160",
    seed: f.Seed = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model name, or path of a folder or GGUF.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option("--engine", help="torch, or scripted (no model).")
    ] = None,
    config: f.Config = None,
    sets: Annotated[
        list[str], typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="A setting.")
    ] = [],  # noqa: B006
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers here.")
    ] = None,
    markdown: Annotated[bool, typer.Option(help="Print the table as the docs have it.")] = False,
) -> None:
    """Kill each process of a replicated cluster in turn, under load, and see what users notice.

    Every answer is compared with the undisturbed one. The exit status says whether every request
    got all of its tokens.
    """
    with plain_errors(), plain_refusals():
        file = flags.config(config, os.environ)
        settings = SETTINGS | flags.texts(sets, model, engine)
        prepare(file, os.environ, settings, fetch=False)
        options = DeathsOptions(
            seed=f.seed(seed),
            users=users,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            down_seconds=down,
            stopped_seconds=stopped,
            calm_seconds=calm,
            settings=settings,
        )

        async def measure(stop: asyncio.Event) -> int:
            cluster = LocalCluster(
                prefill=prefill,
                decode=decode,
                coordinators=coordinators,
                frontends=frontends,
                etcd=etcd,
                settings=settings,
                config=file,
            )
            async with AsyncExitStack() as stack:
                status = stack.enter_context(Console(stderr=True).status("starting"))
                if not await started(cluster, stop):
                    return INTERRUPTED
                stack.push_async_exit(cluster)
                report = await bench_deaths.run(options, cluster, say=status.update, stop=stop)
            if markdown:
                print(deaths_report.markdown(report), end="")
            else:
                deaths_report.show(report, Console())
            if json_file is not None:
                deaths_report.write(report, json_file)
            return INTERRUPTED if report.interrupted else int(bool(report.violations))

        raise typer.Exit(process.run(measure))
