"""Whole clusters by the thousand: see cluster_storm.py and cluster_saturated.py.

python -m tests.simulation.cluster_world --seeds 10000 --jobs 2   # many, and what happened in them
python -m tests.simulation.cluster_world --first 4711 --trace     # one, line by line
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time

from tests.simulation.cluster_net import Counts
from tests.simulation.cluster_saturated import Saturated
from tests.simulation.cluster_storm import World

COMMAND = "python -m tests.simulation.cluster_world"
SATURATED_EVERY = 25
AT_ONCE = 50
TOLD_EVERY = 20
FAILURES_SHOWN = 10


def play(seed, trace=False):
    """One history, of which every now and then one is saturated.

    A failure says how to see it again.
    """
    world = (World if (seed + 1) % SATURATED_EVERY else Saturated)(seed, trace)
    try:
        world.play()
    except Exception as error:
        if trace:
            print("\n".join(world.trace))
        again = f"{COMMAND} --first {seed} --trace"
        error.add_note(f"seed {seed} at {world.now:.4f}; to see it again: {again}")
        raise
    return world


def _some(part):
    total = Counts()
    for seed in range(*part):
        try:
            total.add(play(seed).count)
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
            return seed, "\n".join([words, *getattr(error, "__notes__", ())])
    return total


def main():
    """The command."""
    parser = argparse.ArgumentParser(prog=COMMAND)
    parser.add_argument("--seeds", type=int, default=1, help="histories to play (1)")
    parser.add_argument("--first", type=int, default=0, help="seed of the first (0)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (1)")
    parser.add_argument(
        "--trace", action="store_true", help="what happens in the first, line by line"
    )
    options = parser.parse_args()
    first, last = options.first, options.first + options.seeds
    if options.trace:
        print("\n".join(play(first, trace=True).trace))
        return 0
    parts = [(a, min(a + AT_ONCE, last)) for a in range(first, last, AT_ONCE)]
    total, failed = Counts(), 0
    began = time.perf_counter()
    with multiprocessing.Pool(options.jobs) as pool:
        for number, done in enumerate(pool.imap_unordered(_some, parts), start=1):
            if number % TOLD_EVERY == 0:
                print(f"{number * AT_ONCE:,} seeds", file=sys.stderr, flush=True)
            if isinstance(done, Counts):
                total.add(done)
            else:
                failed += 1
                print(f"VIOLATED: {done[1]}", flush=True)
                if failed == FAILURES_SHOWN:
                    return 1
        pool.close()
        pool.join()
    seconds = time.perf_counter() - began
    if failed:
        return 1
    print(f"seeds {first} to {last - 1}: nothing violated")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = used.ru_utime + used.ru_stime
    print(f"{options.seeds / busy * 60:.0f} seeds a minute of processor time; took {seconds:.0f} s")
    for name, number in sorted(total.items()):
        print(f"  {name:<36}{number:>14,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
