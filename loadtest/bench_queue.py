"""What the coordinator's queue and predictions cost: `python -m loadtest.bench_queue`.

CPU time on one core, the least of several rounds. One turn of the queue is a request that comes and
waits, and another that is placed, charged and settled; `waiting` others stay.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence

from services.coordinator.core.admission import Queue, Waiting
from services.coordinator.core.health import Health
from services.coordinator.core.messages import PlaceRequest, Role, WorkerInfo, WorkerStats
from services.coordinator.core.predict import Forecast, Predictor, Prompt, unattainable

ROUNDS = 7
CALLS = 2000
CASES = ((0, 1), (1_000, 50), (100_000, 50), (100_000, 50_000))
"""Requests that wait, and tenants whose they are."""


def microseconds(work: Callable[[], object]) -> float:
    """CPU time of one call."""
    least = float("inf")
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(CALLS):
            work()
        least = min(least, time.process_time() - start)
    return least / CALLS * 1e6


def turn(waiting: int, tenants: int) -> Callable[[], None]:
    """A turn of a queue of three priorities."""
    queue, numbers = Queue(waiting + 1), itertools.count()

    def come() -> Waiting:
        number = next(numbers)
        want = PlaceRequest(
            f"r{number}", 0, "m", (), 1000, 100, tenant=f"t{number % tenants}", priority=number % 3
        )
        entry = Waiting(number, want, 0.0, 1000.0 + number)
        queue.add(entry)
        return entry

    def one() -> None:
        entry = come()
        queue.may_try(entry, 1.0)
        queue.push_out(entry)
        placed = queue.take(queue.head("m", 1.0)[0].ticket, 1.0)
        if placed is not None:
            queue.settle(queue.charge(placed, 500), 500, 30)

    for _ in range(waiting):
        come()
    return one


def heartbeat(workers: int) -> tuple[Callable[[], None], Predictor]:
    """A report of one of so many workers, to predictions and to health."""
    predictor, health, draw = Predictor(), Health(1.5), random.Random(1)
    infos = [
        WorkerInfo(f"w{n}-0", Role.BOTH, f"h:{n}", "m", "l", 16, 1000, 64, 8192)
        for n in range(workers)
    ]
    for info in infos:
        health.registered(info, "kind", 0.0)
    reports = itertools.cycle(
        (
            info,
            WorkerStats(
                running=draw.randint(1, 60),
                free_blocks=draw.randint(0, 900),
                step_seconds=draw.uniform(0.01, 0.05),
                prefill_tokens_per_second=draw.uniform(500, 2000),
            ),
        )
        for info in infos
    )
    clock = itertools.count()

    def one() -> None:
        now = next(clock) * 0.5 / workers
        info, stats = next(reports)
        measured = predictor.heard(info, "kind", stats, now)
        health.heard(info.worker_id, "kind", measured, now)
        health.avoided(info.worker_id, now)

    return one, predictor


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a line for each figure."""
    for waiting, tenants in CASES:
        cost = microseconds(turn(waiting, tenants))
        print(f"a turn, {waiting:,} waiting, {tenants:,} tenants: {cost:.0f} us")
    for workers in (8, 1000):
        one, predictor = heartbeat(workers)
        print(f"a heartbeat, {workers:,} workers: {microseconds(one):.1f} us")
    prompt = Prompt("w0-0", 100, 1000)
    forecast, clock = Forecast(prompt), itertools.count()
    ended = microseconds(lambda: predictor.ended(forecast, 1.0, 1000, next(clock) / 1000))
    print(f"an attempt's end: {ended:.1f} us")
    print(f"a prompt foreseen: {microseconds(lambda: predictor.prompt_seconds(prompt)):.1f} us")
    tokens = microseconds(lambda: predictor.itl_seconds("w0-0", [(3, 4000)], 0, 100))
    print(f"an ITL foreseen: {tokens:.1f} us")
    early = microseconds(lambda: unattainable(predictor.floor("kind", 2000), 1.0, 1.0, 1.0, 1.0))
    print(f"a look at what is unattainable: {early:.1f} us")


if __name__ == "__main__":
    main()
