"""Multi-token prediction on a tiny DeepSeek in the torch engine: tokens are those without it."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
import torch

from services.engine.api import Request
from services.engine.build import build
from services.runtime.settings import EngineSettings, KvSettings, ModelSettings
from tests.contract.test_engine import (
    GREEDY,
    PENALIZED,
    SAMPLED,
    Worker,
    hand_off,
    prompt,
)
from tests.unit.engine_torch import torch_deepseek

KINDS = {"g": GREEDY, "s": SAMPLED, "p": PENALIZED}


def agreeing() -> dict[str, torch.Tensor]:
    """Random weights of a model that goes by the last token above all, and so does its draft layer.

    So drafts are often right, and often wrong.
    """
    found = torch_deepseek.tensors({})
    for name in found:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            found[name] *= 0.25
    draft = f"model.layers.{torch_deepseek.TINY['num_hidden_layers']}."
    hidden = torch_deepseek.TINY["hidden_size"]
    found[f"{draft}eh_proj.weight"] *= 0.1
    found[f"{draft}eh_proj.weight"][:, :hidden] += torch.eye(hidden)
    found[f"{draft}enorm.weight"] = torch.ones(hidden)
    found[f"{draft}shared_head.norm.weight"] = found["model.norm.weight"].clone()
    return found


@pytest.fixture(scope="session")
def deepseek(tmp_path_factory):
    folder = torch_deepseek.write(tmp_path_factory.mktemp("drafting"), agreeing())
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
async def new(deepseek):
    """new(tokens to draft in every step, **engine settings) -> a Worker that is up."""
    workers = []

    async def make(drafts: int, **settings) -> Worker:
        values = {"block_tokens": 8, "chunk_tokens": 20, "kv_blocks": 64, "threads": 1}
        engine = build(
            ModelSettings(name="tiny", path=str(deepseek)),
            EngineSettings(draft_tokens=drafts, **(values | settings)),
            KvSettings(layers_per_piece=2),
            "127.0.0.1",
        )
        worker = Worker(engine)
        await worker.start()
        workers.append(worker)
        if drafts:
            engine._stepper._drafting.length.choose = lambda *_: drafts
        return worker

    yield make
    for worker in workers:
        await worker.close()


def logprobs(worker: Worker, request_id: str) -> list:
    return [entry for o in worker.outputs[request_id] for entry in o.logprobs]


async def test_drafts_change_no_token_and_no_logprob(new):
    requests = {
        f"{length}{kind}": (prompt(length, length), dataclasses.replace(sampling, logprobs=2))
        for kind, sampling in KINDS.items()
        for length in (1, 8, 19, 45)
    }
    plain = await new(0)
    expected = {k: await plain.generate(k, ids, s) for k, (ids, s) in requests.items()}
    for drafts in (1, 3):
        worker = await new(drafts, chunk_tokens=11)
        found = await asyncio.gather(
            *(worker.generate(k, ids, s) for k, (ids, s) in requests.items())
        )
        assert dict(zip(requests, found, strict=True)) == expected
        for name in requests:
            assert logprobs(worker, name) == logprobs(plain, name)
        stats = worker.engine.stats()
        assert 0 < stats.accepted_tokens < stats.draft_tokens
        # A draft that ends a request is right, and nothing is chosen after it.
        tokens = sum(map(len, found))
        assert tokens <= stats.accepted_tokens + stats.decode_steps <= tokens + len(found)
        await worker.settled()


async def test_the_draft_layers_kv_travels(new):
    plain, source, sink = await new(0), await new(1), await new(2)
    assert plain.engine.info.layout.layers == 3
    assert source.engine.info.layout.layers == 4
    for length in (1, 7, 8, 21, 40):
        for kind, sampling in KINDS.items():
            request = Request(f"{length}{kind}", prompt(length, length), sampling)
            expected = await plain.generate(request.request_id, request.prompt_token_ids, sampling)
            assert await hand_off(source, sink, request, late=kind == "s") == expected
    report = next(o.kv for o in sink.outputs["40g"] if o.kv)
    assert report.bytes == 5 * sink.engine.info.layout.block_bytes
    assert sink.engine.stats().accepted_tokens > 0
    await source.settled()
    await sink.settled()


@pytest.mark.parametrize("sampling", KINDS.values(), ids=KINDS)
async def test_resumption_in_mid_stream_gives_the_same(new, sampling):
    plain, worker, source, sink = await new(0), await new(3), await new(1), await new(1)
    ids = prompt(13)
    whole = await plain.generate("whole", ids, sampling)
    for cut in range(1, len(whole) - 1, 2):
        assert whole[:cut] + await worker.generate(f"{cut}", ids, sampling, whole[:cut]) == whole
        request = Request(f"apart{cut}", ids, sampling, tuple(whole[:cut]))
        assert whole[:cut] + await hand_off(source, sink, request) == whole
    await worker.settled()
    await sink.settled()
