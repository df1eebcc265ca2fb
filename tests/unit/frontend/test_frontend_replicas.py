"""One frontend and several coordinators, which die, fall silent, know nobody, and come back."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter

import grpc
import pytest

from services.frontend import coordinator as coordinator_module
from services.frontend import replicas as module
from services.frontend.coordinator import Coordinator
from services.frontend.events import Report
from services.frontend.replicas import Replicas
from services.frontend.served import ServedModel
from services.frontend.validate import Wishes
from services.runtime.channels import Channels
from services.runtime.directory import Known, StaticDirectory
from services.runtime.errors import (
    CoordinatorUnavailableError,
    NoWorkersError,
    OverloadedError,
    TandemError,
)
from services.runtime.server import Server
from services.runtime.settings import ServerSettings
from tandem.coordinator.v1 import coordinator_pb2 as pb
from tandem.coordinator.v1 import coordinator_pb2_grpc as pb_grpc

MODEL = ServedModel("m", "layout", 4, 1000, 1, 1)
SLOW_MACHINE = 15.0


class Fake(pb_grpc.CoordinatorServiceServicer):
    """A coordinator behind a relay, by which it can be cut off or fall silent."""

    def __init__(self):
        self.places: list[str] = []
        self.cancelled: list[str] = []
        self.reports: list[pb.ReportRequest] = []
        self.refuse: TandemError | None = None
        self.models = [pb.ServedModel(model="m", decode_workers=1)]
        self.gate = asyncio.Event()
        self.gate.set()
        self.awake = asyncio.Event()
        self.awake.set()
        self._server: Server | None = None
        self._relay: asyncio.Server | None = None
        self._pipes: set[asyncio.Task] = set()
        self._port = 0

    @property
    def address(self):
        return f"127.0.0.1:{self._port}"

    async def start(self):
        self._server = Server(ServerSettings(), "fake")
        self._server.add(pb_grpc.add_CoordinatorServiceServicer_to_server, self, "c")
        behind = (await self._server.start()).rpartition(":")[2]

        async def accept(reader, writer):
            there, here = await asyncio.open_connection("127.0.0.1", int(behind))
            for a, b in ((reader, here), (there, writer)):
                task = asyncio.create_task(self._pipe(a, b))
                self._pipes.add(task)
                task.add_done_callback(self._pipes.discard)

        self._relay = await asyncio.start_server(accept, "127.0.0.1", self._port)
        self._port = self._relay.sockets[0].getsockname()[1]

    async def _pipe(self, reader, writer):
        with contextlib.suppress(ConnectionError):
            try:
                while data := await reader.read(2**16):
                    await self.awake.wait()
                    writer.write(data)
                    await writer.drain()
            finally:
                writer.close()

    async def kill(self):
        if self._relay is None:
            return
        relay, self._relay = self._relay, None
        relay.close()
        for task in list(self._pipes):
            task.cancel()
        await asyncio.gather(*self._pipes, return_exceptions=True)
        await self._server.stop(None)

    async def Place(self, request, context):  # noqa: N802
        self.places.append(request.request_id)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.append(request.request_id)
            raise
        if self.refuse is not None:
            raise self.refuse
        decode = pb.PlacedWorker(worker_id="d", address="d:1")
        return pb.PlaceResponse(decode=decode, reasons=[self.address])

    async def Report(self, request, context):  # noqa: N802
        self.reports.append(request)
        return pb.ReportResponse()

    async def GetModels(self, request, context):  # noqa: N802
        return pb.GetModelsResponse(models=self.models)


class Listing:
    """A directory that the test writes."""

    def __init__(self, *coordinators):
        self.known = Known(coordinators)

    @property
    def coordinators(self):
        return self.known.coordinators


class World:
    def __init__(self, fakes, listing, channels):
        self.listing = listing
        self.coordinator = Coordinator(listing, channels, "f-1", time.monotonic)
        self.by_address = {fake.address: fake for fake in fakes}
        order = list(self.coordinator._replicas._in_order())
        self.first, *rest = (self.by_address[replica.address] for replica in order)
        self.second = rest[0] if rest else None

    async def place(self, request_id, timeout=20.0):
        """The coordinator that placed it."""
        placement = await self.coordinator.place(
            request_id,
            0,
            (),
            served=MODEL,
            block_keys=(),
            context_tokens=4,
            max_tokens=4,
            timeout=timeout,
            wishes=Wishes(),
        )
        return self.by_address[placement.reasons[0]]


@contextlib.asynccontextmanager
async def a_world(count):
    fakes = [Fake() for _ in range(count)]
    for fake in fakes:
        await fake.start()
    channels = Channels()
    world = World(fakes, Listing(*(fake.address for fake in fakes)), channels)
    try:
        yield world
    finally:
        for fake in fakes:
            fake.gate.set()
            fake.awake.set()
        await world.coordinator.close()
        await channels.close()
        for fake in fakes:
            await fake.kill()


@pytest.fixture
async def two():
    async with a_world(2) as world:
        yield world


async def eventually(what):
    async with asyncio.timeout(30):
        while not what():  # noqa: ASYNC110 - seen from outside
            await asyncio.sleep(0.005)


async def test_it_asks_its_first_one_while_that_is_there(two):
    assert [await two.place(f"r{i}") for i in range(5)] == [two.first] * 5
    assert not two.second.places


async def test_a_dead_one_costs_a_request_nothing_but_a_moment(two):
    await two.place("r0")
    await two.first.kill()
    began = time.monotonic()
    assert await two.place("r1") is two.second
    assert time.monotonic() - began < SLOW_MACHINE
    assert two.second.places == ["r1"]


async def test_one_that_dies_with_requests_in_its_queue(two):
    two.first.gate.clear()
    waiting = [asyncio.create_task(two.place(f"r{i}")) for i in range(3)]
    await eventually(lambda: len(two.first.places) == 3)
    await two.first.kill()
    assert await asyncio.gather(*waiting) == [two.second] * 3


async def test_a_silent_one_is_left_within_a_second_or_so(two, monkeypatch):
    await two.place("r0")
    two.first.awake.clear()
    began = time.monotonic()
    assert await two.place("r1") is two.second
    assert time.monotonic() - began < SLOW_MACHINE
    # And asked no more, which would take this long.
    monkeypatch.setattr(module, "PING_SECONDS", 2 * SLOW_MACHINE)
    began = time.monotonic()
    assert await two.place("r2") is two.second
    assert time.monotonic() - began < SLOW_MACHINE


async def test_a_queue_is_no_silence(two, monkeypatch):
    monkeypatch.setattr(module, "PING_AFTER_SECONDS", 0.05)
    monkeypatch.setattr(module, "PING_SECONDS", SLOW_MACHINE)
    pings = []
    check = module.Replica._ping

    async def counted(self):
        pings.append(self.address)
        return await check(self)

    monkeypatch.setattr(module.Replica, "_ping", counted)
    two.first.gate.clear()
    waiting = asyncio.create_task(two.place("r"))
    await eventually(lambda: len(pings) >= 5)
    two.first.gate.set()
    assert await waiting is two.first
    assert not two.second.places
    await eventually(lambda: two.coordinator._replicas.pick()._watch is None)


async def test_the_only_one_is_waited_for_although_it_is_silent():
    async with a_world(1) as world:
        await world.place("r0")
        world.first.awake.clear()
        waiting = asyncio.create_task(world.place("r1"))
        await eventually(lambda: not world.coordinator._replicas.pick().up)
        world.first.awake.set()
        assert await waiting is world.first
        await eventually(lambda: world.coordinator._replicas.pick().up)


async def test_while_all_are_away_requests_wait(two):
    await two.first.kill()
    await two.second.kill()
    waiting = asyncio.create_task(two.place("r"))
    await eventually(lambda: not two.coordinator._replicas.up())
    await two.second.start()
    assert await waiting is two.second


async def test_nobody_waits_for_ever(two, monkeypatch):
    monkeypatch.setattr(coordinator_module, "PATIENCE_SECONDS", 0.3)
    await two.first.kill()
    await two.second.kill()
    with pytest.raises(CoordinatorUnavailableError, match="can't be reached"):
        await two.place("r")


@pytest.mark.parametrize("refusal", [NoWorkersError, OverloadedError])
async def test_only_who_knows_nobody_is_not_the_last_word(two, refusal):
    two.first.refuse = refusal("no")
    if refusal is NoWorkersError:
        assert await two.place("r") is two.second
        two.second.refuse = NoWorkersError("no, really")
        began = time.monotonic()
        with pytest.raises(NoWorkersError, match="really"):
            await two.place("s")
        assert time.monotonic() - began < SLOW_MACHINE
    else:
        with pytest.raises(OverloadedError):
            await two.place("r")
        assert not two.second.places


async def test_it_goes_back_when_its_first_one_has_been_there_for_a_while(two, monkeypatch):
    monkeypatch.setattr(module, "HOME_SECONDS", 0.5)
    await two.first.kill()
    assert await two.place("r0") is two.second
    await two.first.start()
    await eventually(lambda: len(two.coordinator._replicas.up()) == 2)
    assert await two.place("r1") is two.second, "not at once: workers have to register first"
    async with asyncio.timeout(30):
        while await two.place("r") is two.second:  # noqa: ASYNC110 - time is what has to pass
            await asyncio.sleep(0.02)


async def test_models_are_those_of_one_that_knows_some(two):
    two.first.models = []
    assert [m.name for m in await two.coordinator.list_models()] == ["m"]
    assert (await two.coordinator.model("m")).name == "m"
    two.second.models = []
    assert await two.coordinator.list_models() == ()
    assert (await two.coordinator.model("m")).name == "m", "known from before"
    assert await two.coordinator.model("other") is None


async def test_who_placed_it_hears_of_its_end(two):
    await two.place("r0")
    await two.coordinator.report("r0", Report(0, generated_tokens=7, computed_tokens=4))
    (report,) = two.first.reports
    assert (report.request_id, report.generated_tokens, report.computed_tokens) == ("r0", 7, 4)
    assert not two.second.reports
    assert not two.coordinator._asked


async def test_of_a_worker_out_of_reach_all_hear(two):
    await two.place("r0")
    report = Report(0, failed_worker="d", failure="WORKER_LOST", unreachable=True)
    await two.coordinator.report("r0", report)
    await eventually(lambda: two.first.reports and two.second.reports)


async def test_a_report_to_the_dead_holds_nobody_up(two):
    await two.place("r0")
    await two.place("r1")
    await two.first.kill()
    sent = two.coordinator.report("r0", Report(0))
    if sent is not None:
        await asyncio.wait_for(sent, SLOW_MACHINE)
    assert await two.place("r2") is two.second
    assert two.coordinator.report("r1", Report(0)) is None, "nobody is left who cares"
    failed = two.coordinator.report("r1", Report(0, failed_worker="d", failure="ENGINE_FAILED"))
    await asyncio.wait_for(failed, SLOW_MACHINE)
    assert two.second.reports[0].failed_worker == "d"


async def test_a_request_that_is_cancelled_leaves_the_queue(two):
    two.first.gate.clear()
    waiting = asyncio.create_task(two.place("r"))
    await eventually(lambda: two.first.places)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await eventually(lambda: two.first.cancelled == ["r"])
    assert not two.second.places
    # It may have been placed: whoever was asked is told.
    await two.coordinator.report("r", Report(0))
    assert len(two.first.reports) == 1


async def test_one_that_shuts_down_is_left_at_once(two):
    two.first.refuse = CoordinatorUnavailableError("shutting down")
    assert await two.place("r0") is two.second
    assert await two.place("r1") is two.second


async def test_the_directory_brings_new_ones_and_takes_dead_ones(two):
    await two.place("r0")
    two.listing.known.set([two.second.address])
    assert await two.place("r1") is two.first, "it answers, whatever the directory says"
    await two.first.kill()
    assert await two.place("r2") is two.second
    two.coordinator._replicas.pick()
    assert [r.address for r in two.coordinator._replicas.up()] == [two.second.address]
    late = Fake()
    await late.start()
    two.by_address[late.address] = late
    two.listing.known.set([late.address, two.second.address])
    await two.second.kill()
    assert await two.place("r3") is late
    await late.kill()


async def test_with_no_coordinator_known_it_waits_for_one(two):
    known = two.listing.coordinators
    channels = Channels()
    listing = Listing()
    late = Coordinator(listing, channels, "f-2", time.monotonic)
    waiting = asyncio.create_task(late.model("m"))
    await asyncio.sleep(0)
    listing.known.set(known)
    assert (await waiting).name == "m"
    await late.close()
    await channels.close()


async def test_the_clients_deadline_holds(two):
    two.first.gate.clear()
    with pytest.raises(TandemError) as caught:
        await two.place("r", timeout=0.2)
    assert caught.value.code == grpc.StatusCode.DEADLINE_EXCEEDED.name
    assert not two.second.places


async def test_frontends_spread():
    channels = Channels()
    addresses = [f"127.0.0.1:{n}" for n in range(1, 4)]
    directory = StaticDirectory(addresses)
    firsts = Counter(
        Replicas(directory, channels, f"frontend-{n}", time.monotonic).pick().address
        for n in range(300)
    )
    assert set(firsts) == set(addresses)
    assert min(firsts.values()) > 60
    await channels.close()
