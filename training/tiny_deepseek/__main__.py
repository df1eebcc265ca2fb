"""`python -m training.tiny_deepseek`: trains the model, or goes on training it."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch.multiprocessing.spawn import spawn

from training.tiny_deepseek.data import prepare
from training.tiny_deepseek.shape import Shape
from training.tiny_deepseek.train import Plan, run


def main() -> None:
    """Reads the arguments, prepares the corpus and starts the processes."""
    parser = argparse.ArgumentParser(prog="python -m training.tiny_deepseek", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of corpus and checkpoint")
    parser.add_argument("--minutes", type=float, default=60, help="time of all runs together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="each of one thread")
    parser.add_argument("--address", default="127.0.0.1:29470", help="where the processes meet")
    given = parser.parse_args()
    prepare(given.out / "data", Shape().vocabulary, given.seed)
    plan = Plan(minutes=given.minutes, seed=given.seed)
    spawn(run, (given.processes, given.address, plan, given.out), given.processes)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
