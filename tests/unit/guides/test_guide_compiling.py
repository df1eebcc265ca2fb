"""Guides of many requests are compiled side by side, in turns, and once."""

from __future__ import annotations

import asyncio
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.api import Request, Sampling
from services.engine.guides import compiling
from services.engine.guides.compiling import AT_ONCE, Guides
from services.engine.guides.threads import MaskThreads
from services.engine.guides.turns import Turns
from services.runtime.errors import GuideFailedError, InvalidRequestError
from tests.unit.guides.guide_world import EOS, SIZE, TOKENS, allowed, ids_of, regex

WAIT = 60.0


def request(guide, tenant="", output=()) -> Request:
    return Request("r", (5,), Sampling(guide=guide), tuple(output), tenant=tenant)


@pytest.fixture
def guides():
    made = Guides(lambda: TOKENS, SIZE, EOS)
    yield made
    made.close()


@pytest.fixture
def gate(monkeypatch):
    """Compiling a guide that begins with "slow" waits until the gate is open."""
    opened, compiled, real = threading.Event(), [], compiling.Guided
    asked = threading.Semaphore(0)

    def slow(vocabulary, guide):
        compiled.append(guide.texts[0])
        asked.release()
        if guide.texts[0].startswith("slow"):
            assert opened.wait(WAIT)
        return real(vocabulary, guide)

    monkeypatch.setattr(compiling, "Guided", slow)
    opened.compiled, opened.asked = compiled, asked
    yield opened
    opened.set()


async def test_slow_guides_of_one_tenant_hold_up_nobody_else(guides, gate):
    slow = [
        asyncio.create_task(guides.begin(request(regex(f"slow{i}"), "heavy"))) for i in range(9)
    ]
    for _ in range(AT_ONCE - 1):
        assert await asyncio.to_thread(gate.asked.acquire, timeout=WAIT)
    for i in range(3):
        found = await asyncio.wait_for(guides.begin(request(regex(f"a{i}"), "light")), WAIT)
        assert allowed(found.masks()[0]) == ids_of("a")
    assert sum(text.startswith("slow") for text in gate.compiled) == AT_ONCE - 1
    assert not any(task.done() for task in slow)
    gate.set()
    await asyncio.wait_for(asyncio.gather(*slow), WAIT)


async def test_one_that_is_cancelled_takes_no_turn_and_keeps_none(guides, gate):
    slow = [asyncio.create_task(guides.begin(request(regex(f"slow{i}")))) for i in range(6)]
    for _ in range(AT_ONCE - 1):
        assert await asyncio.to_thread(gate.asked.acquire, timeout=WAIT)
    for task in slow:
        task.cancel()
    await asyncio.wait(slow)
    assert all(task.cancelled() for task in slow)
    gate.set()
    for i in range(2 * AT_ONCE):
        await asyncio.wait_for(guides.begin(request(regex(f"b{i}"))), WAIT)
    assert sum(text.startswith("slow") for text in gate.compiled) == AT_ONCE - 1


async def test_a_guide_is_compiled_once_and_each_request_has_its_own_way(guides, gate):
    one = await guides.begin(request(regex("ab|cd")))
    one.accept(ids_of("a"))
    other = await guides.begin(request(regex("ab|cd"), output=ids_of("c")))
    assert gate.compiled == ["ab|cd"]
    assert allowed(one.masks()[0]) == ids_of("b")
    assert allowed(other.masks()[0]) == ids_of("d")
    with pytest.raises(GuideFailedError):
        await guides.begin(request(regex("ab|cd"), output=ids_of("x")))
    assert gate.compiled == ["ab|cd"]


async def test_what_was_not_used_for_long_is_compiled_again(guides, gate, monkeypatch):
    monkeypatch.setattr(compiling, "KEPT_BYTES", 3 * compiling.LEAST_BYTES)
    for text in ("a", "b", "a", "c", "a", "b"):
        await guides.begin(request(regex(text)))
    assert gate.compiled == ["a", "b", "c", "b"]


async def test_one_that_is_refused_is_not_kept_and_takes_no_place(guides):
    for _ in range(2 * AT_ONCE):
        with pytest.raises(InvalidRequestError):
            await guides.begin(request(regex("(a")))
    assert await guides.begin(request(regex("a")))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    st.integers(2, 5),
    st.lists(
        st.one_of(
            st.tuples(st.just("take"), st.sampled_from("xyz")),
            st.tuples(st.just("done"), st.integers(0, 9)),
            st.tuples(st.just("drop"), st.integers(0, 9)),
        ),
        max_size=60,
    ),
)
def test_turns_are_taken_in_order_by_as_many_as_may(places, acts):
    turns = Turns(places)
    waiting: list[tuple[str, object]] = []
    at_work: list[str] = []

    def begin_of(tenant):
        def begin():
            first = next(b for t, b in waiting if t == tenant)
            assert first is begin
            waiting.remove((tenant, begin))
            at_work.append(tenant)

        return begin

    def act(kind, what):
        if kind == "take":
            begin = begin_of(what)
            waiting.append((what, begin))
            turns.take(what, begin)
        elif kind == "done" and at_work:
            turns.done(at_work.pop(what % len(at_work)))
        elif kind == "drop" and waiting:
            tenant, begin = waiting.pop(what % len(waiting))
            assert turns.drop(tenant, begin)
            assert not turns.drop(tenant, begin)

    for kind, what in [*acts, *[("done", 0)] * 80]:
        act(kind, what)
        assert len(at_work) <= places
        for tenant in "xyz":
            assert at_work.count(tenant) < places
            if any(t == tenant for t, _ in waiting):
                assert len(at_work) == places or at_work.count(tenant) == places - 1
    assert not waiting
    assert not at_work
    assert not turns._tenants


def test_tenants_share_what_is_free():
    turns, begun = Turns(3), []
    for i in range(6):
        turns.take("many", lambda i=i: begun.append(f"many{i}"))
    for i in range(2):
        turns.take("few", lambda i=i: begun.append(f"few{i}"))
    assert begun == ["many0", "many1", "few0"]
    turns.done("many")
    turns.done("few")
    assert begun[3:] == ["many2", "few1"]


def test_masks_of_many_come_by_their_serials_and_an_error_comes_last():
    threads, done = MaskThreads(), []
    assert threads.begin({}).result() == {}
    found = threads.begin({i: lambda i=i: i * i for i in range(23)}).result()
    assert found == {i: i * i for i in range(23)}

    def fail():
        raise ValueError("bad")

    asked = {i: lambda i=i: done.append(i) for i in range(20)} | {4: fail}
    with pytest.raises(ValueError, match="bad"):
        threads.begin(asked).result()
    assert set(range(20)) - set(done) <= {i for i in range(20) if i % 4 == 0}
