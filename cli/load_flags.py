"""The flags of `tandem loadtest`, and what they mean together."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from loadtest.errors import OptionsError
from loadtest.lengths import ALLOWED
from loadtest.measures import Slo
from loadtest.options import ArrivalProcess, Load, Loop

LOAD = "Load"
WORK = "What is asked"
MEASURE = "What is measured"
OUTPUT = "Output"

Address = Annotated[
    str | None,
    typer.Option(
        "--address", "-a", metavar="HOST:PORT", help="Frontend. Default: as settings say."
    ),
]
Model = Annotated[
    str, typer.Option("--model", "-m", help="Name of the model. Default: the only one served.")
]
Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Settings file (TOML). Default: $TANDEM_CONFIG."),
]

Rate = Annotated[
    float | None,
    typer.Option(min=1e-6, rich_help_panel=LOAD, help="Open loop: this many requests a second."),
]
Arrivals = Annotated[
    ArrivalProcess,
    typer.Option(
        rich_help_panel=LOAD,
        help="Open loop: how requests arrive. trace: at the times recorded in --trace.",
    ),
]
Users = Annotated[
    int | None,
    typer.Option(
        "--users",
        "-u",
        min=1,
        rich_help_panel=LOAD,
        help=f"Closed loop: requests in flight at once. Without --rate: {Load().users}.",
    ),
]
Think = Annotated[
    float,
    typer.Option(min=0, rich_help_panel=LOAD, help="Closed loop: mean pause of a user, seconds."),
]
Requests = Annotated[
    int, typer.Option("--requests", "-n", min=1, rich_help_panel=LOAD, help="At most this many.")
]
Seconds = Annotated[
    float, typer.Option(min=0.001, rich_help_panel=LOAD, help="No request starts later.")
]
FinishSeconds = Annotated[
    float,
    typer.Option(
        min=0, rich_help_panel=LOAD, help="After that, time to end before the rest is cut off."
    ),
]
Timeout = Annotated[
    float, typer.Option(min=0.001, rich_help_panel=LOAD, help="Deadline of a request, seconds.")
]
Warmup = Annotated[
    int, typer.Option(min=0, rich_help_panel=LOAD, help="Requests before measuring begins.")
]
Speed = Annotated[
    float, typer.Option(min=1e-6, rich_help_panel=LOAD, help="Plays a trace's times faster.")
]
Jitter = Annotated[
    float,
    typer.Option(
        min=0,
        rich_help_panel=LOAD,
        help="Spreads a trace's times by up to this many of its seconds (3 for Mooncake's).",
    ),
]

Input = Annotated[
    str, typer.Option("--input", rich_help_panel=WORK, help=f"Prompt tokens: {ALLOWED}.")
]
Output = Annotated[
    str, typer.Option("--output", rich_help_panel=WORK, help="Output tokens, likewise.")
]
Prefix = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE:TOKENS[:COUNT]",
        rich_help_panel=WORK,
        help="This share of the prompts begins with one of COUNT (1) common prefixes of TOKENS.",
    ),
]
Trace = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=WORK,
        help="Lengths and shared prefixes of a recorded trace: Azure .csv or Mooncake .jsonl.",
    ),
]
Scale = Annotated[
    float, typer.Option(min=1e-6, rich_help_panel=WORK, help="Multiplies a trace's lengths.")
]
MaxInput = Annotated[
    int | None, typer.Option(min=1, rich_help_panel=WORK, help="Cuts a trace's prompts.")
]
MaxOutput = Annotated[
    int | None, typer.Option(min=1, rich_help_panel=WORK, help="Cuts a trace's outputs.")
]
Vocabulary = Annotated[
    tuple[int, int],
    typer.Option(
        metavar="FIRST END", rich_help_panel=WORK, help="Prompts' token ids, FIRST <= id < END."
    ),
]
Temperature = Annotated[
    float, typer.Option("--temperature", "-t", min=0, rich_help_panel=WORK, help="0 is greedy.")
]
TopK = Annotated[
    int | None, typer.Option(min=0, rich_help_panel=WORK, help="Keep the k most probable tokens.")
]
TopP = Annotated[
    float | None,
    typer.Option(min=0, max=1, rich_help_panel=WORK, help="Keep this much probability."),
]
StopAtEos = Annotated[
    bool,
    typer.Option(
        "--stop-at-eos",
        rich_help_panel=WORK,
        help="Answers may end early. Without it their lengths are exact.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=2**63 - 1,
        rich_help_panel=WORK,
        help="Repeats a run's prompts and arrivals, and finds them cached. Default: a new one.",
    ),
]

SloTtft = Annotated[
    float | None,
    typer.Option(
        "--slo-ttft-ms", min=0, rich_help_panel=MEASURE, help="Goodput: first token within this."
    ),
]
SloTpot = Annotated[
    float | None,
    typer.Option(
        "--slo-tpot-ms", min=0, rich_help_panel=MEASURE, help="Goodput: time per later token."
    ),
]
Coordinator = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        rich_help_panel=MEASURE,
        help="Asked which workers run on this machine, to measure their CPU time. "
        "Default: as settings say, unless --address is given.",
    ),
]
Pids = Annotated[
    list[str],
    typer.Option(
        "--pid",
        metavar="NAME=PID",
        rich_help_panel=MEASURE,
        help="Measure this process too; may be repeated.",
    ),
]
Json = Annotated[
    Path | None, typer.Option("--json", rich_help_panel=OUTPUT, help="Write the report here.")
]
Rows = Annotated[
    bool, typer.Option("--rows", rich_help_panel=OUTPUT, help="With one row for each request.")
]
Plot = Annotated[
    Path | None, typer.Option("--plot", rich_help_panel=OUTPUT, help="Draw it as a PNG here.")
]
Compare = Annotated[
    tuple[Path, Path] | None,
    typer.Option(
        metavar="A.json B.json",
        rich_help_panel=OUTPUT,
        help="Put no load on anything: print two reports side by side, with ratios.",
    ),
]


def loop(rate: float | None, arrivals: ArrivalProcess, users: int | None, think: float) -> Loop:
    """Which loop is meant. Raises OptionsError."""
    is_open = rate is not None or arrivals == "trace"
    if is_open and (users is not None or think):
        raise OptionsError("an open loop (--rate, --arrivals trace) has no --users or --think")
    if rate is not None and arrivals == "trace":
        raise OptionsError("--arrivals trace has times of its own: use --speed, not --rate")
    if not is_open and arrivals == "constant":
        raise OptionsError("--arrivals constant is for an open loop: add --rate")
    return "open" if is_open else "closed"


def prefix(text: str | None) -> tuple[float, int, int]:
    """Share, tokens and number of common prefixes. Raises OptionsError."""
    if text is None:
        return 0.0, 0, 1
    try:
        share, tokens, *more = text.split(":")
        (count,) = more or ["1"]
        found = float(share), int(tokens), int(count)
    except ValueError:
        found = (0.0, 0, 0)
    if not (0 < found[0] <= 1 and found[1] >= 1 and found[2] >= 1):
        raise OptionsError(f"--prefix {text}; write SHARE:TOKENS[:COUNT], as in 0.5:256:4")
    return found


def slo(ttft_ms: float | None, tpot_ms: float | None) -> Slo | None:
    """What a user is content with; None if nothing was said."""
    if ttft_ms is None and tpot_ms is None:
        return None
    ttft, tpot = (None if ms is None else ms / 1e3 for ms in (ttft_ms, tpot_ms))
    return Slo(ttft, tpot)


def pids(texts: Sequence[str]) -> dict[str, int]:
    """Processes by name. Raises OptionsError."""
    found = {}
    for text in texts:
        name, _, pid = text.partition("=")
        if not name or not pid.isdecimal():
            raise OptionsError(f"--pid {text}; write NAME=PID, as in frontend=4711")
        found[name] = int(pid)
    return found


def seed(given: int | None) -> int:
    """A new one unless given: prompts that were asked before would be cached."""
    return secrets.randbits(32) if given is None else given
