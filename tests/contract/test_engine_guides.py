"""What engines owe to requests with a guide, on each that there is."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil

import pytest

from services.engine.api import (
    FinishReason,
    FirstTokens,
    Guide,
    GuideKind,
    Hold,
    Request,
    Sampling,
)
from services.engine.build import build
from services.engine.models.folder import ModelFolder
from services.engine.models.text import Tokenizer
from services.runtime.errors import InvalidRequestError
from services.runtime.settings import EngineSettings, KvSettings, ModelSettings
from tests.contract.guide_models import EOS, scripted_folder, write_tokenizer
from tests.contract.test_engine import Worker, hand_off, llama, prompt  # noqa: F401
from tests.unit.guides.guide_world import check, regex, schema

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", True]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SAMPLED = Sampling(temperature=1.5, max_tokens=200, seed=11, guide=schema(PERSON))
GREEDY = dataclasses.replace(SAMPLED, temperature=0.0)
PENALIZED = dataclasses.replace(
    SAMPLED, top_p=0.9, top_k=30, presence_penalty=1.0, repetition_penalty=1.2, logprobs=2
)


@pytest.fixture(scope="session")
def folders(tmp_path_factory, llama):  # noqa: F811
    torch = tmp_path_factory.mktemp("guided") / "llama"
    shutil.copytree(llama, torch)
    write_tokenizer(torch)
    return {"torch": torch, "scripted": scripted_folder(tmp_path_factory.mktemp("scripted"))}


EVERY = pytest.mark.parametrize("new", ["scripted", "drafting", "torch"], indirect=True)


@pytest.fixture(params=["scripted", "drafting"])
async def new(request, folders):
    """new(**engine settings) -> a Worker that is up."""
    workers = []
    kind, own = request.param, {}
    if kind == "drafting":
        kind, own = "scripted", {"scripted_draft_chance": 0.7, "draft_tokens": 3}

    async def make(**settings) -> Worker:
        values = {"block_tokens": 8, "chunk_tokens": 20, "kv_blocks": 256, "threads": 1}
        engine = build(
            ModelSettings(name="tiny", path=str(folders[kind])),
            EngineSettings(kind=kind, **(values | own | settings)),
            KvSettings(layers_per_piece=2),
            "127.0.0.1",
        )
        worker = Worker(engine)
        workers.append(worker)
        await worker.start()
        return worker

    make.kind = request.param
    make.table = Tokenizer(ModelFolder(folders[kind], "tiny")).table
    yield make
    for worker in workers:
        await worker.close()


def document(new, tokens) -> object:
    assert tokens[-1] == EOS
    return json.loads(new.table.join(tokens).decode())


@EVERY
@pytest.mark.parametrize("sampling", [SAMPLED, GREEDY, PENALIZED])
async def test_what_comes_has_the_form_and_ends(new, sampling):
    worker = await new()
    for seed in range(4):
        one = dataclasses.replace(sampling, seed=seed)
        tokens = await worker.generate(f"r{seed}", prompt(20, seed), one)
        check(document(new, tokens), PERSON)
        assert worker.outputs[f"r{seed}"][-1].finish_reason is FinishReason.STOP
    await worker.settled()


@EVERY
@pytest.mark.parametrize("late", [False, True])
async def test_prefill_and_decode_apart_say_what_one_engine_does(new, late):
    prefill, decode, alone = await new(), await new(), await new()
    for seed in range(3):
        sampling = dataclasses.replace(SAMPLED, seed=seed)
        request = Request(f"r{seed}", prompt(30, seed), sampling)
        tokens = await hand_off(prefill, decode, request, late=late)
        assert tokens == await alone.generate(f"r{seed}", request.prompt_token_ids, sampling)
        check(document(new, tokens), PERSON)
    await decode.settled()


@EVERY
async def test_a_request_taken_up_at_any_token_goes_on_as_it_would_have(new):
    worker = await new()
    whole = await worker.generate("whole", prompt(20), PENALIZED)
    for cut in range(len(whole)):
        tokens = await worker.generate(f"r{cut}", prompt(20), PENALIZED, whole[:cut])
        assert whole[:cut] + tokens == whole, cut
    await worker.settled()


async def test_preempted_requests_say_what_they_would_have(new):
    roomy, tight = await new(), await new(kv_blocks=14)
    asked = {f"r{i}": dataclasses.replace(SAMPLED, seed=i) for i in range(5)}
    expected = {k: await roomy.generate(k, prompt(20, 1), s) for k, s in asked.items()}
    for request_id, sampling in asked.items():
        tight.engine.decode(Request(request_id, prompt(20, 1), sampling), None)
    assert {k: await tight.tokens(k) for k in asked} == expected
    assert tight.engine.stats().preempted
    await tight.settled()


async def test_requests_without_a_guide_are_as_ever_beside_those_with_one(new):
    worker = await new()
    free = Sampling(temperature=1.0, max_tokens=30, seed=3, ignore_eos=True)
    expected = await worker.generate("free", prompt(25), free)
    for i in range(4):
        guided = dataclasses.replace(SAMPLED, seed=i)
        worker.engine.decode(Request(f"g{i}", prompt(18, i), guided), None)
    assert await worker.generate("free", prompt(25), free) == expected
    for i in range(4):
        check(document(new, await worker.tokens(f"g{i}")), PERSON)


async def test_the_end_is_forced_where_nothing_can_follow_whatever_min_tokens_says(new):
    worker = await new()
    sampling = Sampling(temperature=1.0, max_tokens=30, min_tokens=20, guide=regex("true"))
    tokens = await worker.generate("r", prompt(9), sampling)
    assert new.table.join(tokens) == b"true"
    assert tokens[-1] == EOS
    assert len(tokens) < 20


async def test_min_tokens_holds_while_the_form_can_go_on(new):
    worker = await new()
    sampling = Sampling(temperature=1.0, max_tokens=60, min_tokens=12, guide=regex("[ab]{2,40}"))
    tokens = await worker.generate("r", prompt(9), sampling)
    assert len(tokens) > 12
    assert tokens[-1] == EOS


async def test_a_stop_token_ends_it_though_the_form_is_not_complete(new):
    worker = await new()
    b = next(i for i in range(266) if new.table.join([i]) == b"b")
    sampling = Sampling(
        temperature=1.0, max_tokens=99, stop_token_ids=(b,), guide=regex("[ab]{50}")
    )
    tokens = await worker.generate("r", prompt(9), sampling)
    assert tokens[-1] == b
    assert b not in tokens[:-1]
    assert worker.outputs["r"][-1].finish_reason is FinishReason.STOP


async def test_the_length_ends_it_though_the_form_is_not_complete(new):
    worker = await new()
    sampling = Sampling(temperature=1.0, max_tokens=5, guide=regex("[ab]{50}"))
    assert len(await worker.generate("r", prompt(9), sampling)) == 5
    assert worker.outputs["r"][-1].finish_reason is FinishReason.LENGTH


async def test_log_probabilities_are_those_of_the_model(new):
    """Of what it would have said: the strongest rival need not be allowed."""
    worker = await new()
    free = Sampling(temperature=0.0, max_tokens=1, logprobs=5, ignore_eos=True)
    await worker.generate("free", prompt(15), free)
    (rivals,) = worker.outputs["free"][0].logprobs
    await worker.generate("r", prompt(15), dataclasses.replace(GREEDY, logprobs=5))
    first = worker.outputs["r"][0].logprobs[0]
    assert first.top == rivals.top
    assert first.logprob < rivals.logprob


BAD = dataclasses.replace(SAMPLED, guide=regex("(a"))


async def test_a_guide_of_no_use_ends_the_request_and_leaves_nothing(new):
    prefill, decode = await new(), await new()
    prefill.engine.prefill(Request("r", prompt(20), BAD), Hold(600))
    decode.engine.decode(Request("r", prompt(20), BAD), prefill.source("r"))
    for worker in (prefill, decode):
        (output,) = await worker.ended("r")
        assert output.finish_reason is FinishReason.ERROR
        assert output.error.reason == "INVALID_REQUEST"
        assert output.error.metadata["field"] == "sampling.guide.regex"
        await worker.settled()


async def test_a_source_is_told_that_nobody_will_come(new):
    prefill, decode = await new(), await new()
    prefill.engine.prefill(Request("r", prompt(20), SAMPLED), Hold(600))
    await prefill.first("r")
    decode.engine.decode(Request("r", prompt(20), BAD), prefill.source("r"))
    await decode.ended("r")
    await prefill.settled()


async def test_a_dead_end_fails_the_request_and_nobody_else(new):
    worker = await new()
    dead = Guide(GuideKind.GRAMMAR, ('start: "ab" end\nend: end "x"',))
    worker.engine.decode(Request("good", prompt(20), SAMPLED), None)
    sampling = Sampling(temperature=1.0, max_tokens=9, guide=dead)
    worker.engine.decode(Request("dead", prompt(20), sampling), None)
    outputs = await worker.ended("dead")
    assert new.table.join([t for o in outputs for t in o.token_ids]) == b"ab"
    assert outputs[-1].error.reason == "GUIDE_FAILED"
    check(document(new, await worker.tokens("good")), PERSON)
    await worker.settled()


async def test_first_tokens_that_do_not_have_the_form_fail_the_request(new):
    prefill, decode = await new(), await new()
    request = Request("r", prompt(20), SAMPLED)
    decode.engine.decode(request, prefill.source("r"))
    prefill.engine.prefill(request, Hold(600))
    await prefill.first("r")
    decode.engine.proceed("r", FirstTokens((5,)))
    assert (await decode.ended("r"))[-1].error.reason == "GUIDE_FAILED"
    await decode.settled()


async def test_requests_that_an_engine_can_not_guide_are_refused_at_once(new):
    worker = await new()
    request = Request("r", prompt(9), dataclasses.replace(SAMPLED, ignore_eos=True))
    with pytest.raises(InvalidRequestError, match="ignore_eos"):
        worker.engine.decode(request, None)
    await worker.settled()


@pytest.fixture
def gated(monkeypatch):
    """Guides that are compiled only when the gate is opened."""
    from services.engine.guides.compiling import Guides

    gate, begin = asyncio.Event(), Guides.begin

    async def wait(self, request):
        await gate.wait()
        return await begin(self, request)

    monkeypatch.setattr(Guides, "begin", wait)
    return gate


async def test_first_tokens_may_come_before_the_guide(new, gated):
    prefill, decode = await new(), await new()
    request = Request("r", prompt(20), SAMPLED)
    gated.set()
    prefill.engine.prefill(request, Hold(600))
    first = await prefill.first("r")
    gated.clear()
    decode.engine.decode(request, prefill.source("r"))
    decode.engine.proceed("r", FirstTokens(first.token_ids, first.handle))
    assert await decode.generate("free", prompt(9), Sampling(max_tokens=3, ignore_eos=True))
    gated.set()
    check(document(new, [*first.token_ids, *await decode.tokens("r")]), PERSON)
    await decode.settled()


async def test_a_request_cancelled_before_its_guide_is_there_leaves_nothing(new, gated):
    prefill, decode = await new(), await new()
    gated.set()
    prefill.engine.prefill(Request("r", prompt(20), SAMPLED), Hold(600))
    await prefill.first("r")
    gated.clear()
    prefill.engine.prefill(Request("q", prompt(20), SAMPLED), Hold(600))
    decode.engine.decode(Request("r", prompt(20), SAMPLED), prefill.source("r"))
    assert decode.engine.stats().waiting == 1
    prefill.engine.cancel("q")
    decode.engine.cancel("r")
    gated.set()
    await prefill.settled()
    await decode.settled()
    check(document(new, await decode.generate("r", prompt(20), SAMPLED)), PERSON)


async def test_prompts_that_wait_for_their_guides_are_queued_tokens(new, gated):
    worker = await new()
    worker.engine.decode(Request("r", prompt(31), SAMPLED), None)
    worker.engine.prefill(Request("q", prompt(12), SAMPLED), Hold(600))
    assert worker.engine.stats().queued_tokens == 43
    # Others that came later have begun, and ended.
    await worker.generate("free", prompt(9), Sampling(max_tokens=3, ignore_eos=True))
    assert worker.engine.stats().queued_tokens == 43
    assert worker.engine.stats().waiting == 2
    worker.engine.cancel("q")
    assert worker.engine.stats().queued_tokens == 31
    gated.set()
    await worker.tokens("r")
    await worker.settled()
    assert worker.engine.stats().queued_tokens == 0


async def test_an_engine_closes_with_guides_on_their_way(new, gated):
    worker = await new()
    worker.engine.decode(Request("r", prompt(20), SAMPLED), None)
    worker.engine.prefill(Request("q", prompt(20), SAMPLED), Hold(600))
    await asyncio.wait_for(worker.engine.close(), 20)
