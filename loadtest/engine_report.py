"""What `tandem bench engine` was asked for and found: shown, written, drawn."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from loadtest import environment, plot

TRANSFORMERS, LLAMA_CPP = "transformers", "llama.cpp"
PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True, slots=True)
class EngineBenchOptions:
    """What is measured."""

    model: str = "smollm2-135m-instruct"
    """A name of `tandem models`."""
    path: str = ""
    """A Hugging Face folder or GGUF file; empty: the cached model of that name."""
    shape: str = ""
    """A random DeepSeek V3 of engine_shapes.SHAPES instead."""
    dtype: str = "bfloat16"
    threads: int = 2
    prompts: tuple[int, ...] = (512, 4096)
    """Lengths that prefill is measured at, tokens."""
    batches: tuple[int, ...] = (1, 8, 32)
    contexts: tuple[int, ...] = (128, 512, 2048)
    """Tokens before the ones that decode is measured at."""
    kv_dtypes: tuple[str, ...] = ("fp8_e4m3",)
    loose: bool = False
    """Measure without batch invariance too."""
    int4: bool = False
    """Measure with int4 weights too."""
    llama_cpp: Path | None = None
    """Folder of libllama."""
    steps: int = 8
    """Decode steps in a round."""
    rounds: int = 3
    chunk_tokens: int = 256
    """Prompt tokens that the engine computes in a step."""
    block_tokens: int = 32


@dataclass(frozen=True, slots=True)
class Point:
    """One subject at one place; medians over rounds."""

    subject: str
    phase: str
    context: int
    batch: int
    rate: float
    """Tokens a second."""
    cpu_ms: float
    """CPU time a token."""
    ratios: dict[str, float]
    """Times a peer's rate in the same round, by peer."""


@dataclass(frozen=True, slots=True)
class EngineBenchReport:
    """All points, and what is needed to compare them."""

    options: EngineBenchOptions
    environment: environment.Environment
    precisions: dict[str, str]
    """Of weights and KV, by subject."""
    skipped: dict[str, str]
    """Why, by subject."""
    logit_errors: dict[str, float]
    """By subject: how far a prompt's last logits are from transformers', relative, root mean
    square."""
    points: tuple[Point, ...]

    @property
    def subjects(self) -> list[str]:
        """The peers first."""
        return list(self.precisions)


def show(report: EngineBenchReport, console: Console) -> None:
    """Prints tokens a second, times each peer's, and CPU milliseconds a token."""
    options = report.options
    peers = [p for p in (TRANSFORMERS, LLAMA_CPP) if p in report.precisions]
    table = Table(
        title=f"{options.shape or options.model}, {options.threads} threads",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("at", no_wrap=True)
    table.add_column("subject", no_wrap=True)
    for column in ("tokens/s", "CPU ms\na token", *(f"times\n{p}" for p in peers)):
        table.add_column(column, justify="right", no_wrap=True)
    place = ""
    for p in report.points:
        at = f"{p.phase} {p.context}" + (f" x {p.batch}" if p.phase == DECODE else "")
        if place not in ("", at):
            table.add_section()
        ratios = (f"{p.ratios[peer]:.2f}" if peer in p.ratios else "" for peer in peers)
        shown = "" if place == at else at
        table.add_row(shown, p.subject, f"{p.rate:,.1f}", f"{p.cpu_ms:.2f}", *ratios)
        place = at
    console.print(table)
    for name, precision in report.precisions.items():
        error = report.logit_errors.get(name)
        far = "" if error is None else f"; logits {100 * error:.2f}% from {TRANSFORMERS}'"
        console.print(f"{name}: {precision}{far}", highlight=False, soft_wrap=True)
    for name, why in report.skipped.items():
        console.print(f"{name} skipped: {why}", highlight=False, soft_wrap=True)


def write(report: EngineBenchReport, path: Path) -> None:
    """Writes everything as JSON. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(report), indent=1, default=str) + "\n")


def draw(report: EngineBenchReport, path: Path) -> None:
    """Writes a PNG of tokens a second. Raises PlotUnavailableError, OSError."""
    options = report.options
    panels = [(PREFILL, 0), *((DECODE, context) for context in options.contexts)]
    title = f"{options.shape or options.model}, {options.threads} threads"
    drawn, axes = plot.figure(len(panels), title)
    width = 0.8 / len(report.subjects)
    for ax, (phase, context) in zip(axes, panels, strict=True):
        ticks = options.prompts if phase == PREFILL else options.batches
        for k, subject in enumerate(report.subjects):
            here = [
                p
                for p in report.points
                if (p.subject, p.phase) == (subject, phase) and context in (0, p.context)
            ]
            places = np.arange(len(here)) + k * width
            ax.bar(places, [p.rate for p in here], width, label=subject)
        ax.set_xticks(np.arange(len(ticks)) + 0.4 - width / 2, ticks)
        label = "prompt, tokens" if phase == PREFILL else "batch"
        shown = phase if phase == PREFILL else f"{phase}, context {context}"
        ax.set(title=shown, xlabel=label, ylabel="tokens/s")
        ax.grid(alpha=0.3, axis="y")
    axes[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=130)
