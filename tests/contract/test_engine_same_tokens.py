"""Every family of models: whole, in chunks, handed over, resumed, with drafts: the same tokens."""

from __future__ import annotations

import dataclasses

import pytest

from services.engine.api import FirstTokens, Hold, Request
from services.engine.build import build
from services.runtime.settings import EngineSettings, KvSettings, ModelSettings
from tests.contract.test_engine import GREEDY, SAMPLED, Worker, prompt
from tests.unit.engine_torch import torch_deepseek, torch_models

KINDS = {
    "greedy": GREEDY,
    "sampled": dataclasses.replace(SAMPLED, logprobs=2),
}
FAMILIES = {
    "deepseek": 3,
    "deepseek, no drafts": 0,
    "qwen3 moe": 0,
    "qwen3": 0,
    "llama": 0,
}
"""And how many tokens they draft."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(family) -> its folder, made once."""
    made = {}

    def folder(family):
        name = family.partition(",")[0]
        if name not in made:
            path = tmp_path_factory.mktemp(name.replace(" ", "-"))
            if name == "deepseek":
                torch_deepseek.write(path)
            elif name == "llama":
                torch_models.write(path)
            else:
                transformers_peer(name).save_pretrained(path)
            (path / "tokenizer.json").write_text("{}")
            made[name] = path
        return made[name]

    return folder


def transformers_peer(name):
    pytest.importorskip("transformers")
    from tests.unit.engine_torch.test_torch_families import peer

    return peer(name)


@pytest.fixture
async def new(folders):
    """new(family, **engine settings) -> a Worker that is up."""
    workers = []

    async def make(family, **settings):
        values = {"block_tokens": 16, "kv_blocks": 64, "threads": 1}
        engine = build(
            ModelSettings(name="tiny", path=str(folders(family))),
            EngineSettings(**(values | {"draft_tokens": FAMILIES[family]} | settings)),
            KvSettings(recompute_max_tokens=0),
            "127.0.0.1",
        )
        workers.append(Worker(engine))
        await workers[-1].start()
        return workers[-1]

    yield make
    for worker in workers:
        await worker.close()


@pytest.mark.parametrize("kv_dtype", ["fp8_e4m3", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
async def test_same_tokens(new, family, kv_dtype):
    whole = await new(family, kv_dtype=kv_dtype)
    chunked = await new(family, kv_dtype=kv_dtype, chunk_tokens=7)
    assert chunked.engine.info.numerics == whole.engine.info.numerics
    plain = whole
    if FAMILIES[family]:
        plain = await new(family, kv_dtype=kv_dtype, draft_tokens=0)
    for number, (kind, sampling) in enumerate(KINDS.items()):
        ids = prompt(45, 2 * number)
        expected = await plain.generate(f"{kind}-plain", ids, sampling)
        assert len(expected) == sampling.max_tokens
        assert await whole.generate(f"{kind}-whole", ids, sampling) == expected
        assert await chunked.generate(f"{kind}-chunked", ids, sampling) == expected
        other = prompt(45, 2 * number + 1)  # whose KV nobody has
        found = await handed_over(chunked, whole, Request(f"{kind}-moves", other, sampling))
        assert await plain.generate(f"{kind}-other", other, sampling) == found
        for cut in (1, len(found) // 2):
            rest = await chunked.generate(f"{kind}-{cut}", other, sampling, found[:cut])
            assert found[:cut] + rest == found
    for worker in (whole, chunked):
        await worker.settled()
    if FAMILIES[family]:
        assert whole.engine.stats().draft_tokens > 0


async def handed_over(prefill: Worker, decode: Worker, request: Request) -> list[int]:
    """The prompt at one, the rest at the other, which computes none of the prompt."""
    name = request.request_id
    decode.engine.decode(request, prefill.source(name))
    prefill.engine.prefill(request, Hold(600))
    first = await prefill.first(name)
    decode.engine.proceed(name, FirstTokens(first.token_ids, first.handle))
    tokens = [*first.token_ids, *await decode.tokens(name)]
    report = next(o.kv for o in decode.outputs[name] if o.kv)
    assert (report.blocks, report.computed_tokens) == (3, 0)
    return tokens
