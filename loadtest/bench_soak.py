"""A soak: random load and random deaths for a long time, and then a look at what is left.

First every question of a pool is asked while nothing is disturbed. Then users ask them at random
while workers are killed, frozen and drained, one at a time. Whatever comes is compared with the
undisturbed answer. At the end, with nobody asking any more, every worker must report that it holds
no block and no lease, and memory must not have grown.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loadtest import environment, lengths, soak_load
from loadtest.soak_deaths import Cluster, Death, Deaths, Schedule, process_of
from loadtest.soak_load import Load, Question, Shares, Tally
from loadtest.soak_memory import Identity, Trend, Watch
from loadtest.wire import InferenceClient, context_tokens
from loadtest.workload import SamplingSpec, Synthetic, Workload
from services.runtime.channels import Channels
from services.runtime.client import CallFailedError, Client, Status

SCHEMA = "tandem.bench.soak/1"
LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class SoakOptions:
    """Which cluster, how much, how long."""

    frontend: str
    coordinator: str
    """host:port of both."""
    workers: tuple[str, ...]
    """Names of the processes that may be harmed; at least two of each role."""
    seed: int
    minutes: float = 20.0
    """Of load and deaths; taking the answers before and looking for rests after comes on top."""
    users: int = 4
    questions: int = 48
    input_tokens: str = "uniform:8:320"
    output_tokens: str = "uniform:4:48"
    prefix: tuple[float, int, int] = (0.5, 96, 4)
    """Share of the prompts with a common prefix, its tokens, how many there are."""
    shares: Shares = field(default_factory=Shares)
    schedule: Schedule = field(default_factory=Schedule)
    timeout_seconds: float = 120.0
    """Of a request that nobody gives up."""
    quiet_seconds: float = 90.0
    """For everything to be given back; longer than a lease."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """How the cluster was started, for the report."""


@dataclass(frozen=True, slots=True)
class SoakReport:
    """What was done, and what came of it."""

    options: SoakOptions
    environment: environment.Environment
    model: str
    seconds: float
    """Of load."""
    tally: Tally
    deaths: tuple[Death, ...]
    rest: tuple[str, ...]
    """What workers still had at the end."""
    quiet_after: float | None
    """Seconds from the last request's end until all was given back; None: it was not."""
    memory: tuple[Trend, ...]
    seen: tuple[Identity, ...]
    """Every process that there was."""
    bad_ends: tuple[str, ...] = ()
    """Processes that did not end in good order, or were left behind."""
    interrupted: bool = False

    @property
    def violations(self) -> tuple[str, ...]:
        """What should not have been, in words."""
        return tuple(_violations(self))


def _violations(report: SoakReport) -> Iterator[str]:
    tally = report.tally
    if tally.wrong:
        yield f"{tally.wrong} requests differed: {'; '.join(tally.wrong_examples)}"
    for reason, count in tally.failed.items():
        yield f"{count} requests failed with {reason}: {tally.failures[reason]}"
    if not tally.answered:
        yield "no request was answered"
    for death in report.deaths:
        if death.back_after is None:
            yield f"{death.worker}, {death.harm} at {death.at:.0f} s, did not come back"
    yield from report.rest
    for trend in report.memory:
        if trend.flat is False:
            yield f"memory of {trend.name} grows by {trend.bytes_per_minute / 2**20:.2f} MiB/min"
    yield from report.bad_ends


async def run(
    options: SoakOptions,
    cluster: Cluster,
    *,
    say: Callable[[str], None],
    stop: asyncio.Event,
    clock: Callable[[], float] = time.monotonic,
) -> SoakReport:
    """Soaks a cluster that restarts what dies. Setting `stop` ends the load early.

    Raises LoadTestError, CallFailedError. However it ends, no process is left frozen.
    """
    before = environment.here()
    channels = Channels()
    try:
        model, _ = await context_tokens(channels, options.frontend, "")
        questions = list(_questions(options, channels, model, clock))
        count = len(questions)
        answers = await soak_load.references(
            questions,
            options.users,
            options.timeout_seconds,
            lambda done: say(f"undisturbed answers: {done} of {count}"),
        )
        load = Load(
            questions,
            answers,
            options.shares,
            timeout_seconds=options.timeout_seconds,
            clock=clock,
        )
        async with Client(options.frontend, options.coordinator) as client:
            soak = _Soak(options, cluster, client, load, say, clock)
            began = clock()
            await soak.disturb(stop)
            seconds = clock() - began
            quiet_after, rest = await soak.settle()
    finally:
        await channels.close()
    return SoakReport(
        options=options,
        environment=before,
        model=model,
        seconds=seconds,
        tally=load.tally,
        deaths=tuple(soak.deaths.done),
        rest=rest,
        quiet_after=quiet_after,
        memory=soak.watch.trends(cluster.pids),
        seen=soak.watch.seen,
        interrupted=stop.is_set(),
    )


def _questions(
    options: SoakOptions, channels: Channels, model: str, clock: Callable[[], float]
) -> Iterator[Question]:
    """Greedy and sampled ones in turn."""
    source = Synthetic(
        lengths.parse(options.input_tokens), lengths.parse(options.output_tokens), *options.prefix
    )
    kinds = [SamplingSpec(), SamplingSpec(temperature=0.9, top_k=50, top_p=0.95)]
    clients = [
        InferenceClient(
            channels.get(options.frontend),
            model=model,
            sampling=kind,
            timeout_seconds=options.timeout_seconds,
            clock=clock,
        )
        for kind in kinds
    ]
    workload = Workload(source, options.seed, first_token=100, end_token=30_000)
    for index in range(options.questions):
        yield Question(workload.request(index), clients[index % len(clients)])


class _Soak:
    """The load, the deaths and the looks at a running cluster."""

    def __init__(
        self,
        options: SoakOptions,
        cluster: Cluster,
        client: Client,
        load: Load,
        say: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self.watch = Watch()
        self.deaths = Deaths(
            cluster,
            self._present,
            options.schedule,
            rng=random.Random(f"{options.seed} deaths"),
            clock=clock,
        )
        self._options = options
        self._cluster = cluster
        self._client = client
        self._load = load
        self._say = say
        self._clock = clock

    async def disturb(self, stop: asyncio.Event) -> None:
        """Load and deaths for the time there is; returns when every request has ended."""
        over = asyncio.Event()
        options = self._options
        async with asyncio.TaskGroup() as group:
            looking = group.create_task(self._keep_looking(stop, over))
            harming = group.create_task(self.deaths.run(frozenset(options.workers), over))
            users = [
                group.create_task(
                    self._load.user(random.Random(f"{options.seed} user {number}"), over)
                )
                for number in range(options.users)
            ]
            await asyncio.wait([looking, harming, *users])

    async def settle(self) -> tuple[float | None, tuple[str, ...]]:
        """Waits until nothing is held by anyone: after how long, or what is left.

        Twice in a row: what workers report is older than the question by a heartbeat.
        """
        began, clean = self._clock(), 0
        while True:
            try:
                rest = _rest(await self._client.status(), self._options.workers)
            except CallFailedError as error:
                rest = (f"the coordinator does not answer: {error.message}",)
            waited = self._clock() - began
            self.watch.look(self._cluster.pids, self._clock())
            clean = 0 if rest else clean + 1
            if clean == 2:
                return waited, ()
            if rest and waited > self._options.quiet_seconds:
                return None, rest
            self._say(f"waiting for everything to be given back: {', '.join(rest[:1])}")
            await asyncio.sleep(LOOK_SECONDS)

    async def _keep_looking(self, stop: asyncio.Event, over: asyncio.Event) -> None:
        began = self._clock()
        end = began + 60 * self._options.minutes
        while self._clock() < end and not stop.is_set():
            self.watch.look(self._cluster.pids, self._clock())
            tally = self._load.tally
            self._say(
                f"{end - self._clock():.0f} s to go: {tally.asked} requests, "
                f"{sum(tally.failed.values())} failed, {tally.wrong} wrong, "
                f"{len(self.deaths.done)} deaths"
            )
            await asyncio.sleep(LOOK_SECONDS)
        over.set()

    async def _present(self) -> frozenset[str]:
        """Ids of the workers that the coordinator counts on."""
        try:
            status = await self._client.status()
        except CallFailedError:
            return frozenset()
        return frozenset(w.worker_id for w in status.workers if not w.draining)


def _rest(status: Status, names: tuple[str, ...]) -> tuple[str, ...]:
    """What is held although nobody asks for anything, in words."""
    rest = [
        f"{worker.worker_id} has {number} {what}"
        for worker in status.workers
        for what, number in (
            ("blocks held", worker.held_blocks),
            ("leases", worker.leases),
            ("requests running", worker.running),
            ("requests waiting", worker.waiting),
        )
        if number
    ]
    missing = set(names) - {process_of(worker.worker_id) for worker in status.workers}
    rest += [f"{name} is missing" for name in sorted(missing)]
    if status.queued:
        rest.append(f"the coordinator has {status.queued} requests queued")
    return tuple(rest)


def ended(report: SoakReport, bad_ends: tuple[str, ...]) -> SoakReport:
    """The report, once the cluster has ended."""
    return replace(report, bad_ends=bad_ends)


def show(report: SoakReport, console: Console) -> None:
    """Prints what was done and what came of it."""
    title = f"Soak of {report.model}, {report.seconds / 60:.1f} minutes, seed {report.options.seed}"
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    for name, value in soak_load.words(report.tally).items():
        table.add_row(name, value)
    harms = [
        f"{sum(d.harm is h for d in report.deaths)} {h}" for h in {d.harm for d in report.deaths}
    ]
    table.add_row("workers harmed", f"{len(report.deaths)}: {', '.join(sorted(harms))}")
    back = [d.back_after for d in report.deaths if d.back_after is not None]
    table.add_row("longest until back", f"{max(back):.1f} s" if back else "-")
    quiet = report.quiet_after
    table.add_row("nothing held after", "never" if quiet is None else f"{quiet:.1f} s")
    console.print(table)
    console.print(_memory(report.memory))
    for words in report.violations:
        console.print(f"violated: {words}", style="red", markup=False)
    if not report.violations:
        console.print("nothing was violated", style="green")


def _memory(trends: tuple[Trend, ...]) -> Table:
    title = "Private memory of the last processes, from a quarter of their time on"
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("", "seconds", "MiB", "at the end", "MiB/min", ""):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for trend in trends:
        verdict = {True: "flat", False: "grows", None: "too short"}[trend.flat]
        sizes = (f"{size / 2**20:.1f}" for size in (trend.first_bytes, trend.last_bytes))
        growth = f"{trend.bytes_per_minute / 2**20:+.2f}"
        table.add_row(trend.name, f"{trend.seconds:.0f}", *sizes, growth, verdict)
    return table


def write(report: SoakReport, path: Path) -> None:
    """As JSON. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"schema": SCHEMA, **asdict(report), "violations": report.violations}
    path.write_text(json.dumps(found, indent=1) + "\n")
