"""`tandem bench profile`: one engine, some requests, and where its steps' time went."""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from loadtest import engine_shapes, environment
from loadtest.step_profile import PARTS, PYTHON, Recorder, Step, recording
from services.engine.api import Request, Sampling
from services.engine.torch.engine import TorchEngine
from services.runtime.settings import EngineSettings, KvSettings, ModelSettings

DECODE, PREFILL = "decode", "prefill"
LEAST_CHUNK = 16
"""Rows of one sequence that make a step one of prefill: more than drafts ever are."""


@dataclass(frozen=True, slots=True)
class ProfileOptions:
    """What is run."""

    model: str = "smollm2-135m-instruct"
    path: str = ""
    shape: str = ""
    """A random DeepSeek V3 of engine_shapes.SHAPES instead of a model."""
    dtype: str = "bfloat16"
    threads: int = 2
    batches: tuple[int, ...] = (1, 8, 32)
    context: int = 128
    """Tokens of each prompt."""
    steps: int = 60
    """Decode steps at each batch."""
    temperature: float = 0.8
    top_p: float = 0.95
    settings: Mapping[str, str] | None = None
    """More settings of the engine, by name."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Steps of one kind: milliseconds a step, all and by part, of those of middling length."""

    phase: str
    batch: int
    rows: float
    steps: int
    milliseconds: float
    parts: dict[str, float]

    @property
    def python_share(self) -> float:
        """Of the step, 0 to 1."""
        return self.parts[PYTHON] / self.milliseconds


@dataclass(frozen=True, slots=True)
class ProfileReport:
    """Profiles, and what is needed to compare them."""

    options: ProfileOptions
    environment: environment.Environment
    profiles: tuple[Profile, ...]


async def run(
    options: ProfileOptions, say: Callable[[str], None] = lambda _: None
) -> ProfileReport:
    """Loads the engine in this process and profiles it. Raises what loading raises."""
    before = environment.here()
    with ExitStack() as ends:
        model = ModelSettings(name=options.model, path=options.path)
        if options.shape:
            made = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="tandem-bench-")))
            engine_shapes.write(engine_shapes.SHAPES[options.shape], made)
            model = ModelSettings(name=f"deepseek-v3-{options.shape}", path=str(made))
        recorder = Recorder()
        ends.enter_context(recording(recorder))
        engine = TorchEngine(model, _settings(options), KvSettings(), host="127.0.0.1")
        say("loading")
        await engine.start()
        try:
            profiles = []
            for batch in options.batches:
                say(f"batch {batch}")
                recorder.steps.clear()
                await _generate(engine, batch, options)
                profiles.append(profile(recorder.steps, DECODE, batch))
                if batch == options.batches[0]:
                    profiles.insert(0, profile(recorder.steps, PREFILL, 1))
        finally:
            await engine.close()
    return ProfileReport(options, before, tuple(p for p in profiles if p is not None))


def _settings(options: ProfileOptions) -> EngineSettings:
    most = max(options.batches)
    given: dict[str, object] = {
        "dtype": options.dtype,
        "threads": options.threads,
        "max_running": most,
        "kv_blocks": most * (-(-(options.context + options.steps) // 32) + 2),
    }
    return EngineSettings.model_validate({**given, **(options.settings or {})})


async def _generate(engine: TorchEngine, batch: int, options: ProfileOptions) -> None:
    """`batch` requests at once, to their end."""
    # The last prompt must be computed before the first request is done.
    settings = _settings(options)
    chunks = -(-batch * options.context // settings.chunk_tokens)
    random = np.random.default_rng(batch)
    for number in range(batch):
        prompt = random.integers(2, min(1000, engine.info.vocabulary), options.context)
        sampling = Sampling(
            temperature=options.temperature,
            top_p=options.top_p,
            max_tokens=options.steps + chunks + 1,
            ignore_eos=True,
            seed=number,
        )
        engine.decode(Request(f"{batch}-{number}", tuple(prompt.tolist()), sampling), None)
    left = batch
    async for output in engine.outputs():
        left -= sum(o.finish_reason is not None for o in output.outputs)
        if not left:
            return


def profile(steps: list[Step], phase: str, batch: int) -> Profile | None:
    """Of the steps of a kind; None if there is none.

    The quarter that took longest and the one that took least are left out: other work on the
    machine falls on some steps only.
    """
    if phase == PREFILL:
        found = [s for s in steps if s.longest >= LEAST_CHUNK]
    else:
        found = [s for s in steps if s.longest < LEAST_CHUNK and s.sequences == batch]
    found.sort(key=lambda s: s.seconds)
    quarter = len(found) // 4
    middle = found[quarter : len(found) - quarter]
    if not middle:
        return None

    def mean(value: Callable[[Step], float]) -> float:
        return statistics.fmean(value(s) for s in middle)

    parts = {part: 1e3 * mean(lambda s, p=part: s.parts.get(p, 0.0)) for part in PARTS}  # type: ignore[misc]
    parts[PYTHON] = 1e3 * mean(lambda s: s.python)
    return Profile(
        phase, batch, mean(lambda s: s.rows), len(middle), 1e3 * mean(lambda s: s.seconds), parts
    )


def show(report: ProfileReport, console: Console) -> None:
    """Prints milliseconds a step, and each part's share."""
    options = report.options
    table = Table(
        title=f"{options.shape or options.model}, {options.dtype}, {options.threads} threads, "
        f"context {options.context}: milliseconds a step, shares",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("part", no_wrap=True)
    for p in report.profiles:
        table.add_column(f"{p.phase}\n{p.rows:.0f} rows", justify="right", no_wrap=True)
    table.add_row("step", *(f"{p.milliseconds:.2f}" for p in report.profiles))
    for part in PARTS:
        if any(p.parts[part] for p in report.profiles):
            shares = (p.parts[part] / p.milliseconds for p in report.profiles)
            table.add_row(part, *(f"{100 * share:.1f}%" for share in shares))
    console.print(table)


def write(report: ProfileReport, path: Path) -> None:
    """Writes everything as JSON. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(report), indent=1) + "\n")


def run_now(options: ProfileOptions, say: Callable[[str], None]) -> ProfileReport:
    """run() where no event loop is."""
    return asyncio.run(run(options, say))
