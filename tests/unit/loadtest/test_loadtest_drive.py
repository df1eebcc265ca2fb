"""When requests start and when a run ends, on a clock that the test turns."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from loadtest.drive import Bounds, Ended, Run
from loadtest.workload import RequestPlan


def plan(index):
    return RequestPlan(index, np.arange(5, dtype=np.uint32), 1, 0)


class TurnedClockLoop(asyncio.SelectorEventLoop):
    """Time passes only when nothing else is to do, and then at once."""

    def __init__(self):
        super().__init__()
        self.now = 1000.0

    def time(self):
        return self.now

    def _run_once(self):
        if not self._ready and self._scheduled:
            self.now = max(self.now, self._scheduled[0].when())
        super()._run_once()


@pytest.fixture
def turned():
    """turned(coroutine function of (loop)) runs it on turned time."""

    def run(main):
        with asyncio.Runner(loop_factory=TurnedClockLoop) as runner:
            return runner.run(asyncio.wait_for(main(runner.get_loop()), 1e9))

    return run


class Server:
    """Answers after `seconds`, and keeps count."""

    def __init__(self, loop, seconds, reason=""):
        self.loop, self.seconds, self.reason = loop, seconds, reason
        self.started, self.running, self.most = [], 0, 0

    async def ask(self, given, progress):
        progress.sent = self.loop.time()
        self.started.append(self.loop.time())
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.running -= 1
        progress.arrivals.append((self.loop.time(), 1))
        return self.reason


def run_of(loop, server, stop=None, requests=10, seconds=60.0, finish_seconds=30.0, request=plan):
    return Run(
        request,
        server.ask,
        Bounds(requests, seconds, finish_seconds),
        clock=loop.time,
        stop=stop or asyncio.Event(),
    )


def test_an_open_loop_does_not_wait_for_a_slow_server(turned):
    async def main(loop):
        server = Server(loop, seconds=20.0)
        run = run_of(loop, server, requests=5)
        ended = await run.open(iter([0.0, 1.0, 2.5, 2.5, 4.0]))
        assert ended is Ended.REQUESTS
        assert [t - run.started for t in server.started] == pytest.approx([0, 1, 2.5, 2.5, 4])
        assert server.most == 5
        assert all(o.e2e == pytest.approx(20.0) for o in run.outcomes)

    turned(main)


def test_lateness_of_the_generator_shows_and_is_part_of_the_latency(turned):
    """Making the second request takes 3 s: it and those behind it start late, by intention."""

    async def main(loop):
        server = Server(loop, seconds=1.0)

        def slow(index):
            if index == 1:
                loop.now += 3.0
            return plan(index)

        run = run_of(loop, server, requests=4, request=slow)
        await run.open(iter([0.0, 1.0, 2.0, 5.0]))
        outcomes = sorted(run.outcomes, key=lambda o: o.index)
        # The first was started before, and went out as soon as the loop ran again.
        assert [o.lateness for o in outcomes] == pytest.approx([3.0, 2.0, 1.0, 0.0])
        assert [o.ttft for o in outcomes] == pytest.approx([4.0, 3.0, 2.0, 1.0])
        assert [o.intended - run.started for o in outcomes] == [0.0, 1.0, 2.0, 5.0]

    turned(main)


def test_an_open_loop_ends_by_seconds_and_lets_the_last_finish(turned):
    async def main(loop):
        server = Server(loop, seconds=9.0)
        run = run_of(loop, server, requests=1000, seconds=10.0)
        ended = await run.open(iter(float(i) for i in range(1000)))
        assert ended is Ended.SECONDS
        assert len(run.outcomes) == 11
        assert all(o.ok for o in run.outcomes)
        assert loop.time() - run.started == pytest.approx(19.0)

    turned(main)


def test_a_trace_that_is_over_ends_the_run(turned):
    async def main(loop):
        run = run_of(loop, Server(loop, 1.0), requests=100)
        assert await run.open(iter([0.0, 0.5])) is Ended.TRACE
        assert len(run.outcomes) == 2

    turned(main)


def test_what_does_not_finish_is_cut_off_and_counted(turned):
    async def main(loop):
        server = Server(loop, seconds=1e6)
        run = run_of(loop, server, requests=3, seconds=10.0, finish_seconds=5.0)
        await run.open(iter([0.0, 1.0, 2.0]))
        assert [o.reason for o in run.outcomes] == ["UNFINISHED"] * 3
        assert loop.time() - run.started == pytest.approx(15.0)
        assert server.running == 0
        assert not run.live

    turned(main)


def test_a_closed_loop_keeps_its_users_busy_and_no_more(turned):
    async def main(loop):
        server = Server(loop, seconds=2.0)
        run = run_of(loop, server, requests=10)
        assert await run.closed(4, 0.0, seed=1) is Ended.REQUESTS
        assert server.most == 4
        assert sorted(o.index for o in run.outcomes) == list(range(10))
        assert loop.time() - run.started == pytest.approx(6.0)
        assert all(o.lateness == 0 for o in run.outcomes)

    turned(main)


def test_a_closed_loop_ends_by_seconds(turned):
    async def main(loop):
        server = Server(loop, seconds=2.0)
        run = run_of(loop, server, requests=1000, seconds=7.0)
        assert await run.closed(2, 0.0, seed=1) is Ended.SECONDS
        assert len(run.outcomes) == 8
        assert max(t - run.started for t in server.started) == pytest.approx(6.0)

    turned(main)


def test_users_think(turned):
    async def main(loop):
        server = Server(loop, seconds=1.0)
        run = run_of(loop, server, requests=10**6, seconds=4000.0)
        await run.closed(3, 4.0, seed=1)
        # Each cycle is 1 s of answer and 4 s of thought, on average.
        assert len(run.outcomes) == pytest.approx(3 * 4000 / 5, rel=0.1)

    turned(main)


@pytest.mark.parametrize("loop_kind", ["open", "closed"])
def test_stopping_cuts_off_at_once_and_blames_nobody(turned, loop_kind):
    async def main(loop):
        stop = asyncio.Event()
        server = Server(loop, seconds=4.0)
        run = run_of(loop, server, stop, requests=1000, seconds=1000.0)
        loop.call_later(10.0, stop.set)
        if loop_kind == "open":
            ended = await run.open(iter(i * 2.0 for i in range(1000)))
        else:
            ended = await run.closed(2, 0.0, seed=1)
        assert ended is Ended.INTERRUPTED
        assert loop.time() - run.started == pytest.approx(10.0)
        reasons = {o.reason for o in run.outcomes}
        assert reasons == {"", "INTERRUPTED"}
        assert server.running == 0

    turned(main)


def test_failures_are_outcomes_and_the_load_goes_on(turned):
    async def main(loop):
        run = run_of(loop, Server(loop, 1.0, reason="OVERLOADED"), requests=5)
        assert await run.closed(1, 0.0, seed=1) is Ended.REQUESTS
        assert [o.reason for o in run.outcomes] == ["OVERLOADED"] * 5

    turned(main)


def test_a_bug_of_the_generator_is_not_an_outcome(turned):
    async def main(loop):
        async def broken(given, progress):
            raise ZeroDivisionError

        run = Run(plan, broken, Bounds(3, 10.0, 1.0), clock=loop.time, stop=asyncio.Event())
        with pytest.raises(ZeroDivisionError):
            await run.open(iter([0.0, 1.0, 2.0]))

    turned(main)


def test_cancelling_a_run_leaves_no_request_behind(turned):
    async def main(loop):
        server = Server(loop, seconds=1e6)
        run = run_of(loop, server)
        task = asyncio.create_task(run.closed(3, 0.0, seed=1))
        await asyncio.sleep(5)
        assert server.running == 3
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert server.running == 0

    turned(main)
