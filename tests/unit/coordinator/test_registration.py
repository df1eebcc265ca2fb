"""The worker's side of registration, against a registry that the test plays."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest

from kvtransfer.keys import KEY_BYTES
from services.engine import registration as module
from services.engine.api import EngineStats, KvEvents
from services.engine.identity import WorkerIdentity
from services.engine.registration import Registration
from services.runtime.channels import Channels
from services.runtime.directory import Known
from services.runtime.settings import WorkerSettings
from tandem.coordinator.v1 import coordinator_pb2 as pb
from tandem.coordinator.v1 import coordinator_pb2_grpc as pb_grpc

ACCEPTED = pb.RegisterResponse(accepted=pb.Accepted(lease_ms=60_000, coordinator_id="c"))
RESYNC = pb.RegisterResponse(resync=pb.Resync())


def key(number):
    return number.to_bytes(KEY_BYTES, "big")


def split(raw):
    return [raw[at : at + KEY_BYTES] for at in range(0, len(raw), KEY_BYTES)]


class Engine:
    """Holds keys; its KV events are what it is told to say, after a snapshot."""

    def __init__(self, keys=()):
        self.keys = list(keys)
        self.changes = asyncio.Queue()
        self.readers = 0
        self.running = 0

    def stats(self):
        return EngineStats(running=self.running)

    async def kv_events(self):
        self.readers += 1
        try:
            yield KvEvents(stored=tuple(self.keys), snapshot=True)
            while (change := await self.changes.get()) is not None:
                yield change
        finally:
            self.readers -= 1


class Registry(pb_grpc.WorkerRegistryServiceServicer):
    """Each new stream is handed to the test, which reads and writes it."""

    def __init__(self):
        self.streams = asyncio.Queue()

    async def Register(self, request_iterator, context):  # noqa: N802
        over, gone = asyncio.Event(), asyncio.Event()
        await self.streams.put((context, over, gone))
        try:
            await over.wait()
        finally:
            gone.set()

    async def stream(self):
        async with asyncio.timeout(30):
            return Stream(*await self.streams.get())


class Stream:
    def __init__(self, context, over, gone):
        self._context, self._over, self._gone = context, over, gone

    async def next(self, kind=None):
        """The next message, of a kind if one is named."""
        async with asyncio.timeout(30):
            while True:
                message = await self._context.read()
                assert message is not grpc.aio.EOF
                if kind in (None, message.WhichOneof("message")):
                    return message

    async def gone(self):
        """Waits for the worker to end it."""
        await asyncio.wait_for(self._gone.wait(), 30)

    async def say(self, message):
        await self._context.write(message)

    async def greet(self):
        hello = await self.next()
        assert hello.WhichOneof("message") == "hello"
        await self.say(ACCEPTED)
        return hello.hello

    async def fail(self, words):
        self._context.set_code(grpc.StatusCode.UNAVAILABLE)
        self._context.set_details(words)
        self._over.set()


@asynccontextmanager
async def listening():
    registry = Registry()
    server = grpc.aio.server()
    pb_grpc.add_WorkerRegistryServiceServicer_to_server(registry, server)
    registry.port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield registry
    await server.stop(0)


@pytest.fixture
async def registry():
    async with listening() as registry:
        yield registry


@asynccontextmanager
async def worker(registry, engine, **more):
    identity = WorkerIdentity(
        "w-1", "prefill", "h:1", "m", "l", 16, 64, 8, 512, numerics="n", pid=7
    )
    settings = WorkerSettings(coordinator=f"127.0.0.1:{registry.port}", heartbeat_seconds=0.05)
    channels, stop = Channels(), asyncio.Event()
    registration = Registration(engine, identity, settings, channels, draw=lambda: 0.0, **more)
    running = asyncio.create_task(registration.run(stop))
    try:
        yield registration
    finally:
        stop.set()
        await asyncio.wait_for(running, 30)
        assert not registration.registered.is_set()
        assert engine.readers == 0, "the engine's events are let go"
        await channels.close()


async def test_hello_then_snapshot_then_changes(registry):
    engine = Engine([key(1), key(2)])
    async with worker(registry, engine) as registration:
        stream = await registry.stream()
        hello = await stream.greet()
        assert hello.info == pb.WorkerInfo(
            worker_id="w-1",
            role=pb.WORKER_ROLE_PREFILL,
            address="h:1",
            model="m",
            kv_layout="l",
            block_tokens=16,
            total_blocks=64,
            max_running=8,
            context_tokens=512,
            numerics="n",
            dp_ranks=1,
            pid=7,
        )
        first = (await stream.next("kv_events")).kv_events
        assert (first.sequence, first.snapshot, split(first.stored)) == (1, True, engine.keys)
        assert registration.registered.is_set()
        engine.changes.put_nowait(KvEvents(stored=(key(3),), removed=(key(1),)))
        change = (await stream.next("kv_events")).kv_events
        assert change == pb.KvEvents(sequence=2, stored=key(3), removed=key(1))
        engine.changes.put_nowait(KvEvents(stored=(key(9),), snapshot=True))
        again = (await stream.next("kv_events")).kv_events
        assert again == pb.KvEvents(sequence=3, snapshot=True, stored=key(9))


async def test_an_empty_cache_is_a_snapshot_too(registry):
    async with worker(registry, Engine()):
        stream = await registry.stream()
        await stream.greet()
        assert (await stream.next("kv_events")).kv_events == pb.KvEvents(sequence=1, snapshot=True)


async def test_heartbeats_carry_the_load_of_the_moment(registry):
    engine = Engine()
    async with worker(registry, engine):
        stream = await registry.stream()
        await stream.greet()
        await stream.next("heartbeat")
        engine.running = 5
        while (await stream.next("heartbeat")).heartbeat.stats.running != 5:
            pass


async def test_a_resync_starts_over_with_a_snapshot(registry):
    engine = Engine([key(1)])
    async with worker(registry, engine):
        stream = await registry.stream()
        await stream.greet()
        await stream.next("kv_events")
        engine.changes.put_nowait(KvEvents(stored=(key(2),)))
        assert (await stream.next("kv_events")).kv_events.sequence == 2
        engine.keys.append(key(2))
        await stream.say(RESYNC)
        again = (await stream.next("kv_events")).kv_events
        assert again == pb.KvEvents(sequence=1, snapshot=True, stored=key(1) + key(2))
        assert engine.readers == 1


async def test_a_large_cache_goes_in_messages_of_bounded_size(registry, monkeypatch):
    monkeypatch.setattr(module, "KEYS_IN_A_MESSAGE", 4)
    engine = Engine([key(n) for n in range(10)])
    async with worker(registry, engine):
        stream = await registry.stream()
        await stream.greet()
        parts = [(await stream.next("kv_events")).kv_events for _ in range(3)]
        assert [p.sequence for p in parts] == [1, 2, 3]
        assert [p.snapshot for p in parts] == [True, False, False]
        assert [k for p in parts for k in split(p.stored)] == engine.keys
        removed, stored = [key(n) for n in range(6)], [key(n) for n in range(20, 25)]
        lower = [key(n) for n in range(40, 47)]
        engine.changes.put_nowait(KvEvents(tuple(stored), tuple(removed), lower=tuple(lower)))
        parts = [(await stream.next("kv_events")).kv_events for _ in range(5)]
        assert [k for p in parts for k in split(p.removed)] == removed
        assert [k for p in parts for k in split(p.lower)] == lower
        assert [k for p in parts for k in split(p.stored)] == stored
        sizes = [len(p.removed + p.lower + p.stored) // KEY_BYTES for p in parts]
        assert sizes == [4, 4, 4, 4, 2]


async def test_a_broken_stream_leads_to_a_new_one(registry):
    async with worker(registry, Engine()) as registration:
        for _ in range(3):
            stream = await registry.stream()
            await stream.greet()
            await asyncio.wait_for(registration.registered.wait(), 30)
            await stream.fail("going away")


async def test_a_registry_that_accepts_and_drops_is_not_hammered(registry):
    """Pauses grow although each Hello is accepted: 0.05, 0.1, 0.2, 0.4 s with the least jitter."""
    clock = asyncio.get_running_loop().time
    async with worker(registry, Engine()):
        start = clock()
        for _ in range(5):
            stream = await registry.stream()
            await stream.greet()
            await stream.fail("not you")
        assert clock() - start >= 0.9 * (0.05 + 0.1 + 0.2 + 0.4)


async def test_a_hello_without_an_answer_is_given_up(registry):
    async with worker(registry, Engine(), hello_seconds=0.1) as registration:
        silent = await registry.stream()
        await silent.next("hello")
        stream = await registry.stream()
        await stream.greet()
        await asyncio.wait_for(registration.registered.wait(), 30)


async def test_a_wrong_answer_to_hello_is_given_up(registry):
    async with worker(registry, Engine()):
        wrong = await registry.stream()
        await wrong.next("hello")
        await wrong.say(RESYNC)
        await (await registry.stream()).greet()


async def test_draining_is_said_once_a_stream(registry):
    async with worker(registry, Engine()) as registration:
        stream = await registry.stream()
        await stream.greet()
        await stream.next("heartbeat")
        registration.drain()
        await stream.next("draining")
        for _ in range(5):
            assert (await stream.next()).WhichOneof("message") != "draining"
        await stream.fail("restart")
        stream = await registry.stream()
        await stream.greet()
        first = await stream.next()
        while first.WhichOneof("message") == "kv_events":
            first = await stream.next()
        assert first.WhichOneof("message") == "draining", "before any heartbeat"


async def test_leaving_ends_the_stream(registry):
    engine = Engine()
    async with worker(registry, engine):
        stream = await registry.stream()
        await stream.greet()
        await stream.next("heartbeat")
    await stream.gone()


async def test_an_engine_that_fails_is_not_hidden(registry):
    class Broken(Engine):
        def stats(self):
            raise ZeroDivisionError

    channels = Channels()
    settings = WorkerSettings(coordinator=f"127.0.0.1:{registry.port}")
    identity = WorkerIdentity("w-1", "decode", "h:1", "m", "l", 16, 64, 8, 512)
    with pytest.raises(ZeroDivisionError):
        await Registration(Broken(), identity, settings, channels).run(asyncio.Event())
    await channels.close()


# Several coordinators


class Listing:
    """A directory that the test writes."""

    def __init__(self, *registries):
        self.known = Known([f"127.0.0.1:{registry.port}" for registry in registries])

    @property
    def coordinators(self):
        return self.known.coordinators

    async def changed(self, known):
        return await self.known.changed(known)


@pytest.fixture
async def another():
    async with listening() as registry:
        yield registry


async def test_all_are_told_everything_and_none_minds_the_others(registry, another):
    engine = Engine([key(1)])
    listing = Listing(registry, another)
    async with worker(registry, engine, directory=listing) as registration:
        one, two = await registry.stream(), await another.stream()
        assert (await one.greet()).info == (await two.greet()).info
        for stream in (one, two):
            assert (await stream.next("kv_events")).kv_events.stored == key(1)
        assert engine.readers == 2
        await two.fail("going away")
        # The first one's stream goes on; the second one's begins anew, with a snapshot.
        engine.running = 3
        while (await one.next("heartbeat")).heartbeat.stats.running != 3:
            pass
        assert registration.registered.is_set()
        two = await another.stream()
        await two.greet()
        assert (await two.next("kv_events")).kv_events.snapshot
        registration.drain()
        await one.next("draining")
        await two.next("draining")


async def test_one_silent_coordinator_keeps_nobody_from_the_other(registry, another):
    listing = Listing(registry, another)
    async with worker(registry, Engine(), directory=listing) as registration:
        await (await registry.stream()).next("hello")
        await (await another.stream()).greet()
        await asyncio.wait_for(registration.registered.wait(), 30)


class Experts(Engine):
    """Has two experts, and counts their tokens since its start."""

    tokens = (0, 0)

    def stats(self):
        return EngineStats(expert_tokens=self.tokens)


async def test_each_hears_of_every_token_of_experts(registry, another):
    engine = Experts()
    async with worker(registry, engine, directory=Listing(registry, another)):
        streams = [await registry.stream(), await another.stream()]
        told = [[0, 0], [0, 0]]
        for stream in streams:
            await stream.greet()
        for total in ((5, 50), (7, 100)):
            engine.tokens = total
            for stream, sums in zip(streams, told, strict=True):
                while tuple(sums) != total:
                    stats = (await stream.next("heartbeat")).heartbeat.stats
                    for expert, tokens in enumerate(stats.expert_tokens):
                        sums[expert] += tokens


async def test_a_new_coordinator_is_registered_with(registry, another):
    listing = Listing(registry)
    async with worker(registry, Engine(), directory=listing):
        await (await registry.stream()).greet()
        listing.known.set([*listing.coordinators, f"127.0.0.1:{another.port}"])
        await (await another.stream()).greet()


async def test_one_off_the_list_is_kept_while_its_stream_works(registry, another):
    listing = Listing(registry, another)
    engine = Engine()
    async with worker(registry, engine, directory=listing) as registration:
        one, two = await registry.stream(), await another.stream()
        await one.greet()
        await two.greet()
        listing.known.set([f"127.0.0.1:{registry.port}"])
        await one.next("heartbeat")
        await two.next("heartbeat")
        await two.next("heartbeat")
        await two.fail("gone for good")
        await one.fail("restart")
        await (await registry.stream()).greet()
        assert another.streams.empty()
        await asyncio.wait_for(registration.registered.wait(), 30)


async def test_a_role_is_asked_for_by_any_and_told_to_all(registry, another):
    asked = asyncio.Queue()
    listing = Listing(registry, another)
    async with worker(
        registry, Engine(), directory=listing, on_role=lambda *why: asked.put_nowait(why)
    ) as registration:
        one, two = await registry.stream(), await another.stream()
        await one.greet()
        await two.greet()
        change = pb.ChangeRole(role=pb.WORKER_ROLE_DECODE, why="prompts are few")
        await two.say(pb.RegisterResponse(change_role=change))
        assert await asyncio.wait_for(asked.get(), 30) == ("decode", "prompts are few")
        registration.role_changed("decode")
        for stream in (one, two):
            told = (await stream.next("role_changed")).role_changed
            assert told.role == pb.WORKER_ROLE_DECODE
        await two.fail("restart")
        assert (await (await another.stream()).greet()).info.role == pb.WORKER_ROLE_DECODE
