"""The client's deadline at each stage of an engine, on a clock that only the model's steps move."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from kvtransfer.bandwidth import Bandwidth
from kvtransfer.errors import KvSourceLostError
from kvtransfer.keys import KeyChain, salt
from kvtransfer.store import KvStore
from services.engine.api import (
    FinishReason,
    FirstTokens,
    KvPrefix,
    KvSource,
    Request,
    Sampling,
    TokenOutput,
)
from services.engine.build import build
from services.engine.scripted.model import ScriptedModel
from services.engine.stepped.inbox import FetchStopped, Proceed, Submit
from services.engine.stepped.rates import Rates
from services.engine.stepped.sequence import Limits, Role, Sequence
from services.engine.stepped.step import Stepper, StepResult
from services.runtime.settings import EngineSettings, KvSettings, ModelSettings

BLOCK, CHUNK, STEP = 4, 16, 0.5


@dataclass
class Rig:
    """A stepper whose steps take STEP seconds of its own clock."""

    now: float = 100.0
    serial: int = 0
    outputs: dict[str, list[TokenOutput]] = field(default_factory=dict)
    last: StepResult = field(default_factory=StepResult)

    def __post_init__(self):
        self.model = ScriptedModel("m", block_tokens=BLOCK, step_seconds=STEP, sleep=self.sleep)
        self.store = KvStore(self.model.layout, 64, layers_per_piece=4, clock=self.clock)
        self.model.bind(self.store.memory)
        settings = EngineSettings(kind="scripted", block_tokens=BLOCK, chunk_tokens=CHUNK)
        self.stepper = Stepper(
            self.model,
            self.store,
            settings,
            Limits(200, frozenset()),
            recompute_max_tokens=1000,
            bandwidth=Bandwidth(),
            clock=self.clock,
        )

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def submit(self, name: str, tokens: int, left: float, *, source=None, prefix=None, first=10):
        prompt = tuple(range(first, first + tokens))
        chain = KeyChain(salt("m", self.store.layout.fingerprint), BLOCK)
        request = Request(name, prompt, Sampling(max_tokens=4), deadline_seconds=left)
        self.serial += 1
        sequence = Sequence.of(self.serial, request, Role.DECODE, chain, source, prefix)
        sequence.deadline = self.now + left
        self.stepper.apply(Submit(sequence))
        return sequence

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.stepper.run(self.stepper.plan())
            self.take()

    def take(self) -> None:
        self.last = self.stepper.take()
        for _, output in self.last.outputs:
            self.outputs.setdefault(output.request_id, []).append(output)

    def ended(self, name: str) -> str:
        """The reason of its error; empty if it ended well; fails if it did not end."""
        last = self.outputs[name][-1]
        assert last.finish_reason is not None
        return last.error.reason if last.error is not None else ""

    def measure(self) -> None:
        """So that it knows what a full chunk takes."""
        self.submit("first", CHUNK, 1000.0, first=500)
        self.step(8)
        assert self.ended("first") == ""


@pytest.fixture
def rig():
    it = Rig()
    yield it
    assert it.stepper.idle
    it.store.check_integrity()
    assert it.store.stats().held == 0
    it.store.close()


def test_a_bound_from_below():
    rates = Rates()
    assert rates.least_seconds(1000, 100) == 0.0
    # What is known of small chunks says little of large ones: they take as long at least.
    rates.step(20, 0.1)
    assert rates.least_seconds(1000, 100) == pytest.approx(1.0)
    rates.step(100, 0.4)
    assert rates.least_seconds(1000, 100) == pytest.approx(4.0)
    rates.step(95, 0.3)
    rates.step(100, 0.5)
    assert rates.least_seconds(1000, 100) == pytest.approx(3.0)
    rates.step(20, 5.0)
    assert rates.least_seconds(1000, 100) == pytest.approx(3.0)


def test_before_anything_is_measured_only_the_deadline_itself_counts(rig):
    rig.submit("a", 5 * CHUNK, left=0.1)
    rig.step()
    assert "a" not in rig.outputs
    rig.step()
    assert rig.ended("a") == "DEADLINE"


@pytest.mark.parametrize(("left", "reason"), [(5 * STEP - 0.1, "DEADLINE"), (5 * STEP + 0.1, "")])
def test_a_prompt_that_can_still_be_met_is_not_dropped(rig, left, reason):
    rig.measure()
    rig.submit("a", 5 * CHUNK, left)
    began = rig.now
    rig.step(5)
    if reason:
        assert rig.ended("a") == reason
        assert rig.now == began, "a step was wasted on it"
        assert rig.outputs["a"][-1].error.metadata["tokens"] == str(5 * CHUNK)
    else:
        assert len(rig.outputs["a"]) == 1
        # Its first token came in time, and the others come until time is up.
        rig.step(5)
        assert rig.ended("a") == "DEADLINE"


def test_one_that_waits_is_dropped_as_soon_as_it_is_too_late(rig):
    rig.measure()
    rig.submit("long", 10 * CHUNK, 1000.0)
    rig.submit("a", 4 * CHUNK, 8 * STEP, first=200)
    rig.step(4)
    assert "a" not in rig.outputs
    rig.step(2)
    assert rig.ended("a") == "DEADLINE"
    assert "long" not in rig.outputs
    rig.step(20)
    assert rig.ended("long") == ""


def test_what_is_cached_need_not_be_computed(rig):
    rig.measure()
    rig.submit("before", 6 * CHUNK, 1000.0)
    rig.step(12)
    rig.submit("a", 6 * CHUNK, 2 * STEP)
    rig.submit("b", 6 * CHUNK, 2 * STEP, first=150)
    rig.step()
    assert rig.ended("b") == "DEADLINE"
    assert rig.outputs["a"][-1].error is None
    rig.step(10)


def test_nor_what_another_worker_may_give_and_fetching_it_takes_no_longer_than_there_is(rig):
    rig.measure()
    prefix = KvPrefix("w", "w:1", 5 * CHUNK)
    rig.submit("a", 6 * CHUNK, 3 * STEP, prefix=prefix)
    rig.stepper.plan()
    rig.take()
    (fetch,) = rig.last.fetches
    assert fetch.held_only
    assert fetch.timeout == pytest.approx(3 * STEP)
    # It was in vain, and what is left is too little for the rest.
    rig.now += STEP
    rig.stepper.apply(FetchStopped(fetch.sequence.serial, 0, lost="KV_SOURCE_LOST", why="gone"))
    rig.step()
    assert rig.ended("a") == "DEADLINE"


@pytest.mark.parametrize("arrived", [0, 3])
def test_a_fetch_that_ends_at_the_deadline_is_no_reason_to_place_again(rig, arrived):
    rig.measure()
    rig.submit("a", 3 * BLOCK, 2.0, source=KvSource("p", "p:1", "a"))
    rig.stepper.plan()
    rig.take()
    (fetch,) = rig.last.fetches
    rig.stepper.apply(Proceed(fetch.sequence.serial, (7,), rig.now))
    rig.now += 2.0
    stopped = FetchStopped(fetch.sequence.serial, arrived, lost="KV_SOURCE_LOST", why="TIMEOUT")
    rig.stepper.apply(stopped)
    rig.step()
    assert rig.ended("a") == "DEADLINE"


def test_one_whose_kv_does_not_come_is_dropped_and_its_fetch_stopped(rig):
    rig.submit("a", 3 * BLOCK, 1.0, source=KvSource("p", "p:1", "a"))
    rig.submit("b", BLOCK, 1000.0)
    rig.step()
    (fetch,) = rig.last.fetches
    rig.step(2)
    assert rig.ended("a") == "DEADLINE"
    rig.step(2)
    rig.stepper.apply(FetchStopped(fetch.sequence.serial, why="stopped"))
    assert rig.outputs["a"][-1].finish_reason is FinishReason.ERROR
    rig.step()


@pytest.mark.parametrize(("left", "given"), [(7.0, 7.0), (None, 12.0), (1000.0, 12.0)])
async def test_a_source_is_asked_for_no_longer_than_there_is(left, given):
    settings = EngineSettings(kind="scripted", block_tokens=BLOCK, kv_blocks=16)
    kv = KvSettings(fetch_timeout_seconds=12.0)
    engine = build(ModelSettings(name="m"), settings, kv, "127.0.0.1")
    await engine.start()
    asked: list[float] = []

    async def fetch(address, lease_id, keys, blocks, *, timeout, **more):
        asked.append(timeout)
        raise KvSourceLostError("gone")

    engine.kv.fetch = fetch
    prompt, sampling = (5, 6, 7, 8, 9), Sampling(max_tokens=2)
    engine.decode(Request("a", prompt, sampling, deadline_seconds=left), KvSource("p", "p:1", "a"))
    engine.proceed("a", FirstTokens((7,)))
    async with asyncio.timeout(20):
        async for step in engine.outputs():
            if step.outputs[-1].finish_reason is not None:
                break
    await engine.close()
    assert asked == [pytest.approx(given, abs=0.5)]
