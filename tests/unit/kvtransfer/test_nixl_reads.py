"""The thread that reads with NIXL, against an agent that does as it is told."""

import asyncio
import threading

import numpy as np
import pytest

from kvtransfer.transports.descriptors import Descriptors
from kvtransfer.transports.nixl_agent import NixlError, NixlLostError, NixlUnsureError
from kvtransfer.transports.nixl_reads import FORGOTTEN_SOURCES, NixlReads

TABLE = np.array([[4096, 10, 0]], np.uint64)
WORK = [Descriptors("DRAM", "DRAM", TABLE, TABLE)]
HANG, DONE = object(), object()


class Agent:
    """Reads of a source end as `behaviour` says: at once, never, or with an error."""

    def __init__(self, behaviour: dict[bytes, object]) -> None:
        self.behaviour = behaviour
        self.loaded: dict[str, bytes] = {}
        self.reading: dict[int, str] = {}
        self.released: list[int] = []
        self.closed = False
        self.began = 0
        self.thread = threading.current_thread()

    def load(self, metadata: bytes) -> str:
        assert metadata not in self.loaded.values(), "a source must not be loaded twice"
        if metadata == b"broken":
            raise NixlError("metadata")
        name = f"agent of {metadata.decode()}"
        self.loaded[name] = metadata
        return name

    def forget(self, name: str) -> None:
        assert name not in self.reading.values(), "forgotten while it is read from"
        del self.loaded[name]

    def read(self, name: str, work: Descriptors) -> int:
        assert threading.current_thread() is self.thread
        self.began += 1
        self.reading[self.began] = name
        return self.began

    def ended(self, handle: int) -> bool:
        assert not self.closed
        how = self.behaviour.get(self.loaded[self.reading[handle]], DONE)
        if isinstance(how, Exception):
            raise how
        return how is DONE

    def release(self, handle: int) -> None:
        del self.reading[handle]
        self.released.append(handle)

    def progress(self) -> None:
        pass

    def close(self) -> None:
        assert not self.reading, "closed with handles that were not released"
        self.closed = True


class Rig:
    def __init__(self) -> None:
        self.agents: list[Agent] = []
        self.behaviour: dict[bytes, object] = {}
        self.no_more = False
        self.reads = NixlReads(self._make, grace=0.05)

    def _make(self) -> Agent:
        if self.no_more:
            raise NixlError("no device")
        self.agents.append(Agent(self.behaviour))
        return self.agents[-1]


@pytest.fixture
async def rig():
    rig = Rig()
    await rig.reads.start()
    yield rig
    await rig.reads.close()
    assert all(agent.closed for agent in rig.agents)


async def under_way(rig: Rig, count: int) -> None:
    async with asyncio.timeout(5):
        while len(rig.agents[-1].reading) < count:  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_reads_end_and_a_source_is_loaded_once(rig):
    await asyncio.gather(*(rig.reads.read(b"a", WORK, 5) for _ in range(10)))
    await rig.reads.read(b"b", WORK * 3, 5)
    (agent,) = rig.agents
    assert set(agent.loaded.values()) == {b"a", b"b"}
    assert len(agent.released) == 13


async def test_nothing_to_read_is_over_at_once(rig):
    await rig.reads.read(b"a", [], 5)


async def test_a_read_that_hangs_ends_with_its_agent(rig):
    rig.behaviour[b"frozen"] = HANG
    with pytest.raises(NixlError):
        await rig.reads.read(b"frozen", WORK, 0.01)
    assert rig.agents[0].closed
    await rig.reads.read(b"a", WORK, 5)
    assert not rig.agents[1].closed
    assert rig.reads.replaced == 1


async def test_a_cancelled_read_is_given_time_to_end_by_itself(rig):
    rig.behaviour[b"slow"] = HANG
    reading = asyncio.create_task(rig.reads.read(b"slow", WORK, 5))
    await under_way(rig, 1)
    reading.cancel()
    await asyncio.sleep(0)
    rig.behaviour[b"slow"] = DONE
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert rig.reads.replaced == 0
    assert rig.agents[0].released


async def test_a_cancelled_read_that_does_not_end_is_outlasted_however_often_one_cancels(rig):
    rig.behaviour[b"frozen"] = HANG
    reading = asyncio.create_task(rig.reads.read(b"frozen", WORK, 5))
    await under_way(rig, 1)
    while not reading.done():
        reading.cancel()
        await asyncio.sleep(0)
    assert reading.cancelled()
    assert rig.agents[0].closed


async def test_reads_of_others_begin_again_unseen(rig):
    rig.behaviour.update({b"frozen": HANG, b"other": HANG})
    other = asyncio.create_task(rig.reads.read(b"other", WORK, 5))
    with pytest.raises(NixlError):
        await rig.reads.read(b"frozen", WORK, 0.01)
    assert not other.done()
    rig.behaviour[b"other"] = DONE
    await other
    assert rig.agents[1].began == 1


async def test_a_lost_source_costs_no_agent_and_can_be_met_again(rig):
    rig.behaviour.update({b"dead": NixlLostError("gone"), b"other": HANG})
    other = asyncio.create_task(rig.reads.read(b"other", WORK, 5))
    for _ in range(3):
        with pytest.raises(NixlLostError):
            await rig.reads.read(b"dead", WORK, 5)
    rig.behaviour.update({b"dead": DONE, b"other": DONE})
    await rig.reads.read(b"dead", WORK, 5)
    await other
    assert rig.reads.replaced == 0


async def test_several_reads_of_a_source_that_dies(rig):
    rig.behaviour[b"dead"] = HANG
    readings = [asyncio.create_task(rig.reads.read(b"dead", WORK * 2, 5)) for _ in range(4)]
    await under_way(rig, 8)
    rig.behaviour[b"dead"] = NixlLostError("gone")
    results = await asyncio.gather(*readings, return_exceptions=True)
    assert all(isinstance(result, NixlLostError) for result in results)
    assert not rig.agents[0].loaded
    assert rig.reads.replaced == 0


async def test_an_error_that_leaves_it_open_what_is_written_costs_the_agent(rig):
    rig.behaviour[b"odd"] = NixlUnsureError("backend")
    with pytest.raises(NixlUnsureError):
        await rig.reads.read(b"odd", WORK, 5)
    assert rig.agents[0].closed
    rig.behaviour.clear()
    await rig.reads.read(b"odd", WORK, 5)


async def test_metadata_that_can_not_be_loaded(rig):
    with pytest.raises(NixlError, match="metadata"):
        await rig.reads.read(b"broken", WORK, 5)
    assert rig.reads.replaced == 0


async def test_no_new_agent_is_an_error_until_there_is_one(rig):
    rig.behaviour[b"frozen"] = HANG
    rig.no_more = True
    with pytest.raises(NixlError):
        await rig.reads.read(b"frozen", WORK, 0.01)
    with pytest.raises(NixlError, match="no device"):
        await rig.reads.read(b"a", WORK, 5)
    rig.no_more = False
    await rig.reads.read(b"a", WORK, 5)


async def test_forgetting_waits_for_nobody_and_harms_nobody(rig):
    rig.behaviour[b"a"] = HANG
    reading = asyncio.create_task(rig.reads.read(b"a", WORK, 5))
    await under_way(rig, 1)
    rig.reads.forget(b"a")
    rig.reads.forget(b"never met")
    rig.behaviour[b"a"] = DONE
    await reading
    rig.reads.forget(b"a")
    await rig.reads.read(b"b", WORK, 5)
    assert set(rig.agents[0].loaded.values()) == {b"b"}


async def test_an_agent_that_forgot_many_sources_is_renewed_when_nothing_is_read(rig):
    rig.behaviour[b"kept"] = HANG
    reading = asyncio.create_task(rig.reads.read(b"kept", WORK, 5))
    for i in range(FORGOTTEN_SOURCES):
        source = f"source {i}".encode()
        await rig.reads.read(source, WORK, 5)
        rig.reads.forget(source)
    await rig.reads.read(b"another", WORK, 5)
    assert len(rig.agents) == 1
    rig.behaviour[b"kept"] = DONE
    await reading
    await rig.reads.read(b"another", WORK, 5)
    assert len(rig.agents) == 2
    assert rig.reads.replaced == 0


async def test_closing_ends_what_is_under_way(rig):
    rig.behaviour[b"frozen"] = HANG
    reading = asyncio.create_task(rig.reads.read(b"frozen", WORK, 5))
    await under_way(rig, 1)
    await rig.reads.close()
    with pytest.raises(NixlError):
        await reading
    with pytest.raises(NixlError):
        await rig.reads.read(b"a", WORK, 5)


async def test_an_agent_that_can_not_be_made_is_told_at_the_start():
    rig = Rig()
    rig.no_more = True
    with pytest.raises(NixlError, match="no device"):
        await rig.reads.start()
    await rig.reads.close()


async def test_a_start_that_fails_in_any_way_is_told():
    """A package that changed raises what nobody thought of; a start must not hang for it."""

    def changed() -> object:
        raise AttributeError("no such thing any more")

    reads = NixlReads(changed, grace=0.05)
    async with asyncio.timeout(5):
        with pytest.raises(NixlError, match="no such thing any more"):
            await reads.start()
        await reads.close()
