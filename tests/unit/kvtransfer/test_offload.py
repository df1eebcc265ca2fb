import asyncio
import threading

import pytest

from kvtransfer.offload import INLINE_BYTES, Offload


@pytest.fixture
def offload():
    offload = Offload(threads=1)
    yield offload
    offload.close()


async def test_small_work_stays_on_the_loop(offload):
    here = threading.current_thread()
    assert await offload.run(lambda stop: threading.current_thread(), 10) is here
    assert await offload.run(lambda stop: threading.current_thread(), INLINE_BYTES + 1) != here


async def test_errors_come_through(offload):
    def fail(stop):
        raise KeyError("x")

    for size in (1, INLINE_BYTES + 1):
        with pytest.raises(KeyError):
            await offload.run(fail, size)


async def test_cancel_outlasts_the_work_however_often_it_comes(offload):
    running, may_end = threading.Event(), threading.Event()
    steps = []

    def work(stop):
        running.set()
        assert may_end.wait(10)
        steps.append(stop())

    task = asyncio.create_task(offload.run(work, INLINE_BYTES + 1))
    await asyncio.to_thread(running.wait, 10)
    for _ in range(3):
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=0.01)
        assert not done
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps == [True]


async def test_work_that_never_began_is_dropped(offload):
    running, may_end = threading.Event(), threading.Event()

    def block(stop):
        running.set()
        assert may_end.wait(10)

    first = asyncio.create_task(offload.run(block, INLINE_BYTES + 1))
    await asyncio.to_thread(running.wait, 10)
    begun = []
    second = asyncio.create_task(offload.run(lambda stop: begun.append(1), INLINE_BYTES + 1))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    may_end.set()
    await first
    assert not begun


async def test_error_after_cancel_is_not_lost_in_the_log(offload, caplog):
    running, may_end = threading.Event(), threading.Event()

    def fail(stop):
        running.set()
        assert may_end.wait(10)
        raise KeyError("x")

    task = asyncio.create_task(offload.run(fail, INLINE_BYTES + 1))
    await asyncio.to_thread(running.wait, 10)
    task.cancel()
    await asyncio.sleep(0)
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "never retrieved" not in caplog.text
