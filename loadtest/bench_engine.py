"""The embedded engine's speed against Hugging Face transformers: `python -m loadtest.bench_engine`.

Same weights, dtype, threads and process, in turns, so that whatever else the machine does falls on
all of them alike; medians over rounds, and ratios to transformers in the same round. Prefill is of
whole prompts (in the engine by steps of `chunk_tokens`), decode of one token a sequence and step,
greedy, from where prefill ended.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.table import Table

from loadtest import environment, plot
from services.engine.models.folder import resolve
from services.engine.torch.model import Batch, LlamaModel
from services.runtime.settings import ModelSettings

# After the engine, which has a word to say before torch is loaded.
import torch  # isort: skip

PEER = "transformers"


@dataclass(frozen=True, slots=True)
class EngineBenchOptions:
    """What is measured."""

    model: str = "smollm2-135m-instruct"
    """A name of `tandem models`."""
    path: str = ""
    """A Hugging Face folder or GGUF file; empty: the cached model of that name."""
    dtype: str = "bfloat16"
    threads: int = 2
    batches: tuple[int, ...] = (1, 8, 32)
    contexts: tuple[int, ...] = (128, 512)
    """Prompt lengths, tokens."""
    kv_dtypes: tuple[str, ...] = ("fp8_e4m3", "bfloat16")
    loose: bool = True
    """Measure without batch invariance too."""
    steps: int = 16
    """Decode steps in a round."""
    rounds: int = 3
    chunk_tokens: int = 256
    """Prompt tokens that the engine computes in a step."""
    block_tokens: int = 32


QUICK = {"contexts": (128,), "kv_dtypes": ("fp8_e4m3",), "loose": False, "rounds": 1}


@dataclass(frozen=True, slots=True)
class Point:
    """One subject at one place; medians over rounds. Rates are tokens a second.

    `*_ratio`: of rates, to transformers in the same round; `*_cpu_ms`: CPU time a token.
    """

    subject: str
    context: int
    batch: int
    prefill: float
    decode: float
    prefill_ratio: float
    decode_ratio: float
    prefill_cpu_ms: float
    decode_cpu_ms: float


@dataclass(frozen=True, slots=True)
class EngineBenchReport:
    """All points, and what is needed to compare them."""

    options: EngineBenchOptions
    environment: environment.Environment
    start_seconds: dict[str, float]
    """Loading and warming up, by subject; the first includes compiling if nothing is cached."""
    points: tuple[Point, ...]

    @property
    def subjects(self) -> list[str]:
        """The peer first."""
        return list(dict.fromkeys(p.subject for p in self.points))


class _Subject(Protocol):
    def prefill(self, tokens: np.ndarray) -> None:
        """Starts anew with prompts [batch, context]."""

    def decode(self) -> None:
        """One more token for every sequence."""


class _Engine:
    """A LlamaModel, as a scheduler would drive it."""

    def __init__(self, model: LlamaModel, options: EngineBenchOptions) -> None:
        self._model = model
        self._options = options

    def prefill(self, tokens: np.ndarray) -> None:
        batch, context = tokens.shape
        width = self._model.layout.blocks_for(context + self._options.steps + 1)
        self._tables = np.arange(batch * width, dtype=np.int32).reshape(batch, width)
        self._model.bind(np.zeros((batch * width, self._model.layout.block_bytes), np.uint8))
        self._position = context
        last = []
        # Rows of all prompts, one after another, in steps of chunk_tokens.
        for start in range(0, batch * context, self._options.chunk_tokens):
            rows = np.arange(start, min(start + self._options.chunk_tokens, batch * context))
            sequences, positions = rows // context, rows % context
            present, counts = np.unique(sequences, return_counts=True)
            ends = np.flatnonzero(positions == context - 1)
            logits = self._model.forward(
                Batch(
                    token_ids=tokens[sequences, positions].astype(np.int32),
                    positions=positions.astype(np.int32),
                    query_starts=np.array([0, *np.cumsum(counts)], np.int32),
                    block_tables=self._tables[present],
                    logit_rows=ends.astype(np.int32),
                )
            )
            last.append(logits.argmax(-1))
        self._next = np.concatenate(last).astype(np.int32)

    def decode(self) -> None:
        batch = len(self._next)
        logits = self._model.forward(
            Batch(
                token_ids=self._next,
                positions=np.full(batch, self._position, np.int32),
                query_starts=np.arange(batch + 1, dtype=np.int32),
                block_tables=self._tables,
                logit_rows=np.arange(batch, dtype=np.int32),
            )
        )
        self._next = logits.argmax(-1).astype(np.int32)
        self._position += 1


class _Peer:
    """transformers' LlamaForCausalLM with its own cache."""

    def __init__(self, folder: Path, options: EngineBenchOptions) -> None:
        from transformers import AutoModelForCausalLM

        dtype = getattr(torch, options.dtype)
        # Loaded for inference: from_pretrained() calls eval().
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self._cache: Any = None

    def _step(self, tokens: torch.Tensor) -> None:
        with torch.inference_mode():
            out = self._model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        self._next = out.logits[:, -1:].argmax(-1)

    def prefill(self, tokens: np.ndarray) -> None:
        self._cache = None
        self._step(torch.from_numpy(tokens))

    def decode(self) -> None:
        self._step(self._next)


def _subjects(
    options: EngineBenchOptions, say: Callable[[str], None]
) -> tuple[dict[str, _Subject], dict[str, float]]:
    folder = resolve(ModelSettings(name=options.model, path=options.path))
    found: dict[str, _Subject] = {}
    seconds = {}

    def add(name: str, make: Callable[[], _Subject]) -> None:
        say(f"loading {name}")
        start = time.perf_counter()
        found[name] = make()
        seconds[name] = time.perf_counter() - start

    def engine(kv_dtype: str, invariant: bool) -> _Engine:
        model = LlamaModel.load(
            folder.path,
            dtype=options.dtype,
            kv_dtype=kv_dtype,
            block_tokens=options.block_tokens,
            batch_invariant=invariant,
            threads=options.threads,
            model_name=folder.name,
        )
        model.warm_up()
        return _Engine(model, options)

    add(PEER, lambda: _Peer(folder.path, options))
    for kv in options.kv_dtypes:
        add(kv, lambda kv=kv: engine(kv, True))  # type: ignore[misc]
        if options.loose:
            add(f"{kv}, not invariant", lambda kv=kv: engine(kv, False))  # type: ignore[misc]
    return found, seconds


@dataclass(frozen=True, slots=True)
class _Times:
    """Of one subject, place and round: seconds a token, on the clock and of CPU."""

    prefill: float
    decode: float
    prefill_cpu: float
    decode_cpu: float


def _measure(subject: _Subject, tokens: np.ndarray, steps: int) -> _Times:
    start, cpu = time.perf_counter(), time.process_time()
    subject.prefill(tokens)
    prefill, prefill_cpu = time.perf_counter() - start, time.process_time() - cpu
    seconds = []
    cpu = time.process_time()
    for _ in range(steps):
        start = time.perf_counter()
        subject.decode()
        seconds.append(time.perf_counter() - start)
    cpu = time.process_time() - cpu
    batch = len(tokens)
    return _Times(
        prefill / tokens.size,
        statistics.median(seconds) / batch,
        prefill_cpu / tokens.size,
        cpu / steps / batch,
    )


def run(
    options: EngineBenchOptions, say: Callable[[str], None] = lambda _: None
) -> EngineBenchReport:
    """Measures everything. Raises ModelNotFoundError; ImportError if transformers is missing."""
    torch.set_num_threads(options.threads)
    before = environment.here()
    subjects, seconds = _subjects(options, say)
    random = np.random.default_rng(0)
    points: list[Point] = []
    for context in options.contexts:
        for batch in options.batches:
            tokens = random.integers(0, 1000, (batch, context))
            for subject in subjects.values():
                _measure(subject, tokens[:, :16], 1)
            rounds = []
            for number in range(options.rounds):
                say(f"context {context}, batch {batch}, round {number + 1} of {options.rounds}")
                names = list(subjects)
                names = names[number % len(names) :] + names[: number % len(names)]
                rounds.append({n: _measure(subjects[n], tokens, options.steps) for n in names})
            points += [_point(name, context, batch, rounds) for name in subjects]
    return EngineBenchReport(options, before, seconds, tuple(points))


def _point(subject: str, context: int, batch: int, rounds: list[dict[str, _Times]]) -> Point:
    def middle(value: Callable[[_Times, _Times], float]) -> float:
        return statistics.median(value(times[subject], times[PEER]) for times in rounds)

    return Point(
        subject,
        context,
        batch,
        prefill=middle(lambda own, _: 1 / own.prefill),
        decode=middle(lambda own, _: 1 / own.decode),
        prefill_ratio=middle(lambda own, peer: peer.prefill / own.prefill),
        decode_ratio=middle(lambda own, peer: peer.decode / own.decode),
        prefill_cpu_ms=middle(lambda own, _: 1e3 * own.prefill_cpu),
        decode_cpu_ms=middle(lambda own, _: 1e3 * own.decode_cpu),
    )


def show(report: EngineBenchReport, console: Console) -> None:
    """Prints a table: tokens a second, times transformers', CPU milliseconds a token."""
    options = report.options
    table = Table(
        title=f"{options.model}, {options.dtype}, {options.threads} threads",
        caption="at context, batch: tokens/s (times transformers'; CPU ms a token)",
        title_justify="left",
    )
    for column in ("at", "subject"):
        table.add_column(column, no_wrap=True)
    for column in ("prefill", "decode"):
        table.add_column(column, justify="right", no_wrap=True)
    place = None
    for p in report.points:
        if place not in (None, (p.context, p.batch)):
            table.add_section()
        place = (p.context, p.batch)
        table.add_row(
            f"{p.context}, {p.batch}",
            p.subject,
            f"{p.prefill:,.0f} ({p.prefill_ratio:.2f}x; {p.prefill_cpu_ms:.2f})",
            f"{p.decode:,.1f} ({p.decode_ratio:.2f}x; {p.decode_cpu_ms:.2f})",
        )
    console.print(table)


def write(report: EngineBenchReport, path: Path) -> None:
    """Writes everything as JSON. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(report), indent=1) + "\n")


def draw(report: EngineBenchReport, path: Path) -> None:
    """Writes a PNG of tokens a second, by batch. Raises PlotUnavailableError, OSError."""
    options = report.options
    drawn, axes = plot.figure(2 * len(options.contexts), f"{options.model}, {options.dtype}")
    width = 0.8 / len(report.subjects)
    for i, context in enumerate(options.contexts):
        for j, what in enumerate(("prefill", "decode")):
            ax = axes[2 * i + j]
            for k, subject in enumerate(report.subjects):
                here = [p for p in report.points if (p.subject, p.context) == (subject, context)]
                places = np.arange(len(here)) + k * width
                ax.bar(places, [getattr(p, what) for p in here], width, label=subject)
            ax.set_xticks(np.arange(len(options.batches)) + 0.4 - width / 2, options.batches)
            ax.set(title=f"{what}, context {context}", xlabel="batch", ylabel="tokens/s")
            ax.grid(alpha=0.3, axis="y")
    axes[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=130)


def main() -> None:
    """From the command line."""
    defaults = EngineBenchOptions()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=defaults.model)
    parser.add_argument("--path", default="", help="Hugging Face folder or GGUF file")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=environment.here().cores)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--loose", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--quick", action="store_true", help="one round, context 128, fp8 only")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of JSON and plot")
    given = vars(parser.parse_args())
    quick, out, rounds = given.pop("quick"), given.pop("out"), given.pop("rounds")
    given.update(QUICK if quick else {})
    given.update({"rounds": rounds} if rounds else {})
    console = Console()
    with Console(stderr=True).status("loading") as status:
        report = run(EngineBenchOptions(**given), status.update)
    show(report, console)
    write(report, out / "bench_engine.json")
    draw(report, out / "bench_engine.png")


if __name__ == "__main__":
    main()
