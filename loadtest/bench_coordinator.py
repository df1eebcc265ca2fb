"""What the coordinator's decisions cost: `python -m loadtest.bench_coordinator`.

Only the pure core runs here, in one process on one core; times are CPU time, the median of
several rounds, since a shared machine's wall time says little. Workers hold a common system prompt
and otherwise blocks of their own, so that a lookup finds all of them at the start of a prompt and
one of them further on.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import psutil

from services.coordinator.core import messages as m
from services.coordinator.core.core import Core
from services.coordinator.core.index import PrefixIndex
from services.coordinator.core.rules import Rules

BLOCK_TOKENS = 16
COMMON_BLOCKS = 32
PROMPTS = 8
"""Looked up in turn: the index remembers what it found of the last one."""
ROUNDS = 7


@dataclass(frozen=True, slots=True)
class Options:
    """How large the cluster is."""

    workers: int = 1000
    """A quarter of them prefill workers."""
    blocks: int = 1_000_000
    """KV blocks known, of all workers together."""
    prompt_tokens: int = 4096
    """Length of the prompts placed; the first half of each is cached on one worker."""
    placements: int = 2000
    """In a round."""


@dataclass(frozen=True, slots=True)
class Report:
    """Figures; times are CPU time."""

    placement_us: float
    """One decision: PlaceRequested and, later, the AttemptEnded of the same request."""
    placements_per_second: float
    heartbeat_us: float
    lookup_us: dict[int, float]
    """Looking a fully cached prompt of so many tokens up, over all workers."""
    store_blocks_per_second: float
    forget_worker_ms: float
    """Dropping a worker with all its blocks."""
    bytes_per_block: float
    """Resident memory for each block that a worker holds, the index's keys included."""


def run(options: Options) -> Report:
    """Measures everything; takes about half a minute at the default size."""
    memory, stored, index, prompts = _index(options)
    lookups = {tokens: _lookup_us(index, tokens) for tokens in (4096, 32_768, 131_072)}
    cluster = _Cluster(options, prompts)
    wanted = cluster.requests(options.placements)
    placing = _median(lambda _: cluster.place_and_end(wanted), options.placements)
    beating = _median(cluster.heartbeat, options.placements)
    name = next(iter(index.names(1)))
    return Report(
        placement_us=placing * 1e6,
        placements_per_second=1 / placing,
        heartbeat_us=beating * 1e6,
        lookup_us=lookups,
        store_blocks_per_second=stored,
        forget_worker_ms=_cpu(lambda: _forget(index, name)) * 1e3,
        bytes_per_block=memory,
    )


def _keys(worker: int, count: int) -> list[bytes]:
    """Fresh objects, as they come from the wire: the common prompt, then the worker's own."""
    own = max(0, count - COMMON_BLOCKS)
    common = [b"c" + n.to_bytes(15, "big") for n in range(min(count, COMMON_BLOCKS))]
    return common + [b"w" + worker.to_bytes(7, "big") + n.to_bytes(8, "big") for n in range(own)]


def _index(options: Options) -> tuple[float, float, PrefixIndex, list[list[bytes]]]:
    """Bytes a block, blocks stored a second, the index, and what each worker holds."""
    index, each = PrefixIndex(), options.blocks // options.workers
    for worker in range(options.workers):
        index.add(f"worker-{worker}")
    gc.collect()
    process = psutil.Process()
    before, spent = process.memory_info().rss, 0.0
    for worker in range(options.workers):
        keys = _keys(worker, each)
        start = time.process_time()
        index.store(f"worker-{worker}", keys)
        spent += time.process_time() - start
    del keys
    gc.collect()
    memory = (process.memory_info().rss - before) / options.blocks
    prompts = [_keys(worker, each) for worker in range(options.workers)]
    return memory, options.blocks / spent, index, prompts


def _lookup_us(index: PrefixIndex, tokens: int) -> float:
    """One worker more holds whole prompts; they are looked up among all, each in its turn."""
    prompts = [_keys(2**32 + number, tokens // BLOCK_TOKENS) for number in range(PROMPTS)]
    everyone = index.add("holder")
    for name in list(index.names(everyone - 1)):
        everyone |= index.add(name)
    for keys in prompts:
        index.store("holder", keys)

    def lookups(count: int) -> None:
        for number in range(count):
            next(index.reach(prompts[number % PROMPTS], everyone))

    seconds = _median(lookups, 2000)
    index.forget("holder")
    return seconds * 1e6


def _forget(index: PrefixIndex, worker: str) -> None:
    index.forget(worker)
    while index.sweep(1 << 18):
        pass


class _Cluster:
    """A core with workers that hold blocks, and a load that keeps them half busy."""

    def __init__(self, options: Options, holdings: Sequence[Sequence[bytes]]) -> None:
        draw = random.Random(1)
        self._core = Core(Rules(3.0, 1024, 64), 0.0, draw.random)
        self._options, self._holdings, self._draw = options, holdings, draw
        self._now, self._numbers = 10.0, itertools.count(1)
        stats = m.WorkerStats(running=16, free_blocks=8192, prefill_tokens_per_second=20_000.0)
        self._core.handle(m.Tick(), self._now)
        for number, keys in enumerate(holdings):
            role = m.Role.PREFILL if number % 4 == 0 else m.Role.DECODE
            info = m.WorkerInfo(
                worker_id=f"{role.value}-{number}",
                role=role,
                address=f"h:{number}",
                model="m",
                kv_layout="l",
                block_tokens=BLOCK_TOKENS,
                total_blocks=16_384,
                max_running=64,
                context_tokens=131_072,
                numerics="n",
            )
            self._core.handle(m.WorkerHello(number, info, stats), self._now)
            self._core.handle(m.WorkerKvEvents(number, 1, True, tuple(keys)), self._now)
        self._stats = stats

    def requests(self, count: int) -> list[m.PlaceRequest]:
        """Requests whose first half some worker holds."""
        blocks = self._options.prompt_tokens // BLOCK_TOKENS
        wanted = []
        for number in range(count):
            held = self._holdings[int(self._draw.random() * len(self._holdings))][: blocks // 2]
            rest = [b"x" + n.to_bytes(15, "big") for n in range(blocks - len(held))]
            request = m.PlaceRequest(
                request_id=str(number),
                attempt=0,
                model="m",
                block_keys=(*held, *rest),
                context_tokens=self._options.prompt_tokens,
                max_tokens=256,
                kv_layout="l",
            )
            wanted.append(request)
        return wanted

    def place_and_end(self, wanted: Sequence[m.PlaceRequest]) -> None:
        """Places requests; each ends when some others have been placed."""
        handle, live = self._core.handle, min(100, 4 * self._options.workers)
        for number, want in enumerate(wanted):
            command = handle(m.PlaceRequested(next(self._numbers), want), self._now)
            if not command or not isinstance(command[0], m.AnswerPlacement):
                raise RuntimeError(f"not placed: {command}")
            self._now += 1e-4
            if number >= live:
                handle(m.AttemptEnded(str(number - live), 0), self._now)
        for number in range(max(0, len(wanted) - live), len(wanted)):
            handle(m.AttemptEnded(str(number), 0), self._now)

    def heartbeat(self, count: int) -> None:
        """Workers report in turn, nothing changed."""
        for number in range(count):
            stream = number % self._options.workers
            self._core.handle(m.WorkerHeartbeat(stream, self._stats), self._now)


def _median(work: Callable[[int], object], count: int) -> float:
    """CPU seconds of one of `count`, the median of rounds."""
    work(count)
    return statistics.median(_cpu(lambda: work(count)) / count for _ in range(ROUNDS))


def _cpu(work: Callable[[], object]) -> float:
    gc.collect()
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """Runs the benchmark with sizes from the command line and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for option in fields(Options):
        flag = "--" + option.name.replace("_", "-")
        parser.add_argument(flag, type=int, default=option.default)
    report = run(Options(**vars(parser.parse_args())))
    for figure in fields(report):
        value = getattr(report, figure.name)
        if isinstance(value, dict):
            value = ", ".join(f"{tokens} tokens: {us:.1f}" for tokens, us in value.items())
        print(f"{figure.name:24} {value if isinstance(value, str) else f'{value:,.2f}'}")


if __name__ == "__main__":
    main()
