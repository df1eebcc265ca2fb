"""The coordinator's core in seeded weather; see coordinator_world.py.

A seed replays exactly, from the root of the repository:

    python -m tests.simulation.test_coordinator_simulation SEED          # one, with its trace
    python -m tests.simulation.test_coordinator_simulation FIRST COUNT   # many
"""

from __future__ import annotations

import sys

from tests.simulation.coordinator_world import World

SEEDS = 600
REPLAY = "tests.simulation.test_coordinator_simulation"


def simulate(seed):
    world = World(seed)
    try:
        world.run()
    except Exception as error:
        words = f"seed {seed} at {world.now:.4f}: {type(error).__name__}: {error}"
        error.add_note(f"{words}\nreplay: python -m {REPLAY} {seed}")
        raise
    return world


def test_seeds():
    for seed in range(SEEDS):
        simulate(seed)


def test_a_seed_replays_exactly():
    for seed in (3, 77):
        assert simulate(seed).log == simulate(seed).log


def test_the_weather_is_rough_enough():
    """What the simulation is for does happen in it."""
    log = "\n".join(line for seed in range(150) for line in simulate(seed).log)
    for word in (
        *("placed", "NO_WORKERS", "OVERLOADED", "DEADLINE", "INVALID_REQUEST", "cancel"),
        *("kill", "hang", "drain", "flap", "stall", "restart", "WORKER_LOST", "DRAINING"),
    ):
        assert log.count(word) > 20, word


if __name__ == "__main__":
    first, count = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    for seed in range(first, first + count):
        try:
            world = simulate(seed)
        except Exception:
            print(f"seed {seed} failed")
            raise
    print("\n".join(world.log) if count == 1 else f"{count} seeds hold")
