"""A prompt's start fetched from a peer: what every engine owes about it, and about rules for KV."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import threading

import pytest

from services.engine.api import FinishReason, FirstTokens, Hold, KvPrefix, Request
from services.engine.build import build
from services.engine.stepped.prefix import Verdict
from services.runtime.settings import EngineSettings, KvSettings, ModelSettings
from tests.contract.test_engine import (
    BLOCK,
    GREEDY,
    PENALIZED,
    SAMPLED,
    WAIT,
    Worker,
    hand_off,
    llama,  # noqa: F401 - fixtures
    new,  # noqa: F401
    prompt,
)


@pytest.fixture
def fetching(monkeypatch):
    """Fetching is always judged better, and has time: what these tests are about."""
    monkeypatch.setattr(
        "services.engine.stepped.step.judge",
        lambda prefix, tokens, estimate, rate: Verdict(prefix, tokens, 0.0, 30.0, "the test"),
    )


def at(worker: Worker, tokens: int) -> KvPrefix:
    return KvPrefix("peer", worker.address, tokens)


def report(worker: Worker, request_id: str):
    return next(o.kv for o in worker.outputs[request_id] if o.kv is not None)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, PENALIZED])
async def test_tokens_are_those_of_one_engine(fetching, new, sampling):  # noqa: F811
    alone, peer, worker = await new(), await new(), await new()
    lengths = (BLOCK, BLOCK + 1, 3 * BLOCK - 1, 3 * BLOCK, 61)
    for i, length in enumerate(lengths):
        held = prompt(length, i)
        await peer.generate(f"p{i}", held, sampling)
        ids = held + prompt(9, 50 + i)
        expected = await alone.generate(f"a{i}", ids, sampling)
        request = Request(f"w{i}", ids, sampling)
        worker.engine.decode(request, None, at(peer, length))
        assert await worker.tokens(request.request_id) == expected
        told = report(worker, request.request_id)
        blocks = length // BLOCK
        assert told.prefix.tokens == blocks * BLOCK
        assert (told.blocks, told.transport) == (blocks, "shm")
        assert told.computed_tokens == len(ids) - blocks * BLOCK
        assert (told.exposed_seconds, told.lost) == (0.0, "")
    await peer.settled()
    await worker.settled()


async def test_a_prefix_goes_on_to_the_sink_of_a_hand_off(fetching, new):  # noqa: F811
    alone, peer, source, sink = await new(), await new(), await new(), await new()
    held = prompt(50)
    await peer.generate("p", held, GREEDY)
    request = Request("r", held + prompt(20, 3), SAMPLED)
    expected = await alone.generate("r", request.prompt_token_ids, SAMPLED)
    sink.engine.decode(request, source.source("r"))
    source.engine.prefill(request, Hold(600), at(peer, 50))
    first = await source.first("r")
    assert first.kv.prefix.tokens == 48
    sink.engine.proceed("r", FirstTokens(first.token_ids, first.handle))
    assert [*first.token_ids, *await sink.tokens("r")] == expected
    assert report(sink, "r").computed_tokens == 0
    for worker in (peer, source, sink):
        await worker.settled()


async def test_what_a_peer_lacks_is_computed(fetching, new):  # noqa: F811
    peer, worker, alone = await new(), await new(), await new()
    await peer.generate("p", prompt(30), GREEDY)
    ids = prompt(60)
    expected = await alone.generate("a", ids, GREEDY)
    worker.engine.decode(Request("r", ids, GREEDY), None, at(peer, 60))
    assert await worker.tokens("r") == expected
    told = report(worker, "r")
    assert told.lost.startswith("KV_SOURCE_LOST: 4 of the 7 blocks")
    assert (told.prefix.tokens, told.computed_tokens) == (0, 60)
    await peer.settled()
    await worker.settled()


async def test_another_tenants_blocks_are_not_to_be_had(fetching, new):  # noqa: F811
    peer, worker = await new(), await new()
    theirs = Request("p", prompt(40), GREEDY, tenant="theirs")
    peer.engine.decode(theirs, None)
    expected = await peer.tokens("p")
    ours = dataclasses.replace(theirs, request_id="r", tenant="ours")
    worker.engine.decode(ours, None, at(peer, 40))
    assert await worker.tokens("r") == expected
    assert report(worker, "r").prefix.tokens == 0
    same = dataclasses.replace(theirs, request_id="s")
    worker.engine.decode(same, None, at(peer, 40))
    assert await worker.tokens("s") == expected
    assert report(worker, "s").prefix.tokens == 32
    await peer.settled()
    await worker.settled()


async def test_cancelled_while_the_prefix_is_waited_for(fetching, new):  # noqa: F811
    worker = await new()
    came = asyncio.Event()

    async def say_nothing(reader, writer) -> None:
        came.set()
        await reader.read()
        writer.close()

    silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    host, port = silent.sockets[0].getsockname()
    prefix = KvPrefix("silent", f"{host}:{port}", 30)
    worker.engine.prefill(Request("r", prompt(40), GREEDY), Hold(600), prefix)
    worker.engine.decode(Request("s", prompt(40, 1), GREEDY), None, prefix)
    await came.wait()
    # Others are computed meanwhile.
    assert len(await worker.generate("t", prompt(10, 2), GREEDY)) == 12
    worker.engine.cancel("r")
    worker.engine.cancel("s")
    await worker.settled()
    silent.close()


async def test_a_peer_that_brings_nothing_in_time_is_not_asked_again(new, monkeypatch):  # noqa: F811
    """Of the estimate itself: it is by the prior until then, which says milliseconds."""
    estimates = []

    def patient(prefix, tokens, estimate, rate) -> Verdict:
        estimates.append(estimate)
        return Verdict(prefix, tokens, estimate.seconds, 0.2, "the test")

    monkeypatch.setattr("services.engine.stepped.step.judge", patient)

    async def say_nothing(reader, writer) -> None:
        await reader.read()
        writer.close()

    silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    worker = await new()
    prefix = KvPrefix("peer", f"127.0.0.1:{port}", 48)
    for i in range(2):
        worker.engine.decode(Request(f"r{i}", prompt(60, i), GREEDY), None, prefix)
        await worker.tokens(f"r{i}")
    first, second = estimates
    assert first.basis == "the prior"
    assert second.basis == "this peer"
    assert second.seconds > 0.15
    assert report(worker, "r1").prefix.reason.endswith("computed")
    await worker.settled()
    silent.close()


# Rules for where KV may go


@pytest.fixture
async def in_region():
    """in_region(region, **kv settings) -> a scripted Worker there."""
    workers = []

    async def make(region: str, **kv) -> Worker:
        engine = build(
            ModelSettings(name="tiny"),
            EngineSettings(kind="scripted", block_tokens=BLOCK, kv_blocks=64),
            KvSettings(**kv),
            "127.0.0.1",
            region,
        )
        worker = Worker(engine)
        await worker.start()
        workers.append(worker)
        return worker

    yield make
    for worker in workers:
        await worker.close()


async def test_kv_that_may_not_come_is_computed(in_region):
    source, sink, alone = await in_region("eu"), await in_region("us"), await in_region("")
    request = Request("r", prompt(40), GREEDY)
    expected = await alone.generate("a", prompt(40), GREEDY)
    assert await hand_off(source, sink, request) == expected
    told = report(sink, "r")
    words = "blocks stay in the source's region, eu; the sink says it is in region us"
    assert told.lost == f"KV_REGION_DENIED: {words}"
    assert (told.bytes, told.computed_tokens) == (0, 40)
    stats = source.engine.stats()
    assert (stats.kv_refused, source.engine.kv.servicer.refused) == (1, 1)
    (traffic, _) = sink.engine.stats().kv_traffic
    assert (traffic.transport, traffic.figures.refused, traffic.figures.bytes) == ("", 1, 0)
    await source.settled()
    await sink.settled()


async def test_too_much_to_compute_ends_with_the_rule(in_region):
    source, sink = await in_region("eu"), await in_region("us", recompute_max_tokens=16)
    request = Request("r", prompt(40), GREEDY)
    sink.engine.decode(request, source.source("r"))
    last = (await sink.ended("r"))[-1]
    assert (last.finish_reason, last.error.reason) == (FinishReason.ERROR, "KV_REGION_DENIED")
    assert "blocks stay in the source's region, eu" in last.error.message
    await sink.settled()


@pytest.mark.parametrize(
    ("tenant", "region", "moves"),
    [("bank", "eu", True), ("bank", "us", False), ("shop", "us", True), ("shop", "asia", False)],
)
async def test_a_tenants_own_rule(in_region, tenant, region, moves):
    source = await in_region("eu", export_regions=("us",), tenant_regions=("bank=eu",))
    sink = await in_region(region)
    request = Request("r", prompt(40), GREEDY, tenant=tenant)
    await hand_off(source, sink, request)
    told = report(sink, "r")
    assert bool(told.bytes) == moves
    assert told.lost.startswith("KV_REGION_DENIED") == (not moves)
    await source.settled()


async def test_what_a_request_has_computed_can_be_fetched_while_it_runs(
    fetching,
    new,  # noqa: F811
    monkeypatch,
):
    """As when it moves: the other worker needs none of it computed but the last, open block."""
    alone, old, successor = await new(), await new(), await new()
    model, go_on = old.engine._stepper._model, threading.Event()
    forward, steps = model.forward, itertools.count()

    def held_up(*args):
        # Still running when its KV has come, however long that takes.
        assert next(steps) < 36 or go_on.wait(WAIT)
        return forward(*args)

    monkeypatch.setattr(model, "forward", held_up)
    ids, long = prompt(21), dataclasses.replace(SAMPLED, max_tokens=120)
    expected = await alone.generate("a", ids, long)
    old.engine.decode(Request("r/0", ids, long), None)
    await old.until(lambda: len(old.outputs.get("r/0", ())) >= 30)
    known = [t for o in old.outputs["r/0"] for t in o.token_ids]
    has = len(ids) + len(known) - 1  # the last token's KV comes with the next
    successor.engine.decode(Request("r/1", ids, long, tuple(known)), None, at(old, has))
    await successor.first("r/1")
    assert old.outputs["r/0"][-1].finish_reason is None
    go_on.set()
    told = report(successor, "r/1")
    assert told.prefix.tokens == has // BLOCK * BLOCK
    assert told.computed_tokens == has + 1 - told.prefix.tokens
    assert known + await successor.tokens("r/1") == expected
    assert await old.tokens("r/0") == expected  # it took nothing from who goes on
    for worker in (old, successor):
        await worker.settled()
