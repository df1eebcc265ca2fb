"""What rounding KV costs in quality, beside what it saves: `python -m loadtest.kv_quality`.

One model and one text, once for each dtype of KV: the text is cut into windows, each is computed
as a prompt by steps of `chunk_tokens`, and every position's logits are compared with those over
float32 KV. All rows read keys as they are stored, as decoding ones do.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from loadtest import engine_shapes
from services.engine.models.folder import resolve
from services.engine.stepped.batch import LoadedModel, StepBatch
from services.engine.torch.engine import load
from services.runtime.settings import EngineSettings, ModelSettings

EXACT = "float32"
ROUNDED = ("bfloat16", "fp8_e4m3")

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Int32s = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class QualityOptions:
    """What is measured."""

    model: str = "smollm2-135m-instruct"
    """A name of `tandem models`."""
    path: str = ""
    """A Hugging Face folder or GGUF file; empty: the cached model of that name."""
    shape: str = ""
    """A random DeepSeek V3 of this size instead (loadtest/engine_shapes.py), on random tokens."""
    text: str = "docs"
    """What the model was not trained on: a file, or a folder with Markdown files."""
    dtype: str = "float32"
    """Of weights and activations; with float32 nothing is rounded but KV."""
    windows: int = 8
    window: int = 512
    """Tokens of a window."""
    chunk_tokens: int = 128
    block_tokens: int = 32
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Quality:
    """One dtype of KV, over all positions that have a next token."""

    kv_dtype: str
    token_layer_bytes: float
    """KV of a token in a layer."""
    perplexity: float
    perplexity_change: float
    """Relative to that over float32 KV."""
    perplexity_error: float
    """Standard error of the change, from its spread over windows."""
    logit_error: float
    """Root mean square of the logits' differences, over the standard deviation of the exact ones;
    both about their position's mean, which changes no probability."""
    divergence: float
    """Mean Kullback-Leibler divergence from the distribution over float32 KV, nats."""
    same_first: float
    """Share of positions where the likeliest token is the same."""


@dataclass(frozen=True, slots=True)
class QualityReport:
    """The exact dtype first."""

    options: QualityOptions
    model: str
    rows: tuple[Quality, ...]


def run(options: QualityOptions) -> QualityReport:
    """Raises what finding and loading a model raises, and ValueError for a text too short."""
    with ExitStack() as ends:
        model = _model(options, ends)
        windows = _windows(options, model)
        loaded = {dtype: load(model, _settings(options, dtype)) for dtype in (EXACT, *ROUNDED)}
        # By dtype, window by window: what _compare gives.
        found: dict[str, list[Doubles]] = {dtype: [] for dtype in loaded}
        for window in windows:
            exact = _logits(loaded[EXACT], window, options.chunk_tokens)
            found[EXACT].append(_compare(exact, exact, window))
            for dtype in ROUNDED:
                rounded = _logits(loaded[dtype], window, options.chunk_tokens)
                found[dtype].append(_compare(exact, rounded, window))
        base = np.stack(found[EXACT])
        rows = [
            _quality(dtype, loaded[dtype], np.stack(parts), base) for dtype, parts in found.items()
        ]
    return QualityReport(options, model.name, tuple(rows))


def _model(options: QualityOptions, ends: ExitStack) -> ModelSettings:
    if not options.shape:
        name = Path(options.path).name if options.path else options.model
        return ModelSettings(name=name, path=options.path)
    made = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="tandem-quality-")))
    engine_shapes.write(engine_shapes.SHAPES[options.shape], made)
    return ModelSettings(name=f"deepseek-v3-{options.shape}", path=str(made))


def _settings(options: QualityOptions, kv_dtype: str) -> EngineSettings:
    return EngineSettings(
        dtype=options.dtype,
        kv_dtype=kv_dtype,
        block_tokens=options.block_tokens,
        threads=options.threads,
        # Probing for it takes long, and no logits are compared bit by bit.
        batch_invariant=False,
    )


def _windows(options: QualityOptions, model: ModelSettings) -> Int32s:
    """Token ids [windows, window]."""
    folder = resolve(model)
    wanted = options.windows * options.window
    if options.shape:
        tokens = np.random.default_rng(0).integers(2, folder.vocabulary, wanted)
    else:
        tokenizer = Tokenizer.from_file(str(folder.path / "tokenizer.json"))
        place = Path(options.text)
        files = sorted(place.glob("*.md")) if place.is_dir() else [place]
        text = "\n".join(file.read_text() for file in files)
        tokens = np.array(tokenizer.encode(text, add_special_tokens=False).ids)
    if len(tokens) < wanted:
        raise ValueError(f"{options.text}: {len(tokens)} tokens, expected {wanted} at least")
    return tokens[:wanted].reshape(options.windows, options.window).astype(np.int32)


def _logits(loaded: LoadedModel, tokens: Int32s, chunk: int) -> Floats:
    """Logits [window - 1, vocabulary] of every position that has a next token."""
    layout = loaded.model.layout
    blocks = layout.blocks_for(len(tokens))
    loaded.model.bind(np.zeros((blocks, layout.block_bytes), np.uint8))
    found = []
    for start in range(0, len(tokens) - 1, chunk):
        part = tokens[start : min(start + chunk, len(tokens) - 1)]
        rows = np.arange(len(part), dtype=np.int32)
        batch = StepBatch(
            token_ids=part,
            positions=rows + np.int32(start),
            query_starts=np.array([0, len(part)], np.int32),
            block_tables=np.arange(blocks, dtype=np.int32)[None],
            logit_rows=rows,
        )
        found.append(loaded.model.forward(batch, None, layout.layers))
    return np.concatenate(found)


def _compare(exact: Floats, found: Floats, tokens: Int32s) -> Doubles:
    """Means over a window's positions, for _quality.

    Loss; mean square of the difference; variance of the exact logits; divergence; same first.
    """
    sums = np.zeros(5)
    # Position by position: a window's logits in float64 would be large.
    for p, q, following in zip(exact, found, tokens[1:], strict=True):
        log_p, log_q = _log_shares(p), _log_shares(q)
        apart = q.astype(np.float64) - p
        sums += (
            -log_q[following],
            apart.var(),
            p.var(dtype=np.float64),
            (np.exp(log_p) * (log_p - log_q)).sum(),
            p.argmax() == q.argmax(),
        )
    return sums / len(exact)


def _log_shares(logits: Floats) -> Doubles:
    """Logarithms of softmax."""
    x = logits.astype(np.float64)
    x -= x.max()
    shares: Doubles = x - np.log(np.exp(x).sum())
    return shares


def _quality(dtype: str, loaded: LoadedModel, parts: Doubles, base: Doubles) -> Quality:
    loss, square, variance, divergence, same = parts.mean(axis=0)
    # Window by window, so that what makes a window hard falls out.
    change = parts[:, 0] - base[:, 0]
    factor = math.exp(change.mean())
    error = factor * change.std(ddof=1) / math.sqrt(len(change)) if len(change) > 1 else math.nan
    layout = loaded.model.layout
    return Quality(
        kv_dtype=dtype,
        token_layer_bytes=layout.token_bytes / layout.layers,
        perplexity=math.exp(loss),
        perplexity_change=factor - 1,
        perplexity_error=float(error),
        logit_error=math.sqrt(square / variance),
        divergence=float(divergence),
        same_first=float(same),
    )


def show(report: QualityReport, console: Console) -> None:
    """The table that docs/engine.md has."""
    options = report.options
    tokens = f"{options.windows} windows of {options.window} tokens"
    table = Table(title=f"{report.model}, {tokens}, computed in {options.dtype}")
    for name in ("KV", "bytes", "perplexity", "change", "logits", "divergence", "same first"):
        table.add_column(name, justify="left" if name == "KV" else "right", no_wrap=True)
    for row in report.rows:
        table.add_row(
            row.kv_dtype,
            f"{row.token_layer_bytes:,.0f}",
            f"{row.perplexity:,.2f}",
            f"{row.perplexity_change:+.2%} ± {row.perplexity_error:.2%}",
            f"{row.logit_error:.2%}",
            f"{row.divergence:.2e}",
            f"{row.same_first:.2%}",
        )
    console.print(table)


def main() -> None:
    """Measures, prints the table, and writes out/kv_quality.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for option in fields(QualityOptions):
        flag = "--" + option.name.replace("_", "-")
        parser.add_argument(flag, type=type(option.default), default=option.default)
    report = run(QualityOptions(**vars(parser.parse_args())))
    show(report, Console(width=100))
    out = Path("out/kv_quality.json")
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(asdict(report), indent=1) + "\n")


if __name__ == "__main__":
    main()
