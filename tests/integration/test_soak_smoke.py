"""The soak, short: on a real cluster it finds nothing, and what it should find it finds."""

import asyncio
import json
import os
import random
import re
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest

from loadtest import bench_soak, environment, soak_load, soak_memory
from loadtest.outcome import Served
from loadtest.soak_deaths import Deaths, Harm, Schedule
from loadtest.soak_load import Load, Question, Shares, Tally
from loadtest.soak_memory import Identity, Watch
from loadtest.soak_report import SoakOptions, SoakReport
from loadtest.workload import RequestPlan
from services.runtime.client import CallFailedError, Status, Worker

NEVER = Shares(cancelled=0, hurried=0)


async def test_a_short_soak_of_a_real_cluster_finds_nothing(tmp_path):
    file = tmp_path / "soak.json"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli.main", "bench", "soak", "--engine", "scripted"),
        *("--minutes", "0.12", "--pause", "0.3", "--questions", "16", "--seed", "5"),
        *("--json", str(file)),
        env={k: v for k, v in os.environ.items() if not k.startswith("TANDEM_")},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(100):
        said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()
    report = json.loads(file.read_text())
    assert report["violations"] == []
    assert report["deaths"]
    assert report["tally"]["answered"] > 0
    assert report["tally"]["wrong"] == 0
    assert report["quiet_after"] is not None
    assert {"frontend", "coordinator", "prefill-1", "decode-1"} <= {
        process["name"] for process in report["seen"]
    }


class Server:
    """Answers as it is told: the tokens of each question, then how it ends."""

    def __init__(self, said: list[int], end: Exception | None = None) -> None:
        self._said, self._end = said, end

    async def tokens(self, plan, timeout_seconds, on_tokens) -> Served:
        await asyncio.sleep(0)
        for token in self._said:
            on_tokens([token])
            await asyncio.sleep(0)
        if self._end is not None:
            raise self._end
        return Served(len(self._said), 0, 2, False, {"shm": 10}, 0.0, 0.0)


async def asked(server: Server, shares: Shares, *, wanted=(1, 2, 3, 4), requests=40) -> Tally:
    """The tally of a user who asks one question so often."""
    plan = RequestPlan(0, np.zeros(1, np.uint32), len(wanted), 0)
    clock = iter(range(100_000))
    load = Load(
        [Question(plan, server)],
        [tuple(wanted)],
        shares,
        timeout_seconds=9,
        clock=lambda: next(clock),
    )
    stop = asyncio.Event()
    user = asyncio.create_task(load.user(random.Random(0), stop))
    while load.tally.asked < requests and not user.done():  # noqa: ASYNC110 - its tally is what is awaited
        await asyncio.sleep(0)
    stop.set()
    await user
    return load.tally


async def test_right_answers_are_counted_as_such():
    tally = await asked(Server([1, 2, 3, 4]), NEVER)
    assert tally.answered == tally.resumed == tally.asked >= 40
    assert tally.kv_bytes == {"shm": 10 * tally.answered}
    assert not tally.wrong
    assert not tally.failed


@pytest.mark.parametrize(("said", "token"), [([1, 9, 3, 4], 1), ([1, 2, 3, 5], 3)])
async def test_a_wrong_token_is_found(said, token):
    tally = await asked(Server(said), NEVER)
    assert tally.wrong == tally.asked
    assert f"token {token} of 4" in tally.wrong_examples[0]


@pytest.mark.parametrize("said", [[], [1, 2, 3], [1, 2, 3, 4, 5]])
async def test_an_answer_of_another_length_is_wrong(said):
    assert (await asked(Server(said), NEVER)).wrong > 0


async def test_wrong_tokens_are_found_in_requests_that_fail_or_are_given_up():
    lost = CallFailedError("", "UNAVAILABLE", "WORKER_LOST", "gone")
    assert not (await asked(Server([1, 2], lost), NEVER)).wrong
    failing = await asked(Server([1, 7], lost), NEVER)
    assert failing.wrong == failing.failed["WORKER_LOST"] == failing.asked
    leaving = await asked(Server([7, 2, 3, 4]), Shares(cancelled=1, hurry_seconds=100))
    assert leaving.cancelled
    assert leaving.wrong == leaving.asked


async def test_only_deadlines_that_were_meant_to_be_missed_are_excused():
    late = CallFailedError("", soak_load.DEADLINE, "DEADLINE_EXCEEDED", "too late")
    hurried = await asked(Server([1], late), Shares(cancelled=0, hurried=1))
    assert hurried.hurried == hurried.asked
    assert not hurried.failed
    assert (await asked(Server([1], late), NEVER)).failed["DEADLINE_EXCEEDED"]


class FakeCluster:
    """Processes that are started again at once, under a new worker id."""

    def __init__(self, names, *, comes_back=True) -> None:
        self.pids = {name: at for at, name in enumerate(names)}
        self.signals: list[tuple[str, int]] = []
        self._comes_back = comes_back

    def kill(self, name, number):
        self.signals.append((name, number))
        if number in (signal.SIGKILL, signal.SIGTERM):
            self.pids[name] += 1000

    async def present(self):
        ids = [
            f"{name}-{pid if self._comes_back else pid % 1000}" for name, pid in self.pids.items()
        ]
        return frozenset(ids)


async def harmed(cluster: FakeCluster, count: int, back: float = 5.0) -> Deaths:
    schedule = Schedule(mean_pause=1e-4, longest_freeze=0.11, back=back)
    deaths = Deaths(
        cluster,
        cluster.present,
        schedule,
        rng=random.Random(1),
        clock=asyncio.get_running_loop().time,
    )
    stop = asyncio.Event()
    running = asyncio.create_task(deaths.run(frozenset(cluster.pids), stop))
    while len(deaths.done) < count and not running.done():  # noqa: ASYNC110 - its list is what is awaited
        await asyncio.sleep(0)
    stop.set()
    await running
    return deaths


async def test_workers_are_harmed_one_at_a_time_and_none_stays_frozen():
    cluster = FakeCluster(["prefill-0", "prefill-1", "decode-0", "decode-1"])
    deaths = await harmed(cluster, 12)
    assert {death.harm for death in deaths.done} == set(Harm)
    assert all(death.back_after is not None for death in deaths.done)
    stopped = [name for name, number in cluster.signals if number == signal.SIGSTOP]
    continued = [name for name, number in cluster.signals if number == signal.SIGCONT]
    assert stopped == continued
    for at, (name, number) in enumerate(cluster.signals):
        if number == signal.SIGSTOP:
            assert cluster.signals[at + 1] == (name, signal.SIGCONT)


async def test_a_worker_is_back_as_another_one_or_not_at_all():
    cluster = FakeCluster(["prefill-0", "decode-0"], comes_back=False)
    deaths = await harmed(cluster, 4, back=0.05)
    killed = [death for death in deaths.done if death.harm is not Harm.STOP]
    assert killed
    assert all(death.back_after is None for death in killed)


def test_memory_that_grows_is_told_from_memory_that_does_not():
    def trend(size, seconds=600):
        return soak_memory.trend("x", [(at, size(at)) for at in range(seconds)])

    mib = 2**20
    assert trend(lambda at: 100 * mib + at % 7 * mib).flat
    assert trend(lambda at: (500 if at < 100 else 900) * mib).flat
    growing = trend(lambda at: 100 * mib + at * mib // 10)
    assert growing.flat is False
    assert growing.bytes_per_minute == pytest.approx(6 * mib, rel=0.01)
    assert trend(lambda at: at * mib, seconds=60).flat is None


def test_a_process_that_stays_is_found_and_its_successor_is_not_taken_for_it():
    watch = Watch()
    watch.look({"this": os.getpid(), "nobody": 2**22 + 1}, 0.0)
    (me,) = (identity for identity in watch.seen if identity.name == "this")
    assert soak_memory.still_running([me]) == (f"this, pid {os.getpid()}",)
    assert soak_memory.still_running([replace(me, started=me.started - 1)]) == ()
    assert soak_memory.still_running([Identity("gone", 2**22 + 1, 0.0)]) == ()


def report(**changed) -> SoakReport:
    fine = SoakReport(
        options=SoakOptions("f", "c", ("prefill-0",), seed=1),
        environment=environment.here(),
        model="m",
        seconds=1.0,
        tally=Tally(asked=1, answered=1),
        deaths=(),
        rest=(),
        quiet_after=1.0,
        memory=(),
        seen=(),
    )
    return replace(fine, **changed)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tally": Tally(asked=1)}, "no request was answered"),
        ({"tally": Tally(answered=1, wrong=2, wrong_examples=["x"])}, "2 requests differed: x"),
        ({"tally": Tally(answered=1, failed={"A": 3}, failures={"A": "why"})}, "3 .* A: why"),
        ({"rest": ("prefill-0-x has 2 blocks held",)}, "2 blocks held"),
        ({"bad_ends": ("left behind: decode-0",)}, "left behind"),
        (
            {"memory": (soak_memory.Trend("frontend", 900, 0, 9, 3 * 2**20, False),)},
            "memory of frontend grows by 3.00",
        ),
    ],
)
def test_each_thing_that_should_not_be_is_a_violation(changed, words):
    assert report().violations == ()
    (violation,) = report(**changed).violations
    assert re.search(words, violation)


def test_rests_are_named():
    zeros = dict.fromkeys(("running", "waiting", "free_blocks", "cached_blocks", "held_blocks"), 0)
    zeros |= dict.fromkeys(("total_blocks", "leases", "finished", "kv_refused", "pid"), 0)
    idle = Worker(
        worker_id="",
        role="decode",
        model="m",
        address="",
        step_seconds=0.0,
        kv_bytes={},
        leases_expired=0,
        draining=False,
        silent_seconds=0.0,
        **zeros,
    )
    busy = replace(idle, worker_id="decode-0-abc", held_blocks=2, leases=1)
    status = Status((busy,), 0, 0, {}, 0.0)
    assert bench_soak._rest(status, ("decode-0", "prefill-0")) == (
        "decode-0-abc has 2 blocks held",
        "decode-0-abc has 1 leases",
        "prefill-0 is missing",
    )
