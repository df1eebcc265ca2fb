"""A soak: random load and random deaths for a long time, and then a look at what is left.

First every question of a pool is asked while nothing is disturbed. Then users ask them at random
while workers are killed, frozen and drained, one at a time. Whatever comes is compared with the
undisturbed answer. At the end, with nobody asking any more, every worker must report that it holds
no block and no lease, and memory must not have grown.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator

from loadtest import environment, lengths, soak_load
from loadtest.soak_deaths import Cluster, Deaths, process_of
from loadtest.soak_load import Load, Question
from loadtest.soak_memory import Watch
from loadtest.soak_report import SoakOptions, SoakReport
from loadtest.wire import InferenceClient, context_tokens
from loadtest.workload import SamplingSpec, Synthetic, Workload
from services.runtime.channels import Channels
from services.runtime.client import CallFailedError, Client, Status

LOOK_SECONDS = 1.0


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
