"""The model card: README.md beside the weights, every figure of it measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from training.tiny_deepseek.corpus import SOURCES
from training.tiny_deepseek.evaluate import LENGTH, WINDOWS, Figures
from training.tiny_deepseek.shape import Shape

QUESTIONS = (
    "What is the capital of Japan?",
    "What is a dog?",
    "What does happy mean?",
    "What is another word for car?",
    "What kind of thing is a river?",
    "Who are you?",
)
OPENINGS = ("In the beginning God", "def __init__(self, ")

_HEAD = """\
---
license: apache-2.0
language: en
pipeline_tag: text-generation
---

# tiny-deepseek

A DeepSeek V3 of {parameters:.2f} million parameters ({active:.2f} million at work for a token)
that has learned something: readable text of a few kinds, short answers to questions about
words. It is what Tandem shows and tests its DeepSeek path with, on any machine: latent
attention, experts, multi-token prediction, FP8 weights.

**For**: tests, demonstrations, measurements of serving. **Not for**: knowledge, advice, use by
people. What it says is often wrong.

## Shape

{layers} layers of which {dense} dense, width {width}, {heads} heads (query rank {query_rank},
latent {latent}, {nope} + {rope} values a key, {value} a value), {experts} experts in {groups}
groups of which a token's {chosen} are chosen in {kept}, one shared expert, one layer for
multi-token prediction. Byte-level BPE of {vocabulary} tokens, special tokens and chat template
as DeepSeek's. Trained on windows of up to {trained} tokens; YaRN stretches that to {context}.

The folder is as DeepSeek releases V3: the same names, projections in float8 e4m3 with one scale
for each block of 128 by 128, the prediction layer as layer {layers}.

## Corpus

Text of Debian packages that may be used and passed on freely. Of each domain one document in
fifty was held out.

| domain | what | package | licence | training tokens | share |
|---|---|---|---|---|---|
{corpus}

Jargon File 4.4.7. WordNet 3.0 Copyright 2006 by Princeton University, all rights reserved.
Python and its documentation: Copyright 2001 Python Software Foundation, all rights reserved.
The weights are under Tandem's licence.

## Training

{tokens:.1f} million tokens in {steps} steps, {minutes:.0f} minutes of two threads of a shared
CPU: Muon for matrices, AdamW for the rest, no loss for balance (a bias on each expert's score
follows its load). Rates fall by the clock, so no two runs are alike. Again, in a folder OUT:

```console
$ python -m training.tiny_deepseek --out OUT --minutes {minutes:.0f}
$ python -m training.tiny_deepseek.ship --out OUT FOLDER
```

## Figures

Of this folder, on held-out text: {windows} windows of {length} tokens a domain (`python -m
training.tiny_deepseek.evaluate`). Agreed: share of positions where the prediction layer's
likeliest token is the model's own, which is what greedy decoding accepts. Load: rows of the
busiest expert over the mean, the mean over the layers. Long: bits a byte in windows of
{long_length} tokens, most of it beyond what was trained.

| domain | loss, nats a token | bits a byte | before FP8 | long | agreed | load |
|---|---|---|---|---|---|---|
{figures}

Greedy answers:

{answers}

Greedy continuations:

{continuations}
"""


@dataclass(frozen=True, slots=True)
class Run:
    """A training, and what came out.

    before: the figures of the weights that were not rounded; long: those of long windows.
    """

    shape: Shape
    parameters: int
    active: int
    tokens: int
    steps: int
    minutes: float
    domain_tokens: Mapping[str, int]
    packages: Mapping[str, str]
    before: Mapping[str, Figures]
    after: Mapping[str, Figures]
    long: Mapping[str, Figures]
    answers: Sequence[tuple[str, str]]
    continuations: Sequence[tuple[str, str]]


def card(run: Run) -> str:
    """README.md."""
    shape = run.shape
    return _HEAD.format(
        parameters=run.parameters / 1e6,
        active=run.active / 1e6,
        layers=shape.layers,
        dense=shape.dense_layers,
        width=shape.width,
        heads=shape.heads,
        query_rank=shape.query_rank,
        latent=shape.latent_rank,
        nope=shape.nope,
        rope=shape.rope,
        value=shape.value,
        experts=shape.experts,
        groups=shape.groups,
        chosen=shape.chosen,
        kept=shape.kept_groups,
        vocabulary=shape.vocabulary,
        trained=shape.trained_context,
        context=shape.context,
        corpus="\n".join(_corpus_rows(run)),
        tokens=run.tokens / 1e6,
        steps=run.steps,
        minutes=run.minutes,
        windows=WINDOWS,
        length=LENGTH,
        long_length=shape.context,
        figures="\n".join(_figure_rows(run)),
        answers="\n".join(f"- {question} *{text.strip()}*" for question, text in run.answers),
        continuations="\n\n".join(f"```\n{a}{b.rstrip()}\n```" for a, b in run.continuations),
    )


def _corpus_rows(run: Run) -> list[str]:
    return [
        f"| {s.domain} | {s.about} | {', '.join(f'{p} {run.packages[p]}' for p in s.packages)} "
        f"| {s.licence} | {run.domain_tokens[s.domain] / 1e6:.2f}M | {s.share}% |"
        for s in SOURCES
    ]


def _figure_rows(run: Run) -> list[str]:
    return [
        f"| {name} | {f.loss:.3f} | {f.bits:.3f} | {run.before[name].bits:.3f} "
        f"| {run.long[name].bits:.3f} | {f.agreed:.3f} | {f.load:.2f} |"
        for name, f in run.after.items()
    ]
