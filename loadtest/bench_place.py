"""What a placement costs over gRPC: `python -m loadtest.bench_place`.

A real coordinator in a process of its own, workers that are no more than their Register streams
(each with a prefix cache that it tells of and a heartbeat), and frontends' calls: Place, then
Report. The figure that counts is the coordinator's CPU time for such a pair, since that is what a
core of it is worth. What heartbeats cost is measured before, with nothing else going on, and taken
off.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import multiprocessing
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection

import grpc
import psutil

from services.coordinator.app import serve
from services.runtime.settings import CoordinatorProcess, CoordinatorSettings, ServerSettings
from tandem.coordinator.v1 import coordinator_pb2 as pb
from tandem.coordinator.v1 import coordinator_pb2_grpc as pb_grpc

BLOCK_TOKENS = 16
BLOCKS_EACH = 1024
"""Keys that each worker holds. Prompts begin with some of them."""
HEARTBEAT_SECONDS = 0.5
IDLE_SECONDS = 3.0
"""For the cost of heartbeats."""
WARM_UP = 300


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement. Times are the coordinator's CPU time."""

    workers: int
    prompt_tokens: int
    calls: int
    wall_seconds: float
    cpu_us: float
    """For one Place and its Report."""
    heartbeats_share: float
    """Of a core, that goes into the heartbeats of so many workers."""

    @property
    def per_second(self) -> float:
        """Place calls a second that one core is good for."""
        return 1e6 / self.cpu_us


def _coordinator(told: Connection) -> None:
    """The coordinator's process; tells its address, and ends when the pipe does."""

    async def run() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.run_in_executor(None, _until_closed, told, loop, stop)
        settings = CoordinatorProcess(
            server=ServerSettings(port=0), coordinator=CoordinatorSettings(lease_seconds=30.0)
        )
        await serve(settings, ready=told.send, stop=stop)

    asyncio.run(run())


def _until_closed(told: Connection, loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    with contextlib.suppress(EOFError):
        told.recv()
    loop.call_soon_threadsafe(stop.set)


def _keys(worker: int, count: int) -> list[bytes]:
    return [worker.to_bytes(8, "big") + n.to_bytes(8, "big") for n in range(count)]


def _hello(number: int) -> pb.RegisterRequest:
    role = pb.WORKER_ROLE_PREFILL if number % 4 == 0 else pb.WORKER_ROLE_DECODE
    info = pb.WorkerInfo(
        worker_id=f"worker-{number}",
        role=role,
        address=f"h:{number}",
        model="m",
        kv_layout="l",
        block_tokens=BLOCK_TOKENS,
        total_blocks=65_536,
        max_running=256,
        context_tokens=262_144,
        numerics="n",
    )
    return pb.RegisterRequest(hello=pb.Hello(info=info, stats=_stats()))


def _stats() -> pb.WorkerStats:
    return pb.WorkerStats(
        running=64, free_blocks=60_000, prefill_tokens_per_second=20_000.0, step_seconds=0.03
    )


async def _worker(channel: grpc.aio.Channel, number: int, there: asyncio.Event) -> None:
    """Registers, tells of its cache, then reports for ever."""

    async def say() -> AsyncIterator[pb.RegisterRequest]:
        yield _hello(number)
        keys = _keys(number, BLOCKS_EACH)
        yield pb.RegisterRequest(
            kv_events=pb.KvEvents(sequence=1, snapshot=True, stored=b"".join(keys))
        )
        while True:
            yield pb.RegisterRequest(heartbeat=pb.Heartbeat(stats=_stats()))
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async for _ in pb_grpc.WorkerRegistryServiceStub(channel).Register(say()):
        there.set()


async def _call(
    stub: pb_grpc.CoordinatorServiceStub, numbers: itertools.count[int], keys: Sequence[bytes]
) -> None:
    request_id = str(next(numbers))
    await stub.Place(
        pb.PlaceRequest(
            request_id=request_id,
            model="m",
            block_keys=keys,
            context_tokens=len(keys) * BLOCK_TOKENS,
            max_tokens=256,
            kv_layout="l",
        ),
        timeout=30,
    )
    await stub.Report(
        pb.ReportRequest(request_id=request_id, generated_tokens=100, ttft_seconds=0.2), timeout=30
    )


def _prompt(draw: random.Random, workers: int, tokens: int) -> list[bytes]:
    """Some worker holds its first half, as far as one holds so much."""
    blocks = tokens // BLOCK_TOKENS
    held = _keys(draw.randrange(workers), min(BLOCKS_EACH, blocks // 2))
    return held + [b"x" + draw.randbytes(15) for _ in range(blocks - len(held))]


async def measure(workers: int, prompt_tokens: int, calls: int, concurrency: int) -> Cell:
    """One cell, with a coordinator of its own."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    child = multiprocessing.get_context("spawn").Process(target=_coordinator, args=(theirs,))
    child.start()
    address = await asyncio.to_thread(ours.recv)
    try:
        async with contextlib.AsyncExitStack() as stack:
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
            there = [asyncio.Event() for _ in range(workers)]
            tasks = [asyncio.create_task(_worker(channel, n, e)) for n, e in enumerate(there)]
            stack.callback(lambda: [task.cancel() for task in tasks])
            await asyncio.gather(*(event.wait() for event in there))
            return await _load(channel, child.pid or 0, workers, prompt_tokens, calls, concurrency)
    finally:
        ours.close()
        theirs.close()
        child.terminate()
        await asyncio.to_thread(child.join)


async def _load(
    channel: grpc.aio.Channel, pid: int, workers: int, tokens: int, calls: int, concurrency: int
) -> Cell:
    stub, numbers = pb_grpc.CoordinatorServiceStub(channel), itertools.count()
    draw = random.Random(1)
    prompts = [_prompt(draw, workers, tokens) for _ in range(64)]

    async def client(share: int) -> None:
        for _ in range(share):
            await _call(stub, numbers, prompts[draw.randrange(len(prompts))])

    await asyncio.gather(*(client(WARM_UP // concurrency) for _ in range(concurrency)))
    meter = _Meter(pid)
    await asyncio.sleep(IDLE_SECONDS)
    beats, idle = meter.lap()
    await asyncio.gather(*(client(calls // concurrency) for _ in range(concurrency)))
    spent, wall = meter.lap()
    done = calls // concurrency * concurrency
    share = beats / idle
    return Cell(workers, tokens, done, wall, (spent - share * wall) / done * 1e6, share)


class _Meter:
    """CPU and wall seconds of a process since the last lap."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._last = self._now()

    def lap(self) -> tuple[float, float]:
        """CPU, wall."""
        before, self._last = self._last, self._now()
        return self._last[0] - before[0], self._last[1] - before[1]

    def _now(self) -> tuple[float, float]:
        times = self._process.cpu_times()
        return times.user + times.system, time.perf_counter()


async def _run(options: argparse.Namespace) -> list[Cell]:
    usual = options.workers[min(1, len(options.workers) - 1)]
    sizes = [(workers, options.tokens[0], options.calls) for workers in options.workers]
    sizes += [(usual, tokens, options.calls // 4) for tokens in options.tokens[1:]]
    return [await measure(*size, options.concurrency) for size in sizes]


def main() -> None:
    """Prints a row for each size of cluster, then one for each further length of prompt."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64, 256, 1024])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32_768, 131_072])
    parser.add_argument("--calls", type=int, default=4000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    cells = asyncio.run(_run(options))
    if options.json:
        print(json.dumps([asdict(cell) for cell in cells], indent=2))
        return
    heads = ("workers", "prompt", "CPU us", "a second and core", "heartbeats, of a core")
    print("  ".join(heads))
    for cell in cells:
        print(
            f"{cell.workers:7}  {cell.prompt_tokens:6}  {cell.cpu_us:6.0f}  "
            f"{cell.per_second:17,.0f}  {cell.heartbeats_share:21.1%}"
        )


if __name__ == "__main__":
    main()
