"""The `tandem` command: every command with its flags and help. What they do is in the modules here.

Each command imports what it needs when it runs, so that `tandem --help` is quick.
"""

from __future__ import annotations

import asyncio
import enum
import importlib
import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cli.output import INTERRUPTED, fail, plain_errors

# gRPC reads this when it is first used. Its handlers of fork(), by which processes are started, can
# abort the child before it is another program; and nothing here goes on with gRPC after a fork.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

EPILOG = (
    "Exit status: 0 all went well, 1 it failed (the words say why), 2 a flag or setting is wrong, "
    "3 the server can't be reached, 130 interrupted. Settings also come from a TOML file (--config "
    "or TANDEM_CONFIG) and from variables such as TANDEM_ENGINE__THREADS=2; `tandem settings` "
    "lists them."
)
"""One line: the terminal's width breaks it."""

LAZY = {
    "models": ("cli.models", "Fetch, check and list models."),
    "adapters": ("cli.adapters", "List, load and unload LoRA adapters."),
    "loadtest": ("cli.loadtest", "Put load on a cluster and measure it."),
    "bench": ("cli.bench", "Measure speed, memory and what disaggregation costs, on this machine."),
}


class Role(enum.StrEnum):
    """Kinds of process."""

    COORDINATOR = "coordinator"
    FRONTEND = "frontend"
    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"
    RANK = "rank"


class Transport(enum.StrEnum):
    """Ways for KV from prefill to decode."""

    SHM = "shm"
    TCP = "tcp"
    NIXL = "nixl"
    UCX = "ucx"


Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Settings file (TOML). Default: $TANDEM_CONFIG."),
]
Set = Annotated[
    list[str],
    typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="A setting; may be repeated."),
]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Model name, or path of a Hugging Face folder or GGUF."),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address", "-a", metavar="HOST:PORT", help="Frontend. Default: as settings say."
    ),
]
MOST_PORT = 65535
Prefill = Annotated[int, typer.Option("--prefill", min=0, help="Prefill workers.")]
Decode = Annotated[int, typer.Option("--decode", min=1, help="Decode workers.")]
Engine = Annotated[
    str | None, typer.Option("--engine", help="torch, or scripted (no model; for trying things).")
]
OneTransport = Annotated[
    Transport | None,
    typer.Option("--transport", help="Move KV by this one and no other. Default: as settings say."),
]
Adapter = Annotated[str | None, typer.Option("--adapter", help="LoRA adapter to ask.")]
Stats = Annotated[bool, typer.Option("--stats", help="Say what it took, and where it ran.")]


class _Group(TyperGroup):
    """A group some of whose commands are whole apps, imported when they are asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *LAZY]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in LAZY:
            return super().get_command(ctx, cmd_name)
        module, help_text = LAZY[cmd_name]
        try:
            command = typer.main.get_command(importlib.import_module(module).app)
        except ModuleNotFoundError as error:
            command = typer.main.get_command(_unavailable(cmd_name, str(error)))
        command.name, command.help = cmd_name, command.help or help_text
        return command


def _unavailable(name: str, why: str) -> typer.Typer:
    missing = typer.Typer(context_settings={"ignore_unknown_options": True})

    @missing.command()
    def unavailable(arguments: list[str] = typer.Argument(None, hidden=True)) -> None:  # noqa: B008
        fail(f"`tandem {name}` is not part of this installation: {why}")

    return missing


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
    help="Serve language models with prefill and decode on separate workers.\n\n"
    "Start with `tandem demo`; then `tandem up` in one terminal and `tandem chat` in another.",
)


@app.command()
def serve(
    role: Annotated[Role, typer.Argument(help="Which process.")],
    config: Config = None,
    sets: Set = [],  # noqa: B006 - typer copies it
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=MOST_PORT, help="Port to listen on; 0 takes a free one."),
    ] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Where coordinators are; several with commas."),
    ] = None,
    model: Model = None,
    name: Annotated[str | None, typer.Option(help="A worker's name in status and logs.")] = None,
    group: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Of a rank: its worker's engine.group_address."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of a rank: which, from 0.")] = None,
    ready_fd: Annotated[int | None, typer.Option(hidden=True)] = None,
    parent_pid: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run one process of a cluster, until SIGTERM or Ctrl-C drains it.

    A cluster by hand, each in its own terminal or on its own machine:

    \b
    tandem serve coordinator --port 7450
    tandem serve prefill --coordinator 127.0.0.1:7450
    tandem serve decode --coordinator 127.0.0.1:7450
    tandem serve frontend --coordinator 127.0.0.1:7450 --port 7400
    """  # noqa: D301 - click's mark for lines to keep
    with plain_errors():
        from cli import flags
        from cli.serve import Parent, run_process

        named = flags.given(
            sets,
            host=("server.host", host),
            port=("server.port", port),
            coordinator=(flags.COORDINATOR_KEY.get(role, "worker.coordinator"), coordinator),
            name=("rank.name" if role is Role.RANK else "worker.name", name),
            group=("rank.group", group),
            rank=("rank.number", rank),
        )
        file = flags.config(config, os.environ)
        parent = Parent(ready_fd, parent_pid)
        raise typer.Exit(run_process(role, file, [*named, *flags.model(model)], parent))


@app.command()
def up(
    prefill: Prefill = 1,
    decode: Annotated[int, typer.Option(min=0, help="Decode workers.")] = 1,
    both: Annotated[int, typer.Option(min=0, help="Workers that are both.")] = 0,
    model: Model = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=0, max=MOST_PORT, help="Of the frontend. Default: 7400; 0 takes a free one."
        ),
    ] = None,
    coordinator_port: Annotated[
        int | None,
        typer.Option(
            min=0, max=MOST_PORT, help="Of the coordinator. Default: 7450; 0 takes a free one."
        ),
    ] = None,
    coordinators: Annotated[
        int, typer.Option(min=1, help="Coordinators; their ports follow the first one's.")
    ] = 1,
    frontends: Annotated[
        int, typer.Option(min=1, help="Frontends; their ports follow the first one's.")
    ] = 1,
    etcd: Annotated[
        bool, typer.Option("--etcd", help="An etcd too, in which processes find each other.")
    ] = False,
    gateway: Annotated[
        bool, typer.Option(help="The HTTP gateway for OpenAI's clients, if it is built.")
    ] = True,
    gateway_port: Annotated[
        int | None,
        typer.Option(
            min=0, max=MOST_PORT, help="Of the gateway. Default: 7480, or with --port 0 a free one."
        ),
    ] = None,
    engine: Engine = None,
    transport: OneTransport = None,
    config: Config = None,
    sets: Annotated[
        list[str],
        typer.Option(
            "--set",
            "-s",
            metavar="[ROLE:]SECTION.KEY=VALUE",
            help="A setting, of all processes or of those of a role; may be repeated.",
        ),
    ] = [],  # noqa: B006
    restart: Annotated[
        bool,
        typer.Option(help="Start processes again that die, or that answer nothing for a minute."),
    ] = True,
    logs: Annotated[
        Path | None,
        typer.Option(
            help="Folder for a log a process. Default: one that is removed at a good end."
        ),
    ] = None,
) -> None:
    """Run a whole cluster on this machine and watch it.

    Ctrl-C drains it and ends every process; a second Ctrl-C ends them at once.

    \b
    tandem up --prefill 2 --decode 2
    tandem up --prefill 1 --decode 2 --set worker.can_be=prefill,decode
    tandem up --model tiny-deepseek --set decode:engine.ranks=2
    tandem up --model ~/models/Llama-3.2-1B --set engine.kv_memory_mib=2048
    tandem up --engine scripted --set engine.scripted_step_seconds=0.02
    tandem up --transport nixl
    tandem up --coordinators 2 --frontends 2 --etcd
    """  # noqa: D301 - click's mark for lines to keep
    with plain_errors():
        from cli import flags
        from cli import gateway as http
        from cli.prepare import prepare
        from cli.up import Plan
        from cli.up import up as run_up
        from services.runtime import process

        if not decode + both:
            raise typer.BadParameter("some worker has to decode: --decode or --both")
        file = flags.config(config, os.environ)
        frontend, coordinator = flags.ports(file, os.environ)
        shared, own = flags.by_role(sets)
        chosen = flags.texts(shared, model, engine, transport)
        prepare(file, os.environ, chosen, fetch=False)
        port = frontend if port is None else port
        if gateway_port is None:
            gateway_port = http.PORT if port else 0
        plan = Plan(
            prefill=prefill,
            decode=decode,
            both=both,
            settings=chosen,
            config=file,
            port=port,
            coordinator_port=coordinator if coordinator_port is None else coordinator_port,
            restart=restart,
            logs=logs,
            coordinators=coordinators,
            frontends=frontends,
            etcd=etcd,
            gateway=http.program() if gateway else None,
            gateway_port=gateway_port,
            own=own,
        )
        raise typer.Exit(process.run(lambda stop: run_up(plan, stop)))


@app.command()
def demo(
    prefill: Prefill = 1,
    decode: Decode = 1,
    model: Model = None,
    prompt: Annotated[str, typer.Option(help="What to ask.")] = "What is the capital of Japan?",
    keep: Annotated[bool, typer.Option("--keep", help="Stay up, for `tandem chat`.")] = False,
    engine: Engine = None,
    transport: OneTransport = None,
    config: Config = None,
    sets: Set = [],  # noqa: B006
) -> None:
    """See the whole system work: a real model, prefill and decode in separate processes.

    Fetches the model if it is not there, starts a cluster, asks a question twice, prints what it
    took and where it ran, and ends. It fails if no KV moved or nothing was cached.
    """
    with plain_errors():
        from cli import flags
        from cli.demo import Show
        from cli.demo import demo as run_demo
        from cli.prepare import prepare
        from services.runtime import process

        file = flags.config(config, os.environ)
        chosen = flags.texts(sets, model, engine, transport)
        named = prepare(file, os.environ, chosen, fetch=True)
        show = Show(prompt, prefill, decode, chosen, file, keep, named)
        raise typer.Exit(process.run(lambda stop: run_demo(show, stop)))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask; - reads it from standard input.")],
    address: Address = None,
    model: Model = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text; no chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", "-n", help="At most.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", "-t")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep this much probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop what is less probable.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answer.")] = None,
    stop: Annotated[list[str], typer.Option(help="End before this text.")] = [],  # noqa: B006
    adapter: Adapter = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="The answer is JSON that the schema in this file allows.")
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="The answer is matched by this regular expression.")
    ] = None,
    choice: Annotated[
        list[str], typer.Option(help="The answer is one of these; may be repeated.")
    ] = [],  # noqa: B006
    grammar: Annotated[
        Path | None, typer.Option(help="The answer follows the Lark grammar in this file.")
    ] = None,
    json_object: Annotated[
        bool, typer.Option("--json-object", help="The answer is a JSON object.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The whole answer as JSON.")] = False,
    stats: Stats = False,
    config: Config = None,
) -> None:
    """Ask once, and see the answer as it comes.

    \b
    tandem generate "What is the capital of Japan?" --temperature 0
    tandem generate "Is the sea salty?" --choice yes --choice no
    tandem generate "Japan's capital, as JSON" --json-schema city.json
    tandem generate --raw "Once upon a time" -n 64 --seed 7 --stats
    cat question.txt | tandem generate -
    """  # noqa: D301 - click's mark for lines to keep
    with plain_errors():
        from cli import ask, flags

        text = sys.stdin.read() if prompt == "-" else prompt
        request = flags.ask(
            None if raw else [("system", system), ("user", text)],
            text,
            model,
            stop,
            adapter,
            flags.form(json_schema, grammar, regex, choice, json_object),
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
        )
        where = address or flags.addresses(config, os.environ)[0]
        _run(ask.generate(where, request, as_json=as_json, stats=stats))


@app.command()
def chat(
    address: Address = None,
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", "-n", help="At most.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", "-t")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answers.")] = None,
    adapter: Adapter = None,
    stats: Stats = False,
    config: Config = None,
) -> None:
    """Talk with a model. Ctrl-C stops an answer; Ctrl-D ends."""
    with plain_errors():
        from cli import ask, flags

        template = flags.ask(
            [("system", system)],
            "",
            model,
            [],
            adapter,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
        )
        ask.chat(address or flags.addresses(config, os.environ)[0], template, stats=stats)


@app.command()
def status(
    coordinator: Annotated[
        str | None,
        typer.Option(
            "--coordinator",
            metavar="HOST:PORT",
            help="One that answers, of several with commas. Default: as settings say.",
        ),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep it current.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="All of it as JSON, once.")] = False,
    config: Config = None,
) -> None:
    """Show workers, their load, their KV pools, how KV moved, and what the coordinator decided."""
    with plain_errors():
        from cli import found
        from cli import status as module

        given = None if coordinator is None else found.named([coordinator])
        where = given or found.coordinators(config, os.environ)
        _run(module.watch(where) if watch else module.show(where, as_json=as_json))


@app.command()
def explain(
    request_id: Annotated[str, typer.Argument(help="As the answer, or the error, names it.")],
    coordinator: Annotated[
        list[str],
        typer.Option(
            "--coordinator",
            metavar="HOST:PORT",
            help="Several with commas; all are asked, and those that they know of. Default: as "
            "settings say.",
        ),
    ] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="All of it as JSON.")] = False,
    config: Config = None,
) -> None:
    """Say why a request went where it did, what it waited for, or why it was refused."""
    with plain_errors():
        from cli import explain as module
        from cli import found

        module.check_request_id(request_id)
        given = found.named(coordinator) if coordinator else None
        where = given or found.coordinators(config, os.environ)
        _run(module.show(where, request_id, as_json=as_json))


@app.command()
def settings(
    process: Annotated[Role | None, typer.Argument(help="Only what this process reads.")] = None,
    config: Config = None,
    sets: Set = [],  # noqa: B006
) -> None:
    """Print every setting: value, where it came from, what it means."""
    with plain_errors():
        from cli import flags
        from cli.settings import print_settings

        file = flags.config(config, os.environ)
        print_settings(process, file, os.environ, flags.given(sets))


@app.command()
def version() -> None:
    """Print the versions of Tandem and of what it runs on."""
    from cli.version import lines

    print("\n".join(lines()))


def _run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def main() -> None:
    """Runs the command line."""
    try:
        app(prog_name="tandem")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
