"""Generations with random JSON schemas, under drafts and disaggregation: every document is checked.

A prefill engine and a decode engine that drafts, many requests at a time, as a frontend would pass
them on; beside them one engine that does all of it alone, and drafts nothing, whose tokens must be
the same.

    python -m tests.contract.guided_generations --count 500
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from services.engine.api import FinishReason, Request, Sampling
from services.engine.build import build
from services.engine.models.folder import ModelFolder
from services.engine.models.text import Tokenizer
from services.runtime.settings import EngineSettings, KvSettings, ModelSettings
from tests.contract.guide_models import scripted_folder
from tests.contract.test_engine import Worker, hand_off, prompt
from tests.unit.guides.guide_world import check, schema, schemas

AT_ONCE = 24
MAX_TOKENS = 400


@dataclass(frozen=True)
class Outcome:
    """What came of it. Documents that MAX_TOKENS cut off are counted; others come instead."""

    checked: int
    cut_off: int
    tokens: int
    drafted: int
    accepted: int


def drawn(count: int, seed: int) -> list[tuple[dict, int]]:
    """Schemas and seeds of requests."""
    found: list[tuple[dict, int]] = []

    @seeded(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(schemas(closed=True), st.integers(0, 2**32))
    def collect(of: dict, request_seed: int) -> None:
        found.append((of, request_seed))

    while len(found) < count:
        collect()
    return found[:count]


async def run(count: int, seed: int, folder: Path) -> Outcome:
    """Raises AssertionError for a document that its schema does not allow, or other tokens."""
    scripted_folder(folder)
    table = Tokenizer(ModelFolder(folder, "tiny")).table

    def worker(**own) -> Worker:
        values = {"block_tokens": 8, "chunk_tokens": 64, "kv_blocks": 4000, "max_running": AT_ONCE}
        return Worker(
            build(
                ModelSettings(name="tiny", path=str(folder)),
                EngineSettings(kind="scripted", **(values | own)),
                KvSettings(layers_per_piece=2),
                "127.0.0.1",
            )
        )

    drafting = {"scripted_draft_chance": 0.6, "draft_tokens": 3}
    prefill, decode, alone = worker(**drafting), worker(**drafting), worker()
    workers = (prefill, decode, alone)
    gate = asyncio.Semaphore(AT_ONCE)
    tokens_of: dict[str, list[int]] = {}

    async def ask(name: str, of: dict, request_seed: int) -> bool:
        sampling = Sampling(
            temperature=1.0, max_tokens=MAX_TOKENS, seed=request_seed, guide=schema(of)
        )
        request = Request(name, prompt(10 + request_seed % 30, request_seed % 97), sampling)
        async with gate:
            tokens = await hand_off(prefill, decode, request)
            plain = await alone.generate(name, request.prompt_token_ids, sampling)
        assert tokens == plain, (of, request_seed)
        tokens_of[name] = tokens
        if alone.outputs[name][-1].finish_reason is FinishReason.LENGTH:
            return False
        check(json.loads(table.join(tokens).decode()), of)
        return True

    try:
        for one in workers:
            await one.start()
        ended: list[bool] = []
        while sum(ended) < count:
            more = drawn(count - sum(ended), seed + len(ended))
            asked = [ask(f"r{i}", *what) for i, what in enumerate(more, start=len(ended))]
            ended += await asyncio.gather(*asked)
        stats = decode.engine.stats()
    finally:
        for one in workers:
            await one.close()
    return Outcome(
        checked=sum(ended),
        cut_off=len(ended) - sum(ended),
        tokens=sum(map(len, tokens_of.values())),
        drafted=stats.draft_tokens,
        accepted=stats.accepted_tokens,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        outcome = asyncio.run(run(arguments.count, arguments.seed, Path(folder)))
    print(
        f"{outcome.checked} documents, all valid; {outcome.cut_off} cut off at {MAX_TOKENS}; "
        f"{outcome.tokens} tokens, {outcome.accepted} of {outcome.drafted} drafts accepted"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
