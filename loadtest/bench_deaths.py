"""Every process of a cluster dies under load, one after the other, and what users see of it.

The cluster has at least two of everything but etcd. First the questions are asked while nothing
is disturbed: for their answers, and for how long tokens take then. Then, under steady load, each
process in turn is killed, and started again a little later; coordinators are also stopped, and
killed all at once; etcd also loses all it knew.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from loadtest import deaths_report, environment, lengths
from loadtest.deaths_load import Asked, Question, Users
from loadtest.deaths_report import DeathsReport, Row
from loadtest.wire import InferenceClient, context_tokens
from loadtest.workload import SamplingSpec, Synthetic, Workload
from services.runtime.channels import Channels
from services.runtime.client import CallFailedError, Client
from services.runtime.errors import CoordinatorUnavailableError

LOOK_SECONDS = 0.05
BACK_SECONDS = 90.0
"""What is not back so long after it was started again is not coming back."""
WORKERS = ("prefill", "decode")


class Cluster(Protocol):
    """A local cluster whose processes are named by role, and numbered where there are several."""

    @property
    def names(self) -> Sequence[str]:
        """Of all processes."""

    @property
    def pids(self) -> Mapping[str, int]:
        """Of those that run."""

    @property
    def etcd_data(self) -> Path | None:
        """Where etcd keeps what it knows."""

    def addresses(self, role: str) -> Sequence[str]:
        """host:port of all processes of a role."""

    def kill(self, name: str, number: int) -> None:
        """Sends a signal."""

    async def restart(self, name: str) -> None:
        """Starts a process again that has ended; returns when it is ready."""


@dataclass(frozen=True, slots=True)
class DeathsOptions:
    """How much, and how long. Seconds."""

    seed: int
    users: int = 8
    questions: int = 24
    input_tokens: str = "uniform:8:200"
    output_tokens: str = "uniform:60:160"
    down_seconds: float = 2.0
    """From the death to the start."""
    stopped_seconds: float = 6.0
    """From SIGSTOP to SIGCONT."""
    calm_seconds: float = 3.0
    """From one process's return to the next one's death."""
    timeout_seconds: float = 60.0
    """Of a request."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """How the cluster was started, for the report."""


@dataclass(frozen=True, slots=True)
class Harm:
    """What is done, to whom."""

    what: str
    victims: tuple[str, ...]
    stopped: bool = False
    """SIGSTOP and SIGCONT instead of SIGKILL and a start."""
    forgets: bool = False
    """What it knew is gone."""


def harms(names: Sequence[str]) -> Iterator[Harm]:
    """All that is done to a cluster of these processes, in order."""
    coordinators = tuple(n for n in names if n.startswith("coordinator"))
    for name in names:
        if name != "etcd":
            yield Harm(f"{name} killed", (name,))
    for name in coordinators:
        yield Harm(f"{name} stopped", (name,), stopped=True)
    if len(coordinators) > 1:
        yield Harm("all coordinators killed", coordinators)
    if "etcd" in names:
        yield Harm("etcd killed", ("etcd",))
        yield Harm("etcd killed, its data lost", ("etcd",), forgets=True)


async def run(
    options: DeathsOptions,
    cluster: Cluster,
    *,
    say: Callable[[str], None],
    stop: asyncio.Event,
    only: Callable[[Harm], bool] = lambda harm: True,
    clock: Callable[[], float] = time.monotonic,
) -> DeathsReport:
    """Does `only` those harms. Setting `stop` ends it after the one at hand.

    Raises LoadTestError, CallFailedError, TimeoutError if a process does not come back. However it
    ends, no process is left stopped.
    """
    before = environment.here()
    channels = Channels()
    try:
        bench = _Bench(options, cluster, channels, clock)
        await bench.all_there()
        questions = await bench.questions(say)
        users = Users(questions, options.timeout_seconds, clock)
        rows = []
        async with _steady(users, options):
            calm_began = clock()
            await asyncio.sleep(options.calm_seconds)
            calm = calm_began, clock()
            chosen = [harm for harm in harms(cluster.names) if only(harm)]
            spans = []
            for harm in chosen:
                if stop.is_set():
                    break
                say(f"{harm.what}; {len(users.asked)} requests so far")
                spans.append((harm, len(users.live), *await bench.harm(harm)))
                # What one death did is then no part of the next one's.
                await users.ended(list(users.live))
    finally:
        await channels.close()
    usual = deaths_report.longest_waits(users.asked, *calm)
    for harm, running, began, ended in spans:
        during = [a for a in users.asked if a.ended > began and a.began < ended]
        rows.append(_row(harm, running, during, (began, ended), max(usual)))
    return DeathsReport(
        settings=options.settings,
        environment=before,
        requests=len(users.asked),
        usual_gap=usual[0],
        usual_first=usual[1],
        rows=tuple(rows),
        wrong=sum(a.wrong for a in users.asked),
        failures=tuple(a.failure for a in users.asked if a.failure),
        interrupted=stop.is_set(),
    )


@contextlib.asynccontextmanager
async def _steady(users: Users, options: DeathsOptions) -> AsyncIterator[None]:
    """Load, which has ended when the block has."""
    over = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for number in range(options.users):
            group.create_task(users.user(number, options.seed, over))
        try:
            yield
        finally:
            over.set()


def _row(
    harm: Harm, running: int, during: Sequence[Asked], span: tuple[float, float], usual: float
) -> Row:
    gap, first = deaths_report.longest_waits(during, *span)
    return Row(
        what=harm.what,
        running=running,
        requests=len(during),
        failed=sum(bool(a.failure) for a in during),
        cut=sum(bool(a.cut) for a in during),
        placed_again=sum(a.attempts > 1 for a in during),
        longest_gap=gap,
        longest_first=first,
        usual_again_after=deaths_report.unusual_until(during, *span, usual) - span[0],
        seconds=span[1] - span[0],
    )


class _Bench:
    """What is done to a cluster."""

    def __init__(
        self,
        options: DeathsOptions,
        cluster: Cluster,
        channels: Channels,
        clock: Callable[[], float],
    ) -> None:
        self._options = options
        self._cluster = cluster
        self._channels = channels
        self._clock = clock

    async def questions(self, say: Callable[[str], None]) -> list[Question]:
        """With their answers, greedy and sampled ones in turn. Raises CallFailedError."""
        options, frontends = self._options, self._cluster.addresses("frontend")
        model = await self._model(frontends[0])
        source = Synthetic(
            lengths.parse(options.input_tokens), lengths.parse(options.output_tokens), 0.5, 64, 4
        )
        workload = Workload(source, options.seed, first_token=100, end_token=30_000)
        kinds = [SamplingSpec(), SamplingSpec(temperature=0.9, top_k=50, top_p=0.95)]
        clients = [
            tuple(
                InferenceClient(
                    self._channels.get(address),
                    model=model,
                    sampling=kind,
                    timeout_seconds=options.timeout_seconds,
                    clock=self._clock,
                )
                for address in frontends
            )
            for kind in kinds
        ]
        asked = [Question(workload.request(i), clients[i % 2]) for i in range(options.questions)]
        answers: list[list[int]] = [[] for _ in asked]
        for at in range(0, len(asked), options.users):
            say(f"undisturbed answers: {at} of {len(asked)}")
            async with asyncio.TaskGroup() as group:
                for i in range(at, min(at + options.users, len(asked))):
                    client = asked[i].clients[i % len(frontends)]
                    plan, took = asked[i].plan, answers[i].extend
                    group.create_task(client.tokens(plan, options.timeout_seconds, took))
        return [replace(q, answer=tuple(answer)) for q, answer in zip(asked, answers, strict=True)]

    async def _model(self, frontend: str) -> str:
        """Its name. A frontend that finds coordinators in etcd may know of none yet."""
        async with asyncio.timeout(BACK_SECONDS):
            while True:
                try:
                    return (await context_tokens(self._channels, frontend, ""))[0]
                except CallFailedError as error:
                    if error.reason != CoordinatorUnavailableError.reason:
                        raise
                await asyncio.sleep(LOOK_SECONDS)

    async def harm(self, harm: Harm) -> tuple[float, float]:
        """Does it, and undoes it: from when, and until when that may have been felt."""
        began = self._clock()
        if harm.stopped:
            for name in harm.victims:
                self._cluster.kill(name, signal.SIGSTOP)
            try:
                await asyncio.sleep(self._options.stopped_seconds)
            finally:
                for name in harm.victims:
                    self._cluster.kill(name, signal.SIGCONT)
        else:
            for name in harm.victims:
                self._cluster.kill(name, signal.SIGKILL)
            await asyncio.sleep(self._options.down_seconds)
            data = self._cluster.etcd_data
            if harm.forgets and data is not None:
                await asyncio.to_thread(shutil.rmtree, data)
            await asyncio.gather(*(self._cluster.restart(name) for name in harm.victims))
        await self.all_there()
        await asyncio.sleep(self._options.calm_seconds)
        return began, self._clock()

    async def all_there(self) -> None:
        """Until every coordinator counts on every worker. Raises TimeoutError."""
        workers = {n for n in self._cluster.names if n.startswith(WORKERS)}
        async with asyncio.timeout(BACK_SECONDS):
            for address in self._cluster.addresses("coordinator"):
                async with Client("", address) as client:
                    while not await self._counts_on(client, workers):  # noqa: ASYNC110
                        await asyncio.sleep(LOOK_SECONDS)

    async def _counts_on(self, client: Client, workers: set[str]) -> bool:
        try:
            status = await client.status()
        except CallFailedError:
            return False
        # A dead worker's entry is as good as none, and a worker's pid tells them apart.
        pids = self._cluster.pids
        there = {
            name
            for worker in status.workers
            for name in (worker.worker_id.rpartition("-")[0],)
            if not worker.draining and worker.pid == pids.get(name)
        }
        return workers <= there
