"""`tandem loadtest`: flags in, a measured run out. The work is in the package loadtest."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import typer
from rich.console import Console

from cli import flags
from cli import load_flags as f
from cli.output import FAILED, INTERRUPTED, USAGE, fail, plain_errors
from loadtest import local, plot, report, session, tables
from loadtest.drive import Ended
from loadtest.errors import LoadTestError, OptionsError
from loadtest.options import Load, LoadOptions, Prompts
from loadtest.view import view_for
from loadtest.workload import SamplingSpec
from services.runtime import process

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode="rich", add_completion=False)

LOAD, PROMPTS = Load(), Prompts()
"""Defaults."""

NO_COORDINATOR = (
    "CPU time of the cluster is not measured: with --address, say where its --coordinator is"
)


@app.command()
def loadtest(
    address: f.Address = None,
    model: f.Model = "",
    config: f.Config = None,
    rate: f.Rate = None,
    arrivals: f.Arrivals = "poisson",
    users: f.Users = None,
    think: f.Think = 0.0,
    requests: f.Requests = LOAD.requests,
    seconds: f.Seconds = LOAD.seconds,
    finish_seconds: f.FinishSeconds = LOAD.finish_seconds,
    timeout: f.Timeout = LOAD.timeout_seconds,
    warmup: f.Warmup = LOAD.warmup,
    speed: f.Speed = 1.0,
    jitter: f.Jitter = 0.0,
    input_tokens: f.Input = PROMPTS.input_tokens,
    output_tokens: f.Output = PROMPTS.output_tokens,
    prefix: f.Prefix = None,
    trace: f.Trace = None,
    scale: f.Scale = 1.0,
    max_input: f.MaxInput = None,
    max_output: f.MaxOutput = None,
    vocabulary: f.Vocabulary = (PROMPTS.first_token, PROMPTS.end_token),
    temperature: f.Temperature = 0.0,
    top_k: f.TopK = None,
    top_p: f.TopP = None,
    stop_at_eos: f.StopAtEos = False,
    seed: f.Seed = None,
    slo_ttft_ms: f.SloTtft = None,
    slo_tpot_ms: f.SloTpot = None,
    coordinator: f.Coordinator = None,
    pids: f.Pids = [],  # noqa: B006 - typer copies it
    json_file: f.Json = None,
    rows: f.Rows = False,
    plot_file: f.Plot = None,
    compare: f.Compare = None,
) -> None:
    """Put load on a cluster and measure what its users would see.

    Latencies count from when a request should have started; docs/loadtest.md defines every term.
    A run ends by itself. Ctrl-C ends it early, and it still reports. Exit status 1 if no request
    succeeded.

    \b
    tandem loadtest --users 8 --input 512 --output 128
    tandem loadtest --rate 2 --seconds 120 --slo-ttft-ms 500 --slo-tpot-ms 50 --json a.json
    tandem loadtest --trace conversation.jsonl --arrivals trace --speed 10 --scale 0.05
    tandem loadtest --compare a.json b.json --plot ab.png
    """  # noqa: D301 - click's mark for lines to keep
    with plain_errors(), plain_refusals():
        if plot_file is not None:
            plot.check_available()
        if compare is not None:
            return _compare(compare, plot_file)
        if rows and json_file is None:
            raise OptionsError("--rows are written to the report: say where, with --json")
        frontend, known_coordinator = flags.addresses(config, os.environ)
        share, tokens, count = f.prefix(prefix)
        options = LoadOptions(
            address=address or frontend,
            seed=f.seed(seed),
            model=model,
            load=Load(
                loop=f.loop(rate, arrivals, users, think),
                users=users or LOAD.users,
                think_seconds=think,
                arrivals=arrivals,
                rate=rate or 0.0,
                speed=speed,
                jitter_seconds=jitter,
                requests=requests,
                seconds=seconds,
                finish_seconds=finish_seconds,
                timeout_seconds=timeout,
                warmup=warmup,
            ),
            prompts=Prompts(
                input_tokens=input_tokens,
                output_tokens=output_tokens,
                prefix_share=share,
                prefix_tokens=tokens,
                prefixes=count,
                trace=str(trace or ""),
                scale=scale,
                max_input=max_input,
                max_output=max_output,
                first_token=vocabulary[0],
                end_token=vocabulary[1],
                sampling=SamplingSpec(temperature, top_k, top_p, not stop_at_eos),
            ),
            slo=f.slo(slo_ttft_ms, slo_tpot_ms),
            pids=f.pids(pids),
            rows=rows,
        )
        asked = coordinator or (known_coordinator if address is None else None)
        raise typer.Exit(_run(options, asked, json_file, plot_file))


@contextmanager
def plain_refusals() -> Iterator[None]:
    """Turns what a load test refuses to do into words and an exit status."""
    try:
        yield
    except LoadTestError as error:
        fail(str(error), USAGE if isinstance(error, OptionsError) else FAILED)


def _compare(files: tuple[Path, Path], plot_file: Path | None) -> None:
    first, second = (report.read(file) for file in files)
    tables.compare(first, second, Console())
    if plot_file is not None:
        plot.draw([(files[0].name, first), (files[1].name, second)], plot_file)


def _run(
    options: LoadOptions, coordinator: str | None, json_file: Path | None, plot_file: Path | None
) -> int:
    found: list[report.Report] = []

    async def main(stop: asyncio.Event) -> None:
        found.append(await measure(options, coordinator, stop))

    status = process.run(main)
    if status:  # a second Ctrl-C: there is nothing to report
        return status
    (result,) = found
    tables.show(result, Console())
    if json_file is not None:
        report.write(result, json_file)
        print(f"report: {json_file}")
    if plot_file is not None:
        plot.draw([(result.model, result)], plot_file)
        print(f"plot: {plot_file}")
    if result.ended_by is Ended.INTERRUPTED:
        return INTERRUPTED
    return 0 if result.numbers.counts.succeeded else FAILED


async def measure(
    options: LoadOptions, coordinator: str | None, stop: asyncio.Event
) -> report.Report:
    """A load test that is shown on standard error and measures the cluster's local processes."""
    notes: tuple[str, ...] = (NO_COORDINATOR,)
    if coordinator is not None:
        here = await local.find(options.address, coordinator)
        options, notes = replace(options, pids=here.pids | dict(options.pids)), here.notes
    view = view_for(Console(stderr=True), options.load)
    result = await session.run(options, view=view, stop=stop)
    return replace(result, notes=notes + result.notes)
