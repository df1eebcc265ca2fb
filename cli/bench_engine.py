"""`tandem bench engine`, `profile` and `start`: the embedded engine alone, without a cluster."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from cli import flags
from cli.loadtest import plain_refusals
from cli.output import CommandError, plain_errors
from loadtest import environment, plot

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Model name, or path of a Hugging Face folder or GGUF."),
]
Shape = Annotated[
    Literal["tiny", "medium"] | None,
    typer.Option("--shape", help="A random DeepSeek V3 of this size, instead of a model."),
]
Dtype = Annotated[
    Literal["bfloat16", "float32"], typer.Option("--dtype", help="Of weights and activations.")
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Default: this machine's cores.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the numbers here.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw it as a PNG here.")]
Batches = Annotated[
    list[int] | None,
    typer.Option("--batch", "-b", min=1, help="Sequences; may be repeated. Default: 1, 8, 32."),
]


def engine(
    model: Model = None,
    shape: Shape = None,
    dtype: Dtype = "bfloat16",
    threads: Threads = None,
    prompts: Annotated[
        list[int] | None,
        typer.Option("--prompt", min=2, help="Of prefill, tokens. Default: 512, 4096."),
    ] = None,
    contexts: Annotated[
        list[int] | None,
        typer.Option("--context", min=2, help="Of decode, tokens. Default: 128, 512, 2048."),
    ] = None,
    batches: Batches = None,
    kv: Annotated[
        list[str] | None, typer.Option("--kv", help="KV dtypes. Default: fp8_e4m3.")
    ] = None,
    loose: Annotated[bool, typer.Option("--loose", help="Without batch invariance too.")] = False,
    int4: Annotated[bool, typer.Option("--int4", help="With int4 weights too.")] = False,
    llama_cpp: Annotated[
        Path | None,
        typer.Option("--llama-cpp", metavar="FOLDER", help="Folder of libllama, a second peer."),
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Each subject's, in turn.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One round, prompts of 512, contexts of 128.")
    ] = False,
    json_file: Json = None,
    plot_file: Plot = None,
) -> None:
    """Compare the embedded engine with Hugging Face transformers, and with llama.cpp.

    Same weights, threads and process, in turns: tokens a second of prefill and of decode. Needs
    the extra `peer`. Takes many minutes; --quick takes a few.
    """
    with plain_errors(), plain_refusals():
        if plot_file is not None:
            plot.check_available()
        if importlib.util.find_spec("transformers") is None:
            raise CommandError("transformers is missing: pip install 'tandem-serving[torch,peer]'")
        from loadtest import bench_engine, engine_report

        given = _subject(model, shape, dtype, threads)
        given |= bench_engine.QUICK if quick else {}
        named = {"prompts": prompts, "contexts": contexts, "batches": batches, "kv_dtypes": kv}
        given |= {name: tuple(values) for name, values in named.items() if values}
        given |= {"rounds": rounds} if rounds else {}
        given |= {"loose": loose, "int4": int4, "llama_cpp": llama_cpp}
        with Console(stderr=True).status("loading") as status:
            report = bench_engine.run(engine_report.EngineBenchOptions(**given), status.update)
        engine_report.show(report, Console())
        if json_file is not None:
            engine_report.write(report, json_file)
        if plot_file is not None:
            engine_report.draw(report, plot_file)


def _subject(
    model: str | None, shape: str | None, dtype: str, threads: int | None
) -> dict[str, Any]:
    """Which model, and how it is computed, by option."""
    places = {"model.name": "model", "model.path": "path"}
    given: dict[str, Any] = {places[flag.key]: flag.value for flag in flags.model(model)}
    if shape and model:
        raise CommandError("--shape makes a model of its own: leave --model out")
    given |= {"shape": shape} if shape else {}
    return given | {"dtype": dtype, "threads": threads or environment.here().cores}


def profile(
    model: Model = None,
    shape: Shape = None,
    dtype: Dtype = "bfloat16",
    threads: Threads = None,
    batches: Batches = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens of each prompt.")] = 128,
    steps: Annotated[int, typer.Option(min=8, help="Decode steps at each batch.")] = 60,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy.")] = 0.8,
    sets: Annotated[
        list[str], typer.Option("--set", "-s", metavar="ENGINE.KEY=VALUE", help="Of the engine.")
    ] = [],  # noqa: B006 - typer copies it
    json_file: Json = None,
) -> None:
    """Show where an engine step's time goes: linear layers, attention, experts, sampling, Python.

    Runs the whole engine in this process. What it calls is wrapped for the while: serving pays
    nothing for it.
    """
    with plain_errors(), plain_refusals():
        from loadtest import bench_profile

        given = _subject(model, shape, dtype, threads)
        given |= {"batches": tuple(batches)} if batches else {}
        settings = {}
        for flag in flags.given(sets):
            section, _, name = flag.key.partition(".")
            if section != "engine":
                raise CommandError(f"--set {flag.key}: only settings of the engine can be given")
            settings[name] = str(flag.value)
        options = bench_profile.ProfileOptions(
            **given, context=context, steps=steps, temperature=temperature, settings=settings
        )
        with Console(stderr=True).status("loading") as status:
            report = bench_profile.run_now(options, status.update)
        bench_profile.show(report, Console())
        if json_file is not None:
            bench_profile.write(report, json_file)
