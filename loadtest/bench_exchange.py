"""What an exchange with experts costs: `python -m loadtest.bench_exchange`.

Ranks are processes on this machine, each with its share of one layer's experts, of random weights.
In each round every rank has so many rows, which choose experts uniformly; compared are the layer's
experts in one process and shared. Times are of rank 0, medians.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import statistics
import time
from multiprocessing.connection import Connection

import numpy as np
import torch

from services.engine.api import ExpertShape
from services.engine.torch.kernels.experts import pack, pack_gated
from services.engine.torch.kernels.moe_steps import ExpertSteps, ExpertWeights
from services.engine.torch.parallel.exchange import ExpertExchange
from services.engine.torch.parallel.mesh import Mesh, find_store, open_store
from services.engine.torch.parallel.placement import Replicas, first_map

HOST = "127.0.0.1"
DTYPE = torch.bfloat16
WARM = 20


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--expert", type=int, default=128)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--choices", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--rows", type=int, nargs="+", default=[0, 1, 8, 32, 256])
    options = parser.parse_args()
    context = mp.get_context("spawn")
    pipes, processes = [], []
    for rank in range(options.ranks):
        ours, theirs = context.Pipe()
        process = context.Process(target=_rank, args=(rank, options, theirs), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    address = pipes[0].recv()
    for pipe in pipes[1:]:
        pipe.send(address)
    print(f"{options}\n")
    print("rows a rank | one process, us | shared, us | of it exchanged, us | header, us")
    for row in pipes[0].recv():
        print(" | ".join(f"{value:.0f}" for value in row))
    for process in processes:
        process.join()


def _rank(rank: int, options: argparse.Namespace, pipe: Connection) -> None:
    torch.set_num_threads(1)
    if rank == 0:
        store, address = open_store(HOST, options.ranks)
        pipe.send(address)
    else:
        store = find_store(pipe.recv(), options.ranks)
    mesh = _Timed(store, rank, options.ranks, HOST)
    shape = ExpertShape(1, options.experts, options.experts, 1, 1, options.ranks, 1)
    each = shape.physical // shape.gpus
    replicas = Replicas.of(first_map(shape).physical_to_logical, shape.logical)
    whole = _experts(options)
    first = rank * each
    part = ExpertWeights(whole.gate_up[first : first + each], whole.down[first : first + each])
    alone, local = (
        ExpertSteps([weights], options.hidden, options.expert, DTYPE, 1)
        for weights in (whole, part)
    )
    shared = ExpertExchange(
        mesh,
        local,
        lambda layer: replicas,
        places=each,
        choices=options.choices,
        hidden=options.hidden,
        dtype=DTYPE,
    )
    with torch.inference_mode():
        found = [(rows, *_times(options, rank, rows, mesh, alone, shared)) for rows in options.rows]
    if rank == 0:
        pipe.send(found)


def _times(
    options: argparse.Namespace,
    rank: int,
    rows: int,
    mesh: _Timed,
    alone: ExpertSteps,
    shared: ExpertExchange,
) -> tuple[float, ...]:
    random = np.random.default_rng(rank)
    x = torch.empty((rows, options.hidden), dtype=DTYPE)
    x[:] = torch.from_numpy(random.standard_normal(x.shape, np.float32))
    times: tuple[list[float], ...] = ([], [], [], [])
    for turn in range(options.rounds + WARM):
        drawn = np.argsort(random.random((rows, options.experts)), axis=1)
        ids = drawn[:, : options.choices].astype(np.int32)
        began = time.perf_counter()
        alone(0, x, ids)
        middle = time.perf_counter()
        mesh.gather([1, 1, 0, 0])
        met = time.perf_counter()
        mesh.seconds = 0.0
        shared(0, x, ids)
        if turn >= WARM:
            now = time.perf_counter()
            for some, seconds in zip(
                times, (middle - began, now - met, mesh.seconds, met - middle), strict=True
            ):
                some.append(seconds * 1e6)
    return tuple(statistics.median(some) for some in times)


class _Timed(Mesh):
    """Adds up what exchanges take."""

    seconds = 0.0

    def exchange(self, *arguments: object) -> None:
        began = time.perf_counter()
        super().exchange(*arguments)  # type: ignore[arg-type]
        self.seconds += time.perf_counter() - began


def _experts(options: argparse.Namespace) -> ExpertWeights:
    random = np.random.default_rng(0)

    def draw(outputs: int, inputs: int) -> torch.Tensor:
        return torch.from_numpy(random.standard_normal((outputs, inputs), np.float32)).to(DTYPE)

    wide, hidden = options.expert, options.hidden
    return ExpertWeights(
        torch.stack(
            [pack_gated(draw(wide, hidden), draw(wide, hidden)) for _ in range(options.experts)]
        ),
        torch.stack([pack(draw(hidden, wide)) for _ in range(options.experts)]),
    )


if __name__ == "__main__":
    main()
