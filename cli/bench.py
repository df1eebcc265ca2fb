"""`tandem bench`: measurements that the README's figures come from, each with its own cluster."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cli import bench_engine, bench_start, flags
from cli import load_flags as f
from cli.cluster import ClusterError, LocalCluster
from cli.deaths import deaths
from cli.loadtest import plain_refusals
from cli.output import INTERRUPTED, plain_errors
from cli.prepare import prepare
from cli.up import started
from loadtest import (
    bench_disagg,
    bench_memory,
    bench_soak,
    environment,
    plot,
    soak_memory,
    soak_report,
)
from loadtest.bench_disagg import DisaggOptions, Side
from loadtest.bench_memory import MemoryOptions
from loadtest.options import Load
from loadtest.soak_deaths import Schedule
from loadtest.soak_report import SoakOptions, SoakReport
from loadtest.view import view_for
from services.runtime import process

app = typer.Typer(
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
    help="Measure speed, memory and what disaggregation costs, on this machine.",
)

ALWAYS_LOCAL = str(2**31 - 1)
"""coordinator.local_prefill_tokens that no prompt exceeds."""

SOAK_SETTINGS = {"engine.kv_memory_mib": "64", "frontend.stall_seconds": "5"}
"""A KV pool too small for all prompts at once; a frontend that soon misses who is frozen."""

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Model name, or path of a Hugging Face folder or GGUF."),
]
Engine = Annotated[
    str | None, typer.Option("--engine", help="torch, or scripted (no model; for trying things).")
]
Sets = Annotated[
    list[str],
    typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="A setting of the clusters."),
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the numbers here.")]

Plot = Annotated[Path | None, typer.Option("--plot", help="Draw it as a PNG here.")]

Measure = Callable[[asyncio.Event], Awaitable[None]]


app.command()(bench_engine.engine)
app.command()(bench_engine.profile)
app.command()(bench_start.start)


@app.command()
def disagg(
    users: Annotated[
        list[int], typer.Option("--users", "-u", min=1, help="Requests in flight; may be repeated.")
    ] = [1, 4],  # noqa: B006 - typer copies it
    input_tokens: Annotated[str, typer.Option("--input", help="Prompt tokens.")] = "512",
    output_tokens: Annotated[str, typer.Option("--output", help="Output tokens.")] = "64",
    rounds: Annotated[int, typer.Option(min=1, help="Of each side, in turn.")] = 5,
    requests: Annotated[
        int, typer.Option("--requests", "-n", min=1, help="Of a round, for each user.")
    ] = 8,
    threads: Annotated[int, typer.Option(min=1, help="Of each worker, on both sides.")] = 1,
    seed: f.Seed = None,
    model: Model = None,
    engine: Engine = None,
    config: f.Config = None,
    sets: Sets = [],  # noqa: B006
    json_file: Json = None,
) -> None:
    """Compare prefill and decode apart with one process that does both.

    Starts two clusters of the same engine: one decode worker that computes prompts itself, and
    one prefill and one decode worker. They take turns; the ratios say what disaggregation costs
    (or gains) here in TTFT, ITL and CPU time.
    """
    with plain_errors(), plain_refusals():
        file = flags.config(config, os.environ)
        settings = flags.texts(sets, model, engine) | {"engine.threads": str(threads)}
        prepare(file, os.environ, settings, fetch=False)

        async def measure(stop: asyncio.Event) -> None:
            alone = settings | {"coordinator.local_prefill_tokens": ALWAYS_LOCAL}
            single = LocalCluster(prefill=0, settings=alone, config=file)
            apart = LocalCluster(settings=settings, config=file)
            async with _running(single, stop) as one, _running(apart, stop) as two:
                options = DisaggOptions(
                    single=Side(one.address("frontend"), one.pids),
                    apart=Side(two.address("frontend"), two.pids),
                    seed=f.seed(seed),
                    input_tokens=input_tokens,
                    output_tokens=output_tokens,
                    users=tuple(users),
                    rounds=rounds,
                    requests=requests,
                    settings=settings,
                )
                say = Console(stderr=True, highlight=False).print
                report = await bench_disagg.run(options, say=say, stop=stop)
            bench_disagg.show(report, Console())
            if json_file is not None:
                bench_disagg.write(report, json_file)

        raise typer.Exit(_run(measure))


@app.command()
def memory(
    requests: Annotated[
        int, typer.Option("--requests", "-n", min=20, help="How many to make.")
    ] = 2000,
    users: Annotated[
        int, typer.Option("--users", "-u", min=1, help="Of them in flight at once.")
    ] = 8,
    input_tokens: Annotated[str, typer.Option("--input", help="Prompt tokens.")] = "uniform:32:160",
    output_tokens: Annotated[str, typer.Option("--output", help="Output tokens.")] = "uniform:4:16",
    kv_memory_mib: Annotated[
        int, typer.Option(min=1, help="KV pool of each worker: small, so that it fills in warm-up.")
    ] = 64,
    seed: f.Seed = None,
    model: Model = None,
    engine: Engine = None,
    config: f.Config = None,
    sets: Sets = [],  # noqa: B006
    json_file: Json = None,
    plot_file: Plot = None,
) -> None:
    """Watch the memory of every process of a cluster over many requests.

    Growth is the slope after a quarter of the requests, in bytes a request; flat is near 0.
    """
    with plain_errors(), plain_refusals():
        if plot_file is not None:
            plot.check_available()
        file = flags.config(config, os.environ)
        settings = {"engine.kv_memory_mib": str(kv_memory_mib)} | flags.texts(sets, model, engine)
        prepare(file, os.environ, settings, fetch=False)

        async def measure(stop: asyncio.Event) -> None:
            async with _running(LocalCluster(settings=settings, config=file), stop) as cluster:
                options = MemoryOptions(
                    cluster.address("frontend"),
                    cluster.pids,
                    seed=f.seed(seed),
                    requests=requests,
                    users=users,
                    input_tokens=input_tokens,
                    output_tokens=output_tokens,
                    settings=settings,
                )
                shown = Load(users=users, requests=requests, seconds=options.seconds)
                view = view_for(Console(stderr=True), shown)
                report = await bench_memory.run(options, view=view, stop=stop)
            bench_memory.show(report, Console())
            if json_file is not None:
                bench_memory.write(report, json_file)
            if plot_file is not None:
                bench_memory.draw(report, plot_file)

        raise typer.Exit(_run(measure))


@app.command()
def soak(
    minutes: Annotated[float, typer.Option(min=0.05, help="Of load and deaths.")] = 20.0,
    users: Annotated[int, typer.Option("--users", "-u", min=1, help="Requests in flight.")] = 4,
    prefill: Annotated[int, typer.Option(min=2, help="Prefill workers.")] = 2,
    decode: Annotated[int, typer.Option(min=2, help="Decode workers.")] = 2,
    pause: Annotated[
        float, typer.Option(min=0.1, help="Mean seconds from one worker's return to the next harm.")
    ] = 10.0,
    questions: Annotated[int, typer.Option(min=1, help="Different requests.")] = 48,
    input_tokens: Annotated[str, typer.Option("--input", help="Prompt tokens.")] = "uniform:8:320",
    output_tokens: Annotated[str, typer.Option("--output", help="Output tokens.")] = "uniform:4:48",
    seed: f.Seed = None,
    model: Model = None,
    engine: Engine = None,
    config: f.Config = None,
    sets: Sets = [],  # noqa: B006
    json_file: Json = None,
) -> None:
    """Load a cluster for long while its workers are killed, frozen and drained at random.

    Every answer is compared with the undisturbed one; at the end no block and no lease may be
    held, memory must be flat, and no process left. The exit status says whether that is so. With
    --engine scripted it needs no model.
    """
    with plain_errors(), plain_refusals():
        file = flags.config(config, os.environ)
        settings = SOAK_SETTINGS | flags.texts(sets, model, engine)
        prepare(file, os.environ, settings, fetch=False)
        violated: list[str] = []

        async def measure(stop: asyncio.Event) -> None:
            cluster = LocalCluster(
                prefill=prefill, decode=decode, settings=settings, config=file, restart=True
            )
            report: SoakReport | None = None
            bad: tuple[str, ...] = ()
            try:
                async with _running(cluster, stop):
                    options = SoakOptions(
                        cluster.address("frontend"),
                        cluster.address("coordinator"),
                        tuple(n for n in cluster.names if n.startswith(("prefill-", "decode-"))),
                        seed=f.seed(seed),
                        minutes=minutes,
                        users=users,
                        questions=questions,
                        input_tokens=input_tokens,
                        output_tokens=output_tokens,
                        schedule=Schedule(mean_pause=pause),
                        settings=settings,
                    )
                    with Console(stderr=True).status("") as status:
                        report = await bench_soak.run(
                            options, cluster, say=status.update, stop=stop
                        )
            except ClusterError as error:
                if report is None:
                    raise
                bad = (str(error),)
            left = soak_memory.still_running(report.seen)
            report = soak_report.ended(report, (*bad, *(f"left behind: {name}" for name in left)))
            soak_report.show(report, Console())
            if json_file is not None:
                soak_report.write(report, json_file)
            violated.extend(report.violations)

        raise typer.Exit(_run(measure) or (1 if violated else 0))


app.command()(deaths)


@app.command()
def coordinator(
    workers: Annotated[
        int, typer.Option(min=8, help="In the cluster; a quarter of them prefill.")
    ] = 1000,
    blocks: Annotated[int, typer.Option(min=1000, help="KV blocks known, all together.")] = 10**6,
    prompt_tokens: Annotated[int, typer.Option(min=64, help="Of the prompts placed.")] = 4096,
    placements: Annotated[int, typer.Option(min=1, help="In a round.")] = 2000,
    json_file: Json = None,
) -> None:
    """Time the coordinator's decisions: placing, prefix lookup, KV events. Needs no cluster."""
    with plain_errors():
        from loadtest import bench_coordinator

        options = bench_coordinator.Options(workers, blocks, prompt_tokens, placements)
        with Console(stderr=True).status("measuring, for about half a minute"):
            report = bench_coordinator.run(options)
        _show("Coordinator, CPU time", asdict(report), json_file, asdict(options))


def _show(
    title: str, figures: dict[str, Any], json_file: Path | None, options: dict[str, Any]
) -> None:
    """Prints figures by name; writes them with where and how they were made."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    for name, value in figures.items():
        rows = value.items() if isinstance(value, dict) else (("", value),)
        for key, number in rows:
            table.add_row(f"{name} {key}".strip(), f"{number:,.2f}")
    Console().print(table)
    if json_file is not None:
        here = asdict(environment.here())
        made = {"options": options, "environment": here, "figures": figures}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(made, indent=1) + "\n")


def _run(measure: Measure) -> int:
    stopped: list[bool] = []

    async def main(stop: asyncio.Event) -> None:
        await measure(stop)
        stopped.append(stop.is_set())

    return process.run(main) or (INTERRUPTED if stopped[0] else 0)


@asynccontextmanager
async def _running(cluster: LocalCluster, stop: asyncio.Event) -> AsyncIterator[LocalCluster]:
    """The cluster, with a word on what is being waited for. Ends the command if stopped then."""
    with Console(stderr=True).status(f"starting {', '.join(cluster.names)}"):
        if not await started(cluster, stop):
            raise typer.Exit(INTERRUPTED)
    async with AsyncExitStack() as stack:
        stack.push_async_exit(cluster)
        yield cluster
