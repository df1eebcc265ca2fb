"""The embedded engine's speed against its peers': `tandem bench engine`.

Same weights, threads and process, in turns, so that whatever else the machine does falls on all of
them alike; medians over rounds, and ratios to a peer in the same round. Prefill is of one whole
prompt (in the engine by steps of `chunk_tokens`), decode of one token a sequence and step, greedy,
each sequence over KV of its own.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadtest import engine_shapes, environment
from loadtest.engine_report import (
    DECODE,
    LLAMA_CPP,
    PREFILL,
    TRANSFORMERS,
    EngineBenchOptions,
    EngineBenchReport,
    Point,
)
from loadtest.engine_subjects import Own, Subject, Tokens, Transformers
from loadtest.peer_llamacpp import HOW, LlamaCpp, LlamaCppError
from services.engine.models import cache, catalog
from services.engine.models.errors import ModelNotFoundError, UnsupportedModelError
from services.engine.models.folder import GGUF_SUFFIX, ModelFolder, resolve
from services.engine.torch.engine import load
from services.runtime.settings import EngineSettings, ModelSettings

# After the engine, which has a word to say before torch is loaded.
import torch  # isort: skip

QUICK = {"prompts": (512,), "contexts": (128,), "rounds": 1}


def run(
    options: EngineBenchOptions, say: Callable[[str], None] = lambda _: None
) -> EngineBenchReport:
    """Measures everything. Raises ModelNotFoundError; ImportError if transformers is missing."""
    torch.set_num_threads(options.threads)
    before = environment.here()
    with ExitStack() as ends:
        model = _model(options, ends)
        folder = resolve(model)
        subjects, skipped = _subjects(options, model, folder, say, ends)
        random = np.random.default_rng(0)
        longest = max(*options.prompts, *options.contexts)
        prompt = random.integers(2, min(1000, folder.vocabulary), longest).astype(np.int32)
        errors = _logit_errors(subjects, prompt[: min(options.prompts)])
        points: list[Point] = []
        for phase, context, batch in _places(options):
            rounds = []
            for number in range(options.rounds):
                say(f"{phase}, {context}, {batch}: round {number + 1} of {options.rounds}")
                names = list(subjects)
                names = names[number % len(names) :] + names[: number % len(names)]
                rounds.append(
                    {
                        n: _measure(subjects[n], prompt[:context], phase, batch, options.steps)
                        for n in names
                    }
                )
            points += [_point(name, phase, context, batch, rounds) for name in subjects]
        precisions = {name: subject.precision for name, subject in subjects.items()}
    return EngineBenchReport(options, before, precisions, skipped, errors, tuple(points))


def _places(options: EngineBenchOptions) -> list[tuple[str, int, int]]:
    return [(PREFILL, tokens, 1) for tokens in options.prompts] + [
        (DECODE, context, batch) for context in options.contexts for batch in options.batches
    ]


def _model(options: EngineBenchOptions, ends: ExitStack) -> ModelSettings:
    if not options.shape:
        return ModelSettings(name=options.model, path=options.path)
    made = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="tandem-bench-")))
    engine_shapes.write(engine_shapes.SHAPES[options.shape], made)
    return ModelSettings(name=f"deepseek-v3-{options.shape}", path=str(made))


def _subjects(
    options: EngineBenchOptions,
    model: ModelSettings,
    folder: ModelFolder,
    say: Callable[[str], None],
    ends: ExitStack,
) -> tuple[dict[str, Subject], dict[str, str]]:
    """All that can be had, the peers first, and why others can't."""
    found: dict[str, Subject] = {}
    skipped: dict[str, str] = {}

    def add(name: str, make: Callable[[], Subject]) -> None:
        say(f"loading {name}")
        try:
            found[name] = make()
        except (LlamaCppError, UnsupportedModelError) as error:
            skipped[name] = str(error)

    def own(kv_dtype: str, **settings: Any) -> Own:
        given = {
            "dtype": options.dtype,
            "kv_dtype": kv_dtype,
            "block_tokens": options.block_tokens,
            "threads": options.threads,
            **settings,
        }
        loaded = load(model, EngineSettings(**given))
        loaded.model.warm_up()
        weights = given.get("weights", options.dtype)
        return Own(loaded, options.chunk_tokens, f"{weights} weights, {kv_dtype} KV")

    def llama_cpp() -> LlamaCpp:
        peer = LlamaCpp(
            options.llama_cpp or Path(),
            _gguf(options),
            threads=options.threads,
            vocabulary=folder.vocabulary,
            longest=max(*options.prompts, *options.contexts),
        )
        ends.callback(peer.close)
        return peer

    add(TRANSFORMERS, lambda: Transformers(folder.path, options.dtype))
    if options.llama_cpp is not None:
        add(LLAMA_CPP, llama_cpp)
    else:
        skipped[LLAMA_CPP] = f"not asked for: {HOW}"
    for kv in options.kv_dtypes:
        add(f"tandem {kv}", lambda kv=kv: own(kv))  # type: ignore[misc]
    first = options.kv_dtypes[0]
    if options.loose:
        add("tandem loose", lambda: own(first, batch_invariant=False))
    if options.int4:
        add("tandem int4", lambda: own(first, batch_invariant=False, weights="int4"))
    return found, skipped


def _gguf(options: EngineBenchOptions) -> Path:
    """The model's GGUF file. Raises LlamaCppError."""
    if options.path:
        file = Path(options.path)
        if file.suffix.lower() != GGUF_SUFFIX:
            raise LlamaCppError(f"llama.cpp reads GGUF files; {file} is none")
        return file
    try:
        known = catalog.find(options.model)
    except ModelNotFoundError as error:
        raise LlamaCppError(str(error)) from error
    if not isinstance(known, catalog.CatalogModel):
        raise LlamaCppError(f"llama.cpp reads GGUF files; {known.name} is a folder")
    return cache.cache_folder(os.environ) / known.name / known.gguf


def _logit_errors(subjects: Mapping[str, Subject], prompt: Tokens) -> dict[str, float]:
    """Proves that all compute the same model; says how precisely."""
    for subject in subjects.values():
        subject.prefill(prompt)
    reference = subjects[TRANSFORMERS].logits.astype(np.float64)
    size = np.linalg.norm(reference)
    return {
        name: float(np.linalg.norm(subject.logits - reference) / size)
        for name, subject in subjects.items()
        if name != TRANSFORMERS
    }


@dataclass(frozen=True, slots=True)
class _Times:
    """Of one subject, place and round: seconds a token, on the clock and of CPU."""

    wall: float
    cpu: float


def _measure(subject: Subject, prompt: Tokens, phase: str, batch: int, steps: int) -> _Times:
    start, cpu = time.perf_counter(), time.process_time()
    subject.prefill(prompt)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    if phase == PREFILL:
        return _Times(wall / len(prompt), cpu / len(prompt))
    subject.spread(batch, steps + 1)
    subject.decode()  # what is prepared once for such a batch
    seconds = []
    cpu = time.process_time()
    for _ in range(steps):
        start = time.perf_counter()
        subject.decode()
        seconds.append(time.perf_counter() - start)
    cpu = time.process_time() - cpu
    return _Times(statistics.median(seconds) / batch, cpu / steps / batch)


def _point(
    subject: str, phase: str, context: int, batch: int, rounds: list[dict[str, _Times]]
) -> Point:
    peers = [p for p in (TRANSFORMERS, LLAMA_CPP) if p in rounds[0] and p != subject]
    return Point(
        subject,
        phase,
        context,
        batch,
        rate=statistics.median(1 / times[subject].wall for times in rounds),
        cpu_ms=statistics.median(1e3 * times[subject].cpu for times in rounds),
        ratios={
            peer: statistics.median(times[peer].wall / times[subject].wall for times in rounds)
            for peer in peers
        },
    )
