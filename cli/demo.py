"""`tandem demo`: the whole system once, with a real model, and the proof of what happened."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cli import gateway
from cli.advice import explain
from cli.ask import answer, to_terminal
from cli.cluster import LocalCluster
from cli.output import INTERRUPTED, CommandError
from cli.screen import opened
from cli.up import started, unless
from cli.view import drafts, duration, size
from services.runtime.client import Ask, CallFailedError, Client, End, Piece, Turn
from services.runtime.process import Stop

PROMPT = "What is the capital of Japan?"
EXPECTED = "Tokyo"

FOR_A_SHORT_PROMPT = {
    # Small blocks, so that a question of some thirty tokens fills one that can be reused...
    "engine.block_tokens": "16",
    # ...and every prompt goes to a prefill worker; short ones would stay on the decode worker.
    "coordinator.local_prefill_tokens": "0",
}


@dataclass(frozen=True, slots=True)
class Scene:
    """What a model is shown with. expected: what its answer to PROMPT names; empty: who knows.

    settings: of every process, over FOR_A_SHORT_PROMPT. decode: of the decode workers only.
    drafts: whether it drafts, by multi-token prediction.
    """

    expected: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    decode: Mapping[str, str] = field(default_factory=dict)
    drafts: bool = False


SCENES = {
    "smollm2-135m-instruct": Scene(expected=EXPECTED),
    # Half as many tokens make the same question, so that blocks are halved too. Decode workers are
    # what they are for a large DeepSeek: ranks that share out the experts.
    "tiny-deepseek": Scene(
        expected=EXPECTED,
        settings={"engine.block_tokens": "8"},
        decode={"engine.ranks": "2"},
        drafts=True,
    ),
}

REPORTS_SECONDS = 1.5
"""After which the coordinator has heard from every worker what came of its drafts."""


CURL_SECONDS = 120.0


class DemoFailedError(CommandError):
    """The system ran and did not do what it should."""


@dataclass(slots=True)
class Told:
    """An answer, and when each of its tokens came: seconds since it was asked for."""

    end: End | None = None
    text: str = ""
    arrivals: list[float] = field(default_factory=list)

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens, sorted; tokens of one message have none between them."""
        return sorted(b - a for a, b in itertools.pairwise(self.arrivals))


@dataclass(frozen=True, slots=True)
class Show:
    """What is shown."""

    prompt: str
    prefill: int
    decode: int
    settings: Mapping[str, str]
    config: Path | None
    keep: bool
    model: str = "smollm2-135m-instruct"

    @property
    def scene(self) -> Scene:
        """The model's; a scripted engine stands in for a model without its ranks and knowledge."""
        scene = SCENES.get(self.model, Scene())
        scripted = self.settings.get("engine.kind") == "scripted"
        return Scene(settings=scene.settings) if scripted else scene


async def demo(show: Show, stop: Stop) -> int:
    """Runs it, and returns the exit status.

    Raises DemoFailedError, ClusterError, SettingsError.
    """
    console = Console(highlight=False)
    scene = show.scene
    settings = FOR_A_SHORT_PROMPT | dict(scene.settings) | dict(show.settings)
    decode = {k: v for k, v in scene.decode.items() if k not in show.settings}
    chosen = ", ".join(f"{key}={settings[key]}" for key in FOR_A_SHORT_PROMPT)
    console.print(f"Set for a short prompt: {chosen}", style="dim", soft_wrap=True)
    if decode:
        chosen = ", ".join(f"{key}={value}" for key, value in decode.items())
        console.print(f"Set for decode workers: {chosen}", style="dim", soft_wrap=True)
    with opened() as screen:
        cluster = LocalCluster(
            prefill=show.prefill,
            decode=show.decode,
            settings=settings,
            own={"decode": decode},
            config=show.config,
            gateway=gateway.program(),
            on_event=screen.event,
        )
        if not await started(cluster, stop):
            return INTERRUPTED
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_exit(cluster)
        try:
            told = await unless(stop, _ask_twice(console, cluster, show))
        except CallFailedError as error:
            raise DemoFailedError(f"{explain(error)}\nlogs: {cluster.logs}") from None
        if told is None:
            return INTERRUPTED
        failure = _failure(show, *told) or await unless(stop, _over_http(console, cluster, show))
        if failure:
            raise DemoFailedError(f"{failure}\nlogs: {cluster.logs}")
        if show.keep:
            address = cluster.address("frontend")
            console.print(f"\nIt stays up: tandem chat --address {address}\nCtrl-C ends it.")
            await stop.wait()
    console.print("All processes have ended.", style="dim")
    return 0


async def _ask_twice(console: Console, cluster: LocalCluster, show: Show) -> tuple[Told, Told]:
    coordinators = ",".join(cluster.addresses("coordinator"))
    async with Client(cluster.address("frontend"), coordinators) as client:
        console.print(f"\n> {show.prompt}", style="bold", markup=False)
        first = await _ask(client, show.prompt)
        console.print("\n\n> (the same again)", style="bold")
        again = await _ask(client, show.prompt)
        console.print("\n")
        console.print(_table(first, again))
        if show.scene.drafts:
            await asyncio.sleep(REPORTS_SECONDS)
            for line in drafts(await client.status()):
                console.print(line, soft_wrap=True)
    return first, again


async def _over_http(console: Console, cluster: LocalCluster, show: Show) -> str:
    """The same question by curl, if there is a gateway; what went wrong with it, or nothing."""
    addresses = cluster.addresses("gateway")
    if not addresses:
        console.print(f"\n{gateway.BUILD}.", style="dim")
        return ""
    command = gateway.curl(addresses[0], show.model, show.prompt)
    console.print("\nThe same by HTTP:", gateway.shown(command), soft_wrap=True, markup=False)
    if shutil.which(command[0]) is None:
        console.print("curl is not installed here, so it was not asked.", style="dim")
        return ""
    text = await gateway.asked(command, CURL_SECONDS)
    console.print(text, soft_wrap=True, markup=False)
    expected = show.scene.expected
    if show.prompt == PROMPT and expected not in text:
        return f"what came by HTTP does not name {expected}"
    return ""


async def _ask(client: Client, prompt: str) -> Told:
    told = Told()
    start = time.perf_counter()

    def see(piece: Piece) -> None:
        told.text += piece.text
        told.arrivals += [time.perf_counter() - start] * len(piece.token_ids)
        to_terminal(piece.text)

    ask = Ask([Turn("user", prompt)], sampling={"temperature": 0.0, "max_tokens": 64})
    told.end = await answer(client, ask, see)
    return told


def _failure(show: Show, first: Told, again: Told) -> str:
    """What did not happen that the demo is there to show; empty if all of it did."""
    expected = show.scene.expected
    if show.prompt == PROMPT and expected not in first.text:
        return f"the answer does not name {expected}"
    if show.prefill and not _moved(first):
        return "no KV moved from the prefill worker to the decode worker"
    if again.end is None or again.end.cached_tokens == 0:
        return "the same prompt asked again found nothing cached"
    return ""


def _moved(told: Told) -> int:
    return sum(a.kv_bytes for a in told.end.attempts) if told.end else 0


def _table(first: Told, again: Told) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("first")
    table.add_column("again")
    for (name, one), (_, other) in zip(_figures(first), _figures(again), strict=True):
        table.add_row(name, one, other)
    return table


def _figures(told: Told) -> Iterator[tuple[str, str]]:
    end, gaps = told.end, told.gaps
    assert end is not None
    last = end.attempts[-1]
    yield "time to first token (TTFT)", duration(told.arrivals[0]) if told.arrivals else "-"
    if gaps:
        yield "between tokens (ITL), mean", duration(sum(gaps) / len(gaps))
        yield "between tokens (ITL), p99", duration(gaps[math.ceil(0.99 * len(gaps)) - 1])
        yield "tokens/s after the first", f"{len(gaps) / sum(gaps):.1f}" if sum(gaps) else "-"
    else:
        yield from ((name, "-") for name in ("ITL mean", "ITL p99", "tokens/s"))
    yield "tokens generated", str(end.completion_tokens)
    yield "prompt tokens", str(end.prompt_tokens)
    yield "of them cached", str(end.cached_tokens)
    yield "prefill worker", last.prefill_worker or "-"
    yield "decode worker", last.decode_worker
    yield "KV moved", f"{size(last.kv_bytes)}, blocks: {last.kv_blocks}"
    yield "transport", last.transport or "-"
    yield "transfer took", duration(last.kv_seconds)
    yield "of it exposed after prefill", duration(last.exposed_seconds)
