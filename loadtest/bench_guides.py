"""What guides cost: a mask, and a decode step of eight sequences with and without them.

    python -m loadtest.bench_guides

The model is model.name of the settings' defaults, on this machine's CPU. Rounds with a schema and
without take turns; figures are medians of CPU time, of one thread that computes. Masks are timed by
themselves, on the tokens that came.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence

from services.engine.api import Engine, Guide, GuideKind, Request, Sampling
from services.engine.build import build
from services.engine.guides.guided import Guided
from services.engine.guides.vocabulary import Vocabulary
from services.engine.models.folder import ModelFolder, resolve
from services.engine.models.text import Tokenizer
from services.runtime.settings import EngineSettings, KvSettings, ModelSettings

BATCH = 8
TOKENS = 64

_STAFF = {
    "type": "array",
    "minItems": 20,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 30},
            "role": {"enum": ["engineer", "designer", "writer", "manager"]},
            "age": {"type": "integer", "minimum": 18, "maximum": 99},
            "email": {"type": "string", "format": "email"},
            "skills": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
        },
        "required": ["name", "role", "age", "skills"],
        "additionalProperties": False,
    },
}
GUIDES = {
    "JSON schema": Guide(GuideKind.JSON_SCHEMA, (json.dumps(_STAFF),)),
    "any JSON object": Guide(GuideKind.JSON_OBJECT),
    "regular expression": Guide(GuideKind.REGEX, (r"([A-Z][a-z]{1,12} ){60,}[a-z]+\.",)),
}


async def generate(
    engine: Engine, prompt: Sequence[int], guide: Guide | None, name: str
) -> tuple[float, list[list[int]]]:
    """BATCH sequences of TOKENS tokens: CPU seconds a step, and the tokens."""
    outputs = engine.outputs()
    tokens: dict[str, list[int]] = {f"{name}-{i}": [] for i in range(BATCH)}
    for i, request_id in enumerate(tokens):
        sampling = Sampling(max_tokens=TOKENS, seed=i, guide=guide, ignore_eos=guide is None)
        engine.decode(Request(request_id, tuple(prompt), sampling), None)
    running, took = set(tokens), []
    before = time.process_time()
    while running:
        step = await anext(outputs)
        now = time.process_time()
        if len(running) == BATCH == len(step.outputs):
            took.append(now - before)
        before = now
        for output in step.outputs:
            if output.error is not None:
                raise RuntimeError(output.error.message)
            tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                running.discard(output.request_id)
    return statistics.median(took), list(tokens.values())


def mask_seconds(
    vocabulary: Vocabulary, guide: Guide, sequences: Sequence[list[int]]
) -> list[float]:
    """CPU time of each mask on the way of these tokens, what was accepted before it included."""
    took = []
    for sequence in sequences:
        guided = Guided(vocabulary, guide)
        for token in sequence:
            began = time.thread_time()
            guided.masks()
            took.append(time.thread_time() - began)
            guided.accept([token])
    return sorted(took)


async def measure(folder: ModelFolder, rounds: int) -> None:
    """Prints the table."""
    tokenizer = Tokenizer(folder)
    began = time.perf_counter()
    vocabulary = Vocabulary(tokenizer.table.tokens, folder.vocabulary, folder.eos_token_ids)
    print(
        f"{folder.name}: {len(tokenizer.table)} tokens, vocabulary built in "
        f"{time.perf_counter() - began:.2f} s"
    )
    engine = build(
        ModelSettings(name=folder.name, path=str(folder.path)),
        EngineSettings(max_running=BATCH, threads=1),
        KvSettings(),
        "127.0.0.1",
    )
    prompt = tokenizer.encode_chat([{"role": "user", "content": "List the staff."}])
    await engine.start()
    try:
        for name, guide in GUIDES.items():
            began = time.perf_counter()
            Guided(vocabulary, guide)
            compiled = time.perf_counter() - began
            free, held = [], []
            sequences: list[list[int]] = []
            for i in range(rounds):
                free.append((await generate(engine, prompt, None, f"{name}-free-{i}"))[0])
                step, sequences = await generate(engine, prompt, guide, f"{name}-held-{i}")
                held.append(step)
            masks = mask_seconds(vocabulary, guide, sequences)
            mask = statistics.mean(masks)
            print(
                f"{name}: compiled in {compiled * 1e3:.1f} ms; a mask {mask * 1e6:.0f} us "
                f"(median {masks[len(masks) // 2] * 1e6:.0f}, "
                f"99% {masks[len(masks) * 99 // 100] * 1e6:.0f}, most {masks[-1] * 1e6:.0f}); "
                f"step at batch {BATCH} {statistics.median(free) * 1e3:.1f} ms without, "
                f"{statistics.median(held) * 1e3:.1f} ms with; "
                f"masks are {BATCH * mask / statistics.median(held):.1%} of it, beside it"
            )
    finally:
        await engine.close()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    asyncio.run(measure(resolve(ModelSettings()), parser.parse_args().rounds))


if __name__ == "__main__":
    main()
