"""Memory lent for a while: never twice at once, all of it back, and nobody waits for ever."""

import asyncio
import random

import pytest

from kvtransfer.layout import gqa_layout
from kvtransfer.scratch import ALIGNMENT, Scratch, SegmentPlan
from kvtransfer.store import KvStore

LAYOUT = gqa_layout("m", layers=2, kv_heads=1, head_dim=8, dtype="bfloat16", block_tokens=4)


@pytest.mark.parametrize("blocks", [1, 7, 512, 513])
def test_parts_of_a_segment_do_not_overlap(blocks):
    plan = SegmentPlan.of(blocks, LAYOUT.block_bytes, 8192)
    assert plan.generations >= blocks * LAYOUT.block_bytes
    assert plan.room >= plan.generations + 8 * blocks
    assert plan.nbytes == plan.scratch + 8192
    assert all(part % ALIGNMENT == 0 for part in (plan.generations, plan.room, plan.scratch))


@pytest.mark.parametrize("seed", range(20))
async def test_what_is_lent_is_lent_once(seed):
    draw, scratch = random.Random(seed), Scratch(4096, 40 * ALIGNMENT)
    out: list[tuple[int, int]] = []

    async def one() -> None:
        size = draw.randint(1, 12 * ALIGNMENT)
        for _ in range(draw.randrange(4)):
            await asyncio.sleep(0)
        async with scratch.borrow(size) as at:
            assert at >= 4096
            assert at + size <= 4096 + scratch.nbytes
            assert all(at + size <= a or b <= at for a, b in out)
            out.append((at, at + size))
            try:
                for _ in range(draw.randrange(6)):
                    await asyncio.sleep(0)
            finally:
                out.remove((at, at + size))

    tasks = [asyncio.create_task(one()) for _ in range(60)]
    for task in draw.sample(tasks, 10):
        await asyncio.sleep(0)
        task.cancel()
    async with asyncio.timeout(10):
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    wrong = [e for e in ends if e is not None and not isinstance(e, asyncio.CancelledError)]
    assert not wrong
    assert scratch.lent == 0
    async with scratch.borrow(scratch.nbytes):
        assert scratch.lent == scratch.nbytes


async def test_more_than_there_is():
    with pytest.raises(ValueError, match="there are 4096"):
        async with Scratch(0, 4096).borrow(4097):
            pass


@pytest.mark.parametrize("seed", range(30))
async def test_fetches_that_need_both_rooms_never_wait_for_each_other(seed):
    """As sink.py borrows: generations first, then scratch, several batches a fetch."""
    draw = random.Random(seed)
    store = KvStore(LAYOUT, 4, layers_per_piece=1, scratch_bytes=64 * ALIGNMENT)

    async def one() -> None:
        for _ in range(4):
            async with store.room.borrow(draw.randint(1, 16 * ALIGNMENT)):
                for _ in range(draw.randrange(3)):
                    await asyncio.sleep(0)
                async with store.scratch.borrow(draw.randint(8 * ALIGNMENT, 64 * ALIGNMENT)):
                    for _ in range(draw.randrange(5)):
                        await asyncio.sleep(0)

    async with asyncio.timeout(10):
        await asyncio.gather(*(one() for _ in range(40)))
    assert store.room.lent == store.scratch.lent == 0
