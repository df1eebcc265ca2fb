"""What LoRA adapters cost a step: `python -m loadtest.bench_lora` (options: `--help`).

Steps with so many adapters, spread over the batch, in turns with the same step without any; random
adapters on all projections of attention and MLP. CPU time, since machines are shared; the ratio is
the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from services.engine.adapters import AdapterFiles, AdapterLimits
from services.engine.models.folder import resolve
from services.engine.torch.model import Batch, TorchModel
from services.runtime.settings import ModelSettings

# After the engine, which has a word to say before torch is loaded.
import torch  # isort: skip
from safetensors.torch import save  # isort: skip

BATCHES = (1, 8, 32)
ADAPTERS = (1, 4, 8)
CHUNKS = (64, 256)
LIMITS = AdapterLimits(count=64, rank=256, bytes=2**32)


def files(model: TorchModel, name: str, rank: int, seed: int) -> AdapterFiles:
    """A random adapter for every part of every projection but the head's."""
    random, tensors = torch.Generator().manual_seed(seed), {}
    for layer in model.weights.layers:
        for projection in layer.projections:
            for part in projection.parts:
                for end, shape in (
                    ("A", (rank, projection.linear.inputs)),
                    ("B", (part.outputs, rank)),
                ):
                    key = f"base_model.model.{part.name}.lora_{end}.weight"
                    tensors[key] = torch.randn(shape, generator=random) / 100
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    return AdapterFiles(f"{name}@{seed:032x}", json.dumps(config).encode(), save(tensors))


def step(model: TorchModel, counts: Sequence[int], context: int) -> Batch:
    """So many new rows of each sequence, which has `context` tokens; a pool to go with it."""
    sequences = len(counts)
    width = model.layout.blocks_for(context + max(counts))
    model.bind(np.zeros((sequences * width, model.layout.block_bytes), np.uint8))
    total = sum(counts)
    starts = np.cumsum([0, *counts]).astype(np.int32)
    return Batch(
        token_ids=np.arange(total, dtype=np.int32) % model.config.vocabulary,
        positions=np.concatenate([context + np.arange(n, dtype=np.int32) for n in counts]),
        query_starts=starts,
        block_tables=np.arange(sequences * width, dtype=np.int32).reshape(sequences, width),
        logit_rows=starts[1:] - 1,
    )


def compare(model: TorchModel, batch: Batch, adapters: Sequence[str], rounds: int) -> str:
    """Of the step without and with these adapters, one sequence after the other taking the next."""
    sequences = len(batch.query_starts) - 1
    own = tuple(adapters[i % len(adapters)] for i in range(sequences))
    both = batch, replace(batch, adapters=own)
    for each in both:
        model.forward(each)
    ratios, base = [], []
    for _ in range(rounds):
        spent = []
        for each in both:
            before = time.process_time()
            model.forward(each)
            spent.append(time.process_time() - before)
        ratios.append(spent[1] / spent[0])
        base.append(spent[0])
    return f"{statistics.median(ratios):.2f}x of {1e3 * statistics.median(base):.1f} ms"


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="", help="Hugging Face folder; default: SmolLM2-135M.")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    folder = resolve(ModelSettings(path=given.model)).path
    model = TorchModel.load(folder, threads=given.threads)
    ids = []
    for seed in range(max(ADAPTERS)):
        began = time.perf_counter()
        adapter, weights = model.adapters.read(files(model, "a", given.rank, seed), LIMITS)
        model.adapters.put(adapter.id, weights)
        ids.append(adapter.id)
        took = time.perf_counter() - began
    print(f"an adapter of rank {given.rank}: {adapter.bytes / 2**20:.1f} MiB, read in {took:.2f} s")
    for batch in BATCHES:
        for count in (n for n in ADAPTERS if n <= batch):
            decode = step(model, [1] * batch, given.context)
            found = compare(model, decode, ids[:count], given.rounds)
            print(f"decode, batch {batch}, {count} adapters: {found}")
    for tokens in CHUNKS:
        prefill = step(model, [tokens], 0)
        found = compare(model, prefill, ids[:1], max(3, given.rounds // 3))
        print(f"prefill, {tokens} tokens, 1 adapter: {found}")


if __name__ == "__main__":
    main()
