"""A coordinator process and worker processes that are killed, stopped and started again."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import asynccontextmanager, suppress

import pytest

from cli.child import Child
from services.engine.api import Hold, Request, Sampling
from services.engine.identity import WorkerIdentity
from services.engine.registration import Registration
from services.engine.scripted.engine import ScriptedEngine
from services.runtime.channels import Channels
from services.runtime.settings import EngineSettings, KvSettings, ModelSettings, WorkerSettings
from tandem.coordinator.v1 import coordinator_pb2 as pb
from tandem.coordinator.v1 import coordinator_pb2_grpc as pb_grpc

ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("TANDEM_")}
READY_SECONDS = 60.0
BLOCK = 4
SOON = 30.0
"""Seconds that a busy machine is given for what takes a moment; leases that must not matter are
twice as long."""


class Processes:
    """Real processes, ended with the test."""

    def __init__(self, folder):
        self._folder = folder
        self._children = []
        self.channels = Channels()

    async def _start(self, name, *arguments):
        child = await Child.start(
            name,
            arguments,
            log=self._folder / f"{name}.log",
            environment=ENVIRONMENT,
            timeout=READY_SECONDS,
        )
        self._children.append(child)
        return child

    async def coordinator(self, lease, port="0"):
        return await self._start(
            *("coordinator", "coordinator", "--port", port),
            *("--set", f"coordinator.lease_seconds={lease}"),
        )

    async def worker(self, role, coordinator):
        return await self._start(
            *(role, role, "--coordinator", coordinator.address, "--name", role),
            *("--set", "engine.kind=scripted", "--set", "engine.kv_blocks=64"),
        )

    async def restart(self, coordinator, lease):
        """kill -9, and a new one on the same port."""
        coordinator.kill(signal.SIGKILL)
        await coordinator.wait()
        return await self.coordinator(lease, coordinator.address.rpartition(":")[2])

    def stub(self, coordinator):
        return pb_grpc.CoordinatorServiceStub(self.channels.get(coordinator.address))

    async def status(self, coordinator):
        """What the coordinator says; waits until it is there."""
        return await self.stub(coordinator).GetStatus(pb.GetStatusRequest(), wait_for_ready=True)

    async def until(self, coordinator, so, seconds=SOON):
        """Asks for the status until it is as wanted; returns it."""
        async with asyncio.timeout(seconds):
            while not so(status := await self.status(coordinator)):
                pass
        return status

    async def close(self):
        await self.channels.close()
        for child in self._children:
            with suppress(ProcessLookupError):
                child.kill(signal.SIGCONT)
            await child.end(0)


@pytest.fixture
async def processes(tmp_path):
    processes = Processes(tmp_path)
    yield processes
    await processes.close()


def names(status):
    return sorted(worker.info.worker_id.rpartition("-")[0] for worker in status.workers)


def both(status):
    return names(status) == ["decode", "prefill"]


async def test_workers_come_back_to_a_coordinator_that_was_killed(processes):
    coordinator = await processes.coordinator(lease=60)
    await asyncio.gather(*(processes.worker(r, coordinator) for r in ("prefill", "decode")))
    before = await processes.until(coordinator, both)
    coordinator = await processes.restart(coordinator, lease=60)
    # Asked at once: the new coordinator knows nobody yet, and the request waits for them.
    request = pb.PlaceRequest(request_id="r", context_tokens=100)
    place = processes.stub(coordinator).Place(request, timeout=SOON, wait_for_ready=True)
    after = await processes.until(coordinator, both)
    assert after.coordinator_id != before.coordinator_id
    assert {w.info.worker_id for w in after.workers} == {w.info.worker_id for w in before.workers}
    answer = await place
    assert answer.decode.worker_id.startswith("decode-")


async def test_a_killed_worker_is_dropped_long_before_its_lease_ends(processes):
    coordinator = await processes.coordinator(lease=60)
    _, decode = await asyncio.gather(
        *(processes.worker(r, coordinator) for r in ("prefill", "decode"))
    )
    await processes.until(coordinator, both)
    decode.kill(signal.SIGKILL)
    await processes.until(coordinator, lambda s: names(s) == ["prefill"])


async def test_a_stopped_worker_is_dropped_when_its_lease_ends_and_comes_back(processes):
    coordinator = await processes.coordinator(lease=3)
    decode = await processes.worker("decode", coordinator)
    clock = asyncio.get_running_loop().time
    start = clock()
    decode.kill(signal.SIGSTOP)
    await processes.until(coordinator, lambda s: not s.workers)
    assert clock() - start > 1.0, "a heartbeat had just come, and the lease is three seconds"
    decode.kill(signal.SIGCONT)
    await processes.until(coordinator, lambda s: names(s) == ["decode"])


async def test_a_worker_that_ends_in_peace_is_gone_at_once(processes):
    coordinator = await processes.coordinator(lease=60)
    decode = await processes.worker("decode", coordinator)
    assert await decode.end(20) == 0
    await processes.until(coordinator, lambda s: not s.workers)


async def test_a_coordinator_ends_in_peace_with_workers_registered(processes):
    coordinator = await processes.coordinator(lease=60)
    await processes.worker("decode", coordinator)
    assert await coordinator.end(20) == 0


@asynccontextmanager
async def engine():
    settings = EngineSettings(kind="scripted", block_tokens=BLOCK, kv_blocks=64)
    engine = ScriptedEngine(
        ModelSettings(name="m"), settings, KvSettings(transports=("tcp",)), host="127.0.0.1"
    )
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


@asynccontextmanager
async def registered(engine, coordinator, **more):
    """An engine of this process, registered as a prefill worker."""
    info, channels, stop = engine.info, Channels(), asyncio.Event()
    identity = WorkerIdentity(
        worker_id="prefill-0",
        role="prefill",
        address="127.0.0.1:1",
        model="m",
        kv_layout=info.layout.fingerprint,
        block_tokens=BLOCK,
        total_blocks=info.total_blocks,
        max_running=info.max_running,
        context_tokens=info.context_tokens,
    )
    settings = WorkerSettings(coordinator=coordinator.address, heartbeat_seconds=0.1)
    registration = Registration(engine, identity, settings, channels, **more)
    running = asyncio.create_task(registration.run(stop))
    try:
        yield registration
    finally:
        stop.set()
        await running
        await channels.close()


async def prefill(engine, request_id, tokens):
    """Runs a prompt, so that the engine has its blocks cached."""
    request = Request(request_id, tuple(tokens), Sampling(max_tokens=4))
    engine.prefill(request, Hold(seconds=60))
    async for step in engine.outputs():
        if any(o.request_id == request_id and o.prefill_done for o in step.outputs):
            return


async def test_the_index_follows_an_engine_and_is_rebuilt_after_a_restart(processes):
    coordinator = await processes.coordinator(lease=2)
    async with engine() as source, registered(source, coordinator) as registration:
        await registration.registered.wait()
        await prefill(source, "a", range(10, 30))

        def knows(count):
            return lambda s: s.workers and s.workers[0].known_blocks == count

        await processes.until(coordinator, knows(5))
        await prefill(source, "b", range(30, 38))
        await processes.until(coordinator, knows(7))
        coordinator = await processes.restart(coordinator, lease=2)
        await processes.until(coordinator, knows(7))
        assert registration.registered.is_set()


async def test_draining_is_said_again_to_a_new_coordinator(processes):
    coordinator = await processes.coordinator(lease=2)
    async with engine() as source, registered(source, coordinator) as registration:
        await registration.registered.wait()
        registration.drain()

        def draining(status):
            return status.workers and status.workers[0].draining

        await processes.until(coordinator, draining)
        coordinator = await processes.restart(coordinator, lease=2)
        await processes.until(coordinator, draining)


async def test_a_coordinator_that_does_not_answer_is_taken_for_gone(processes):
    coordinator = await processes.coordinator(lease=2)
    coordinator.kill(signal.SIGSTOP)
    async with engine() as source, registered(source, coordinator, hello_seconds=0.3) as worker:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(worker.registered.wait(), 1.0)
        coordinator.kill(signal.SIGCONT)
        await asyncio.wait_for(worker.registered.wait(), SOON)
        await processes.until(coordinator, lambda s: len(s.workers) == 1)
