"""The KV hand-off in seeded histories; see kv_world.py, which is also a command."""

import pytest

from tests.simulation.kv_peer import ViolationError
from tests.simulation.kv_world import Checks, play

SEEDS = 1500


def test_seeds():
    for seed in range(SEEDS):
        play(seed)


def test_a_seed_replays_exactly():
    for seed in (3, 77):
        assert play(seed) == play(seed)


@pytest.mark.parametrize("checks", [Checks(checksums=False), Checks(generations=False)], ids=str)
def test_each_safeguard_holds_alone(checks):
    for seed in range(600):
        play(seed, checks)


def test_without_any_safeguard_it_would_be_found():
    """The simulation does reach memory that was reused under a reader, and notices it."""
    blind = Checks(checksums=False, generations=False)
    with pytest.raises(ViolationError, match="is not it"):
        any(play(seed, blind) is None for seed in range(SEEDS))


def test_the_weather_is_rough_enough():
    total = sum((play(seed) for seed in range(500)), start=play(500))
    for what in (
        *("done", "TIMEOUT", "UNAVAILABLE", "LEASE_LOST", "BLOCKS_NOT_HELD", "TRANSPORT_FAILED"),
        *("leases expired", "source died", "source frozen", "sink died"),
    ):
        assert total[what] > 20, what
    assert total["reads of other generations"]
