"""Generations with random JSON schemas, under drafts and disaggregation: every document is checked.

A prefill engine and a decode engine that drafts, many requests at a time, as a frontend would pass
them on; beside them one engine that does all of it alone, and drafts nothing, whose tokens must be
the same. With --model the shipped one, which drafts by its own layer, and whose KV is FP8; else a
scripted one, which says anything.

    python -m tests.contract.guided_generations --model tiny-deepseek --count 500
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from services.engine.api import FinishReason, Request, Sampling
from services.engine.build import build
from services.engine.models.folder import ModelFolder, resolve
from services.engine.models.text import Tokenizer
from services.runtime.settings import EngineSettings, KvSettings, ModelSettings
from tests.contract.guide_models import scripted_folder
from tests.contract.test_engine import Worker, hand_off, prompt
from tests.unit.guides.guide_world import check, schema, schemas

AT_ONCE = 8
MAX_TOKENS = 1000
"""More than a document of a bounded schema has, with all the white space that it may."""
TEMPERATURES = (0.0, 0.7, 1.0)

Prompts = Callable[[dict, int], tuple[int, ...]]
"""The prompt that asks for a schema, and a seed to make it by."""


@dataclass(frozen=True)
class Subject:
    """What generates: a model, engines for it, what it is asked."""

    model: ModelSettings
    engine: EngineSettings
    drafting: dict[str, object]
    """Beyond the engine's settings, where drafts are made."""
    prompts: Prompts
    temperatures: tuple[float, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of it: all documents ended, and were what their schemas allow."""

    checked: int
    tokens: int
    longest: int
    """Tokens of a document."""
    drafted: int
    accepted: int
    kv_bytes: int
    """Handed over."""


def drawn(count: int, seed: int) -> list[tuple[dict, int]]:
    """Schemas, none twice, and seeds of requests."""
    found: dict[str, tuple[dict, int]] = {}

    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(schemas(closed=True, bounded=True), st.integers(0, 2**32))
    def collect(of: dict, request_seed: int) -> None:
        found.setdefault(json.dumps(of, sort_keys=True), (of, request_seed))

    while len(found) < count:
        seeded(seed)(collect)()
        seed += 1
    return list(found.values())[:count]


def scripted(folder: Path) -> Subject:
    """A model that says anything; a chance decides whether a draft is right."""
    scripted_folder(folder)
    return Subject(
        ModelSettings(name="tiny", path=str(folder)),
        EngineSettings(
            kind="scripted", block_tokens=8, chunk_tokens=64, kv_blocks=6000, max_running=AT_ONCE
        ),
        {"scripted_draft_chance": 0.6, "draft_tokens": 3},
        lambda _, seed: prompt(10 + seed % 30, seed % 97),
        (1.0,),
    )


def trained(name: str) -> Subject:
    """A shipped model, asked in words for a document of the schema."""
    model = ModelSettings(name=name)
    tokenizer = Tokenizer(resolve(model))

    def asked(of: dict, _: int) -> tuple[int, ...]:
        words = f"Write JSON for this schema: {json.dumps(of, ensure_ascii=False)}"
        return tuple(tokenizer.encode_chat([{"role": "user", "content": words}]))

    return Subject(
        model,
        EngineSettings(
            block_tokens=16, chunk_tokens=128, kv_blocks=3000, max_running=AT_ONCE, threads=1,
            kv_dtype="fp8_e4m3", draft_tokens=0,
        ),
        {"draft_tokens": 3},
        asked,
        TEMPERATURES,
    )  # fmt: skip


async def run(subject: Subject, count: int, seed: int) -> Outcome:
    """Raises AssertionError for a document that its schema does not allow, or other tokens."""
    folder: ModelFolder = resolve(subject.model)
    table = Tokenizer(folder).table

    def worker(**own: object) -> Worker:
        engine = subject.engine.model_copy(update=own)
        return Worker(build(subject.model, engine, KvSettings(layers_per_piece=2), "127.0.0.1"))

    prefill, decode, alone = worker(**subject.drafting), worker(**subject.drafting), worker()
    workers = (prefill, decode, alone)
    gate = asyncio.Semaphore(AT_ONCE)

    async def ask(name: str, of: dict, request_seed: int) -> int:
        sampling = Sampling(
            temperature=subject.temperatures[request_seed % len(subject.temperatures)],
            max_tokens=MAX_TOKENS,
            seed=request_seed,
            guide=schema(of),
        )
        request = Request(name, subject.prompts(of, request_seed), sampling)
        async with gate:
            tokens = await hand_off(prefill, decode, request)
            plain = await alone.generate(name, request.prompt_token_ids, sampling)
        assert tokens == plain, (of, request_seed)
        assert alone.outputs[name][-1].finish_reason is FinishReason.STOP, (of, request_seed)
        check(json.loads(table.join(tokens).decode()), of)
        return len(tokens)

    try:
        for one in workers:
            await one.start()
        asked = [ask(f"r{i}", *what) for i, what in enumerate(drawn(count, seed))]
        lengths = await asyncio.gather(*asked)
        stats = decode.engine.stats()
        reports = [o.kv for outputs in decode.outputs.values() for o in outputs if o.kv]
    finally:
        for one in workers:
            await one.close()
    return Outcome(
        checked=len(lengths),
        tokens=sum(lengths),
        longest=max(lengths),
        drafted=stats.draft_tokens,
        accepted=stats.accepted_tokens,
        kv_bytes=sum(r.bytes for r in reports),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="", help="one that is shipped, or has been fetched")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        subject = trained(arguments.model) if arguments.model else scripted(Path(folder))
        outcome = asyncio.run(run(subject, arguments.count, arguments.seed))
    print(
        f"{outcome.checked} documents, all complete and valid, the tokens those without drafts "
        f"on one engine; {outcome.tokens} tokens, {outcome.longest} the most; "
        f"{outcome.accepted} of {outcome.drafted} drafts accepted; "
        f"{outcome.kv_bytes / 2**20:.1f} MiB of KV handed over"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
