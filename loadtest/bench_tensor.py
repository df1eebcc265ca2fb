"""What sharing a model costs and brings, in prefill: `python -m loadtest.bench_tensor`.

A prompt is computed in chunks, by one process and by several that share the model, each with one
thread, in turns. Times are of rank 0, medians over rounds; CPU time is of all processes together.
Where others use the machine, too, the best round tells most: processes wait for each other. The
logits of both are compared, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import statistics
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from loadtest import engine_shapes
from services.engine.adapters import AdapterLimits
from services.engine.group.part import Part
from services.engine.models.folder import resolve
from services.engine.torch.engine import FOLLOW_PATIENCE, LEAD_PATIENCE, Meeting
from services.engine.torch.model import Batch, TorchModel
from services.engine.torch.parallel.tensor_lead import TensorLead, follow
from services.runtime.settings import ModelSettings

HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Turn:
    """One prompt: seconds of the clock, of CPU of rank 0, and logits of its last token."""

    wall: float
    cpu: float
    logits: np.ndarray


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--path", default="", help="A Hugging Face folder.")
    parser.add_argument("--shape", choices=sorted(engine_shapes.SHAPES), help="A random DeepSeek.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as made:
        if options.shape:
            engine_shapes.write(engine_shapes.SHAPES[options.shape], Path(made))
            options.path = made
        folder = resolve(ModelSettings(name=options.model, path=options.path)).path
        _compare(options, folder)


def _compare(options: argparse.Namespace, folder: Path) -> None:
    context = mp.get_context("spawn")
    pipes = []
    for rank in range(1, options.ranks):
        ours, theirs = context.Pipe()
        context.Process(target=_follow, args=(rank, options, folder, theirs), daemon=True).start()
        pipes.append(ours)
    alone = TorchModel.load(folder, threads=1)
    part = Part(0, options.ranks, HOST, lambda a: _tell(pipes, a), str, print)
    meeting = Meeting(part, LEAD_PATIENCE, lambda: None)
    gathers = []

    def meet() -> object:
        gathers.append(meeting())
        return gathers[-1]

    shared = TorchModel.load(folder, threads=1, cuts=meeting.cuts, meet=meet)  # type: ignore[arg-type]
    lead = TensorLead(shared, meeting.mesh)
    chunks = _chunks(options, alone)
    pool = np.zeros((alone.layout.blocks_for(options.tokens), alone.layout.block_bytes), np.uint8)
    alone.bind(pool.copy())
    lead.bind(pool)
    lead.mirror(np.ones(len(pool), np.uint64))
    turns: dict[str, list[Turn]] = {"one process": [], "shared": []}
    followers: list[float] = []
    traffic = gathers[0].traffic
    for turn in range(options.rounds + 1):  # The first one prepares.
        turns["one process"].append(_turn(alone, chunks))
        before = _cpu(pipes), traffic.seconds, traffic.bytes, traffic.calls
        turns["shared"].append(_turn(lead, chunks))
        followers.append(_cpu(pipes) - before[0])
        waited, sent, calls = (
            after - start
            for after, start in zip(
                (traffic.seconds, traffic.bytes, traffic.calls), before[1:], strict=True
            )
        )
        one, other = (some[turn].logits for some in turns.values())
        assert np.array_equal(one, other), "other bits"
    lead.end()
    print(f"{json.dumps({k: v for k, v in vars(options).items() if v})}\n")
    print("| | ms a token | at best | CPU ms a token, all | weights of layers, rank 0, MiB |")
    print("|---|---|---|---|---|")
    for name, some in turns.items():
        model, more = (alone, 0.0) if name == "one process" else (shared, _median(followers[1:]))
        wall, cpu = (_median([getattr(t, key) for t in some[1:]]) for key in ("wall", "cpu"))
        each, best = 1e3 / options.tokens, min(t.wall for t in some[1:])
        print(
            f"| {name} | {wall * each:.2f} | {best * each:.2f} | {(cpu + more) * each:.2f} "
            f"| {_mib(model):.1f} |"
        )
    print(
        f"\n{calls} gathers a prompt, {sent / options.tokens / 1024:.1f} KiB a token from rank 0, "
        f"{1e3 * waited / options.tokens:.2f} ms a token in them, waiting included; the same bits"
    )


def _follow(rank: int, options: argparse.Namespace, folder: Path, pipe: Connection) -> None:
    part = Part(rank, options.ranks, HOST, print, pipe.recv, print)
    meeting = Meeting(part, FOLLOW_PATIENCE, lambda: None)
    model = TorchModel.load(folder, threads=1, cuts=meeting.cuts, meet=meeting)
    pipe.send(time.process_time())
    import threading

    def answer() -> None:
        while pipe.recv():
            pipe.send(time.process_time())

    threading.Thread(target=answer, daemon=True).start()
    follow(model, meeting.mesh, AdapterLimits(1, 1, 1))


def _tell(pipes: list[Connection], address: str) -> None:
    for pipe in pipes:
        pipe.send(address)


def _cpu(pipes: list[Connection]) -> float:
    """Seconds that the others have had of processors."""
    total = 0.0
    for pipe in pipes:
        while pipe.poll():
            pipe.recv()
        pipe.send(True)
        total += pipe.recv()
    return total


def _chunks(options: argparse.Namespace, model: TorchModel) -> list[Batch]:
    random = np.random.default_rng(0)
    tokens = random.integers(2, min(1000, model.config.vocabulary), options.tokens)
    table = np.arange(model.layout.blocks_for(options.tokens), dtype=np.int32)[None]
    found = []
    for first in range(0, options.tokens, options.chunk):
        end = min(options.tokens, first + options.chunk)
        last = np.array([end - first - 1] if end == options.tokens else [], np.int32)
        found.append(
            Batch(
                token_ids=tokens[first:end].astype(np.int32),
                positions=np.arange(first, end, dtype=np.int32),
                query_starts=np.array([0, end - first], np.int32),
                block_tables=table,
                logit_rows=last,
            )
        )
    return found


def _turn(model: TorchModel | TensorLead, chunks: list[Batch]) -> Turn:
    wall, cpu = time.perf_counter(), time.process_time()
    for chunk in chunks:
        logits = model.forward(chunk)
    return Turn(time.perf_counter() - wall, time.process_time() - cpu, logits)


def _median(values: list[float]) -> float:
    return statistics.median(values)


def _mib(model: TorchModel) -> float:
    """Of linear layers and experts, which are what is shared."""
    weights = model.weights
    values = sum(p.linear.inputs * p.linear.outputs for p in weights.projections)
    size = values * weights.embedding.element_size()
    return (size + sum(e.gate_up.nbytes + e.down.nbytes for e in weights.experts)) / 2**20


if __name__ == "__main__":
    main()
