"""The KV hand-off when something goes wrong with one side, over every transport, in two processes.

Each of these ends in a bounded time, with the blocks back, and nothing used that is not right.
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

import kvtransfer.reading
from kvtransfer.errors import KvError, KvSourceLostError, WrongTenantError
from tests.contract.kv_rig import RemoteSource
from tests.contract.kv_sink import LAYERS, Sink, fresh_keys, fresh_lease
from tests.contract.kv_source import content

SOON = 12.0
"""Seconds that end() allows: what is tested has bounds of a second or two, a fetch of fifteen."""


async def end(fetch: Awaitable) -> KvError | None:
    """How a fetch ended, which it must have done soon."""
    async with asyncio.timeout(SOON):
        try:
            await fetch
        except KvError as error:
            return error
    return None


def at_each_read(sink: Sink, name: str, monkeypatch, hook: Callable[[int], Awaitable]) -> None:
    """Runs `hook(number)` before every read of the sink over a transport."""
    transport = next(t for t in sink.endpoint._transports if t.name == name)
    connect, count = transport.connect, iter(range(10_000))

    async def connect_hooked(*args):
        reader = await connect(*args)
        read = reader.read

        async def hooked(reads, timeout):
            loop = asyncio.get_running_loop()
            until = loop.time() + timeout
            await hook(next(count))
            await read(reads, max(0.0, until - loop.time()))

        reader.read = hooked
        return reader

    monkeypatch.setattr(transport, "connect", connect_hooked)


def right(sink: Sink, keys: list[bytes], blocks: list[int], complete: tuple[bool, ...]) -> bool:
    """What is called complete has the bytes of its key."""
    size = sink.store.block_bytes
    return all(
        np.array_equal(sink.store.memory[b], content(k, size))
        for k, b, whole in zip(keys, blocks, complete, strict=True)
        if whole
    )


# Killed, stopped


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_before_the_fetch(own_source, make_sink, how):
    sink = await make_sink(stall_seconds=0.5)
    keys, lease = fresh_keys(3), fresh_lease()
    await own_source.do("offer", lease=lease, keys=keys)
    own_source.signal(how)
    error = await end(sink.endpoint.fetch(own_source.address, lease, keys, sink.allocate(3)))
    assert isinstance(error, KvSourceLostError)
    assert error.complete == (False,) * 3


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_while_it_reads(name, own_source, make_sink, monkeypatch, how):
    """Whatever the transport, nothing wrong is taken for right.

    Mapped memory can still be read. So can that of a stopped process, by the kernel (UCX's cma,
    which NIXL uses), if the two had come to know each other before it stopped.
    """
    sink = await make_sink(stall_seconds=0.5)
    keys, lease = fresh_keys(20), fresh_lease()
    await own_source.do("offer", lease=lease, keys=keys, gaps=1)
    blocks = sink.allocate(20)

    async def strike(number: int) -> None:
        if number == 0:
            own_source.signal(how)

    at_each_read(sink, name, monkeypatch, strike)
    error = await end(sink.endpoint.fetch(own_source.address, lease, keys, blocks))
    complete = error.complete if isinstance(error, KvSourceLostError) else (True,) * 20
    assert right(sink, keys, blocks, complete)
    if name != "shm" and not (name == "nixl" and how is signal.SIGSTOP):
        assert isinstance(error, KvSourceLostError)
    before = sink.store.memory.copy()
    own_source.signal(signal.SIGCONT if how is signal.SIGSTOP else signal.SIGKILL)
    sink.store.release(blocks)
    await asyncio.gather(*sink.endpoint._releasing)
    assert np.array_equal(sink.store.memory, before)  # Nothing came late.


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_while_it_waits_for_the_prompt(own_source, make_sink, monkeypatch, how):
    """The fetch may take a minute, a source that does not answer may not."""
    sink = await make_sink(fetch_seconds=60.0, stall_seconds=2.0, renew_seconds=0.1)
    keys, lease = fresh_keys(2), fresh_lease()
    await own_source.do("open", lease=lease)
    await own_source.do("add", lease=lease, keys=keys)
    await own_source.do("write", keys=keys[:1], first=0, layers=LAYERS)
    arrived = asyncio.Event()
    blocks = sink.allocate(2)
    fetch = asyncio.create_task(
        sink.endpoint.fetch(
            own_source.address, lease, keys, blocks, on_progress=lambda _: arrived.set()
        )
    )
    await arrived.wait()
    # Not before: a source that is well may take longer on a busy machine.
    monkeypatch.setattr("kvtransfer.sink.RENEW_TIMEOUT_SECONDS", 0.3)
    own_source.signal(how)
    error = await end(fetch)
    assert isinstance(error, KvSourceLostError)
    assert error.complete == (True, False)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_after_the_last_byte(own_source, sink, how):
    keys, lease = fresh_keys(3), fresh_lease()
    await own_source.do("offer", lease=lease, keys=keys)
    blocks = sink.allocate(3)
    report = await sink.endpoint.fetch(own_source.address, lease, keys, blocks, release=False)
    own_source.signal(how)
    sink.endpoint.release(own_source.address, lease)
    assert right(sink, keys, blocks, report.complete)
    async with asyncio.timeout(SOON):
        await asyncio.gather(*sink.endpoint._releasing)


async def test_a_short_stop_does_not_matter(own_source, make_sink):
    sink = await make_sink(stall_seconds=5.0, renew_seconds=0.1)
    keys, lease = fresh_keys(3), fresh_lease()
    await own_source.do("offer", lease=lease, keys=keys)
    own_source.signal(signal.SIGSTOP)
    fetch = asyncio.create_task(
        sink.endpoint.fetch(own_source.address, lease, keys, sink.allocate(3))
    )
    done, _ = await asyncio.wait([fetch], timeout=0.3)
    assert not done
    own_source.signal(signal.SIGCONT)
    assert await end(fetch) is None


async def test_what_is_missing_comes_from_somebody_else(name, own_source, make_sink):
    """Content addresses: the rest of a fetch that lost its source is fetched from any holder."""
    sink = await make_sink()
    keys, lease = fresh_keys(5), fresh_lease()
    other = RemoteSource(transports=[name])
    try:
        await other.do("cache", keys=keys)
        await own_source.do("open", lease=lease)
        await own_source.do("add", lease=lease, keys=keys)
        await own_source.do("write", keys=keys[:2], first=0, layers=LAYERS)
        await own_source.do("write", keys=keys[2:], first=0, layers=2)
        two, blocks = asyncio.Semaphore(0), sink.allocate(5)
        fetch = asyncio.create_task(
            sink.endpoint.fetch(
                own_source.address, lease, keys, blocks, on_progress=lambda _: two.release()
            )
        )
        await two.acquire()
        await two.acquire()
        own_source.kill()
        error = await end(fetch)
        assert isinstance(error, KvSourceLostError)
        assert error.complete == (True, True, False, False, False)
        rest = [i for i, whole in enumerate(error.complete) if not whole]
        report = await sink.endpoint.fetch(
            other.address, fresh_lease(), [keys[i] for i in rest], [blocks[i] for i in rest]
        )
        assert report.bytes == 3 * sink.store.block_bytes
        assert right(sink, keys, blocks, (True,) * 5)
        await other.idle()
    finally:
        other.close()


async def test_somebody_accepts_and_never_answers(make_sink):
    """A half-open connection, or a port that something else has."""
    sink = await make_sink(stall_seconds=0.3)
    held: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, writer: held.append(writer), "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    error = await end(
        sink.endpoint.fetch(f"{host}:{port}", "x", fresh_keys(1), sink.allocate(1), release=False)
    )
    assert isinstance(error, KvSourceLostError)
    for writer in held:
        writer.close()
    server.close()


# Slow readers and memory that is given away


async def test_a_slow_read_keeps_its_lease(name, own_source, make_sink, monkeypatch):
    """Slower than the lease is long, by as much as a busy machine needs: renewals carry it."""
    sink = await make_sink(renew_seconds=0.1)
    keys, lease = fresh_keys(3), fresh_lease()
    await own_source.do("offer", lease=lease, keys=keys, seconds=1.5)

    async def slowly(number: int) -> None:
        if number == 0:
            await asyncio.sleep(2.5)
            assert (await own_source.do("stats"))["expired"] == 0

    at_each_read(sink, name, monkeypatch, slowly)
    blocks = sink.allocate(3)
    report = await sink.endpoint.fetch(own_source.address, lease, keys, blocks)
    assert right(sink, keys, blocks, report.complete)
    assert report.complete == (True,) * 3
    await own_source.idle()


@pytest.mark.parametrize("blind", [False, True], ids=["both checks", "generations alone"])
async def test_memory_reused_under_a_read(name, source, sink, monkeypatch, blind):
    """The lease ends and others get the memory between announcement and read.

    Of a source with long leases: the sink asks often for short ones, and hears that this is over.
    """
    if blind:
        monkeypatch.setattr(kvtransfer.reading, "checksum", lambda _: AlwaysRight())
    keys, lease = fresh_keys(4), fresh_lease()
    await source.do("offer", lease=lease, keys=keys)

    async def reuse(number: int) -> None:
        if number == 0:
            await source.do("end", lease=lease, why="cancelled")
            await source.do("cache", keys=fresh_keys(64))

    at_each_read(sink, name, monkeypatch, reuse)
    blocks = sink.allocate(4)
    error = await end(sink.endpoint.fetch(source.address, lease, keys, blocks, partial_last=False))
    assert isinstance(error, KvSourceLostError)
    assert error.metadata["cause"] == "STALE"
    assert error.complete == (False,) * 4
    assert sink.endpoint.counters.stale == 1
    sink.store.release(blocks)
    assert sink.store.match(keys) == []


class AlwaysRight:
    """A checksum that finds nothing wrong."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


# What is held, and whose


async def test_what_is_not_held_is_said_at_once(source, sink):
    keys = fresh_keys(4)
    await source.do("cache", keys=keys[:3])
    error = await end(
        sink.endpoint.fetch(source.address, fresh_lease(), keys, sink.allocate(4), held_only=True)
    )
    assert isinstance(error, KvSourceLostError)
    assert error.metadata["cause"] == "BLOCKS_NOT_HELD"
    assert error.metadata["held"] == "3"
    report = await sink.endpoint.fetch(
        source.address, fresh_lease(), keys[:3], sink.allocate(3), held_only=True
    )
    assert report.complete == (True,) * 3


async def test_blocks_of_another_tenant(source, sink):
    keys, lease = fresh_keys(2), fresh_lease()
    await source.do("cache", keys=keys)
    error = await end(
        sink.endpoint.fetch(source.address, lease, keys, sink.allocate(2), tenant="somebody")
    )
    assert isinstance(error, WrongTenantError)


async def test_a_prompt_of_another_tenant(source, sink):
    """Also when the fetch is there first."""
    for first in ("fetch", "prompt"):
        keys, lease = fresh_keys(2), fresh_lease()
        if first == "prompt":
            await source.do("open", lease=lease)
        fetch = asyncio.create_task(
            sink.endpoint.fetch(source.address, lease, keys, sink.allocate(2), tenant="somebody")
        )
        if first == "fetch":
            await source.do("settle", watches=1)
            await source.do("open", lease=lease)
            await source.do("add", lease=lease, keys=keys)
            await source.do("end", lease=lease, why="over")
            await source.do("forget", keys=keys)
        assert isinstance(await end(fetch), WrongTenantError)
