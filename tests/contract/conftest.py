"""The two ends of KV tests, and which event loop contract tests run on."""

import asyncio

import pytest
import uvloop

from kvtransfer.endpoint import KvEndpoint
from kvtransfer.store import KvStore
from tests.contract.kv_rig import RemoteSource
from tests.contract.kv_sink import NAMES, Sink
from tests.contract.kv_source import layout

ON_UVLOOP = ("test_kv_endpoint.py", "test_kv_faults.py", "test_weights_fetch.py")


def pytest_asyncio_loop_factories(config, item):
    """KV tests run on the loop that workers have; transports, which use raw sockets, on both.

    Where a test needs a source for itself, which takes a second to start, one loop is enough.
    """
    if item.path.name == "test_transports.py":
        if "own_source" in item.fixturenames:
            return {"uvloop": uvloop.new_event_loop}
        return {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}
    if item.path.name in ON_UVLOOP:
        return {"uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}


@pytest.fixture(autouse=True)
def tiers_have_time(monkeypatch):
    """A tiny engine computes a block again in no time, and a busy machine's threads wait longer."""
    monkeypatch.setattr("services.engine.stepped.prefix.LEAST_TIER_SECONDS", 60.0)


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def shared_sources():
    """One source for each transport, for tests that leave it as they found it."""
    sources = {n: RemoteSource(transports=[n]) for n in NAMES}
    yield sources
    for source in sources.values():
        source.close()


@pytest.fixture
async def source(name, shared_sources):
    yield shared_sources[name]
    await shared_sources[name].idle()
    await shared_sources[name].do("drop_cache")


@pytest.fixture
def own_source(name):
    """A source for a test that harms it."""
    source = RemoteSource(transports=[name], lease_seconds=0.4)
    yield source
    source.close()


@pytest.fixture
async def make_sink(request):
    sinks = []
    # What is under test alone: agents that nobody asks for cost a second.
    tested = "name" in request.fixturenames
    offered = (request.getfixturevalue("name"),) if tested else ("shm", "tcp")

    async def make(
        transports=offered,
        layers_per_piece=2,
        fetch_seconds=15.0,
        host_id=None,
        stall_seconds=15.0,
        renew_seconds=5.0,
        **fields,
    ):
        store = KvStore(layout(**fields), 64, layers_per_piece=layers_per_piece)
        endpoint = KvEndpoint(
            store,
            transports=transports,
            host_id=host_id,
            fetch_timeout_seconds=fetch_seconds,
            stall_seconds=stall_seconds,
            renew_seconds=renew_seconds,
        )
        await endpoint.start()
        sinks.append(Sink(store, endpoint))
        return sinks[-1]

    yield make
    for sink in sinks:
        await sink.endpoint.close()
        sink.store.check_integrity()
        assert sink.store.stats().watches == 0
        sink.store.close()


@pytest.fixture
async def sink(make_sink) -> Sink:
    return await make_sink()
