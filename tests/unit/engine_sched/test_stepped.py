"""Corners of the stepped engine that the contract suite does not reach, on the scripted model."""

from __future__ import annotations

import asyncio
import builtins
import threading
import time

import numpy as np
import pytest

from kvtransfer.errors import KvSourceLostError
from kvtransfer.keys import KeyChain
from services.engine.api import FinishReason, Hold, KvSource, Request, Sampling, TokenOutput
from services.engine.build import build
from services.engine.scripted.model import ScriptedModel
from services.engine.scripted.model import logits_of as scripted_logits
from services.engine.stepped.batch import batch_of
from services.engine.stepped.inbox import Submit
from services.engine.stepped.rates import Rates
from services.engine.stepped.sampler import Occurrences, Row, sample
from services.engine.stepped.scheduler import Work
from services.engine.stepped.sequence import Limits, Role, Sequence
from services.engine.stepped.step import StepResult
from services.runtime.errors import EngineFailedError
from services.runtime.load import SettingsError
from services.runtime.settings import EngineSettings, KvSettings, ModelSettings

WAIT = 20.0


def scripted(**settings):
    values = {"kind": "scripted", "block_tokens": 4, "kv_blocks": 16} | settings
    return build(ModelSettings(name="m"), EngineSettings(**values), KvSettings(), "127.0.0.1")


def sequence(prompt, output=(), context=100, **sampling):
    request = Request("r", tuple(prompt), Sampling(**sampling), tuple(output))
    found = Sequence.of(1, request, Role.DECODE, KeyChain(b"s" * 16, 4), None)
    return found.finished(Limits(context, frozenset({2})))


def test_what_ends_a_request():
    assert sequence([2]) is None  # a prompt may end with anything
    assert sequence([5], [2]) is FinishReason.STOP
    assert sequence([5], [2], ignore_eos=True) is None
    assert sequence([5], [9], stop_token_ids=(9,)) is FinishReason.STOP
    assert sequence([5], [9], stop_token_ids=(9,), ignore_eos=True) is FinishReason.STOP
    assert sequence([5], [2], min_tokens=1) is None
    assert sequence([5], [7, 2], min_tokens=1) is FinishReason.STOP
    assert sequence([5], [7, 7], max_tokens=2) is FinishReason.LENGTH
    assert sequence([5], [7, 2], max_tokens=2) is FinishReason.STOP
    assert sequence([5], [7, 7], context=3) is FinishReason.LENGTH
    assert sequence([5], [7], context=3) is None


def test_a_batch_has_its_rows_in_order():
    works = []
    for serial, (tokens, computed, count, wanted) in enumerate(
        [([1, 2, 3, 4, 5], 4, 1, True), ([6, 7, 8], 0, 2, False), ([9], 0, 1, True)]
    ):
        request = Request(str(serial), tuple(tokens), Sampling())
        s = Sequence.of(serial, request, Role.DECODE, KeyChain(b"s" * 16, 4), None)
        s.blocks = [10 * serial + b for b in range(-(-len(tokens) // 4))]
        works.append(Work(s, computed, count, wanted))
    batch = batch_of(works)
    assert batch.token_ids.tolist() == [5, 6, 7, 9]
    assert batch.positions.tolist() == [4, 0, 1, 0]
    assert batch.query_starts.tolist() == [0, 1, 3, 4]
    assert batch.block_tables.tolist() == [[0, 1], [10, -1], [20, -1]]
    assert batch.logit_rows.tolist() == [0, 3]
    assert {a.dtype for a in (batch.token_ids, batch.positions, batch.logit_rows)} == {
        np.dtype(np.int32)
    }


def test_the_scripted_model_notices_kv_that_is_not_its_own():
    model = ScriptedModel("m", block_tokens=4)
    memory = np.zeros((3, model.layout.block_bytes), dtype=np.uint8)
    model.bind(memory)
    s = Sequence.of(
        1, Request("r", (5, 6, 7, 8, 9), Sampling()), Role.DECODE, KeyChain(b"s" * 16, 4), None
    )
    s.blocks = [2, 0]
    model.forward(batch_of([Work(s, 0, 4, False)]), None, 4)
    expected = model.forward(batch_of([Work(s, 4, 1, True)]), None, 4)
    assert np.isfinite(expected).any()
    s.blocks = [1, 0]
    with pytest.raises(RuntimeError, match="does not hold"):
        model.forward(batch_of([Work(s, 4, 1, True)]), None, 4)


def test_rates_follow_what_is_measured():
    rates = Rates()
    assert (rates.prefill_tokens_per_second, rates.step_seconds) == (0.0, 0.0)
    rates.step(prompt_tokens=100, seconds=0.5)
    assert rates.prefill_tokens_per_second == pytest.approx(200)
    rates.step(prompt_tokens=1, seconds=0.01)  # says nothing about prompts
    assert rates.prefill_tokens_per_second == pytest.approx(200)
    for _ in range(100):
        rates.step(prompt_tokens=100, seconds=0.1)
    assert rates.prefill_tokens_per_second == pytest.approx(1000, rel=0.01)
    assert rates.step_seconds == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=40, seed=5),
        Sampling(max_tokens=40, seed=5, top_k=30, min_tokens=35, stop_token_ids=tuple(range(99))),
        Sampling(max_tokens=40, seed=6, presence_penalty=-2.0, frequency_penalty=-0.5),
        Sampling(max_tokens=40, seed=6, temperature=0.0, repetition_penalty=0.7),
    ],
)
@pytest.mark.parametrize("given", [0, 3])
async def test_the_engine_does_what_a_plain_loop_does(sampling, given):
    prompt, tokens = [7, 8, 9, 10, 300], [7, 8, 9, 10, 300]
    while len(tokens) < len(prompt) + 40:
        forbidden = set(sampling.stop_token_ids)
        if len(tokens) - len(prompt) >= sampling.min_tokens:
            forbidden = set()
        seen = Occurrences(prompt)
        seen.follow(tokens)
        row = Row(sampling, len(tokens), seen, frozenset(forbidden))
        logits = scripted_logits(np.array(tokens, dtype="<u4").tobytes())
        tokens.append(sample(logits[None], [row])[0].token)
        if tokens[-1] in sampling.stop_token_ids:
            break
    outputs = tokens[len(prompt) :]
    engine = scripted()
    await engine.start()
    request = Request("a", tuple(prompt), sampling, tuple(outputs[:given]))
    engine.decode(request, None)
    found = []
    async with asyncio.timeout(WAIT):
        async for step in engine.outputs():
            found += step.outputs[0].token_ids
            if step.outputs[0].finish_reason is not None:
                break
    await engine.close()
    assert outputs[:given] + found == outputs


async def test_what_was_computed_for_a_cancelled_request_is_not_its_successors():
    engine = scripted()
    await engine.start()
    engine.decode(Request("a", (5, 6), Sampling(max_tokens=1)), None)
    stale = engine._live["a"].serial
    engine.cancel("a")
    engine.decode(Request("a", (5, 7), Sampling(max_tokens=1)), None)
    engine._take(StepResult(outputs=[(stale, TokenOutput("a", (1, 2, 3)))]))
    async with asyncio.timeout(WAIT):
        step = await anext(engine.outputs())
    assert len(step.outputs[0].token_ids) == 1
    await engine.close()


async def test_cancelling_a_prefill_that_has_just_ended_frees_its_lease():
    engine = scripted()
    await engine.start()
    engine.prefill(Request("a", (5, 6, 7), Sampling()), Hold(600))
    while not engine._stepper.load.finished:
        time.sleep(0.001)  # noqa: ASYNC251 - the loop must not learn of it before it cancels
    engine.cancel("a")
    async with asyncio.timeout(WAIT):
        while engine.stats().leases:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
    engine.check_integrity()
    assert engine.stats().held_blocks == 0
    await engine.close()


async def test_a_window_beyond_the_pool_stops_the_start():
    engine = scripted(context_tokens=65)
    with pytest.raises(SettingsError, match=r"engine\.context_tokens: 65 .* holds 64"):
        await engine.start()
    await engine.close()


async def test_a_fetch_begins_while_the_model_runs(monkeypatch):
    engine = scripted()
    await engine.start()
    model, began = engine._stepper._model, threading.Event()
    forward = model.forward
    in_time = []

    async def fetch(*_, **__):
        began.set()
        raise KvSourceLostError("it was only asked whether")

    def slow(*arguments):
        in_time.append(began.wait(WAIT))
        return forward(*arguments)

    monkeypatch.setattr(engine.kv, "fetch", fetch)
    monkeypatch.setattr(model, "forward", slow)
    engine.decode(Request("runs", (5, 6), Sampling(max_tokens=2)), None)
    engine.decode(Request("fetches", (5, 7), Sampling()), KvSource("w", "nowhere:1", "lease"))
    async with asyncio.timeout(WAIT):
        await anext(engine.outputs())
    assert in_time[0]
    await engine.close()


async def test_a_command_that_fails_takes_no_other_with_it():
    engine = scripted()
    await engine.start()
    apply = engine._stepper.apply

    def fails_for_one(command):
        apply(command)
        if isinstance(command, Submit) and command.sequence.request.request_id == "a":
            raise RuntimeError("a bug")

    engine._stepper.apply = fails_for_one
    for name in "abc":
        engine.decode(Request(name, (5, 6), Sampling(max_tokens=1)), None)
    ends = {}
    async with asyncio.timeout(WAIT):
        async for step in engine.outputs():
            ends |= {o.request_id: o.finish_reason for o in step.outputs}
            if len(ends) == 3:
                break
    assert ends["a"] is FinishReason.ERROR
    assert ends["b"] is ends["c"] is FinishReason.LENGTH
    await engine.close()


async def test_a_thread_that_dies_is_heard_of():
    engine = scripted()
    await engine.start()
    engine._stepper.take = broken
    engine.decode(Request("a", (5, 6), Sampling()), None)
    async with asyncio.timeout(WAIT):
        steps = [step async for step in engine.outputs()]
    (output,) = steps[-1].outputs
    assert (output.finish_reason, output.error.reason) == (FinishReason.ERROR, "WORKER_LOST")
    with pytest.raises(EngineFailedError):
        engine.decode(Request("b", (5, 6), Sampling()), None)
    await engine.close()


async def test_a_closed_engine_takes_nothing_and_says_so():
    engine = scripted()
    await engine.start()
    await engine.close()
    assert [step async for step in engine.outputs()] == []
    with pytest.raises(EngineFailedError):
        engine.prefill(Request("b", (5, 6), Sampling()), Hold(1))


async def test_steps_take_the_time_they_are_told_to():
    engine = scripted(scripted_step_seconds=0.02)
    await engine.start()
    engine.decode(Request("a", (5, 6), Sampling(max_tokens=5)), None)
    async with asyncio.timeout(WAIT):
        async for step in engine.outputs():
            if step.outputs[-1].finish_reason is not None:
                break
    assert engine.stats().step_seconds >= 0.02
    await engine.close()


def test_a_missing_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without_torch(name, *arguments, **named):
        if name.startswith("services.engine.torch"):
            raise ModuleNotFoundError("No module named 'numba'", name="numba")
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    with pytest.raises(SettingsError, match=r"numba.*tandem-serving\[torch\]"):
        build(ModelSettings(), EngineSettings(), KvSettings(), "127.0.0.1")


def broken():
    raise RuntimeError("a bug beyond repair")
