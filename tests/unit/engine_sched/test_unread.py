"""Outputs between an engine and whoever reads them."""

import asyncio

from services.engine.api import TokenOutput
from services.engine.unread import Unread


def said(*names: str) -> list[TokenOutput]:
    return [TokenOutput(name, (1,)) for name in names]


async def read(unread: Unread) -> list[list[str]]:
    return [[o.request_id for o in step.outputs] async for step in unread.read()]


async def test_steps_come_whole_and_in_order_and_end():
    unread = Unread()
    unread.say(said("a", "b"))
    unread.say([])
    reading = asyncio.create_task(read(unread))
    await asyncio.sleep(0)
    unread.say(said("a"))
    unread.end()
    unread.end()
    assert await reading == [["a", "b"], ["a"]]


async def test_what_was_said_of_a_cancelled_request_is_not_its_successors():
    unread = Unread()
    unread.say(said("a", "b"))
    unread.say(said("a"))
    unread.drop("a")
    unread.say(said("a"))
    unread.drop("never was")
    unread.end()
    assert await read(unread) == [["b"], ["a"]]


async def test_a_reader_that_waits_is_not_woken_by_what_was_dropped():
    unread = Unread()
    reading = asyncio.create_task(read(unread))
    await asyncio.sleep(0)
    unread.say(said("a"))
    unread.drop("a")
    unread.say(said("b"))
    unread.end()
    assert await reading == [["b"]]
