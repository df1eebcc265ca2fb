"""Arithmetic of the memory and disaggregation benchmarks."""

from __future__ import annotations

import pytest

from loadtest.bench_memory import Sample, TooShortError, growth
from loadtest.processes import Memory


def samples(per_request, private=0.0, count=100, name="decode-0"):
    """One sample each 10 requests; memory jumps by 50 MB in the first quarter, then grows."""
    found = []
    for i in range(count):
        base = 50_000_000 if i < count // 4 else 100_000_000
        memory = Memory(int(base + 10 * i * per_request), int(10 * i * private))
        found.append(Sample(float(i), 10 * i, {name: memory, "loadtest": Memory(i, i)}))
    return found


@pytest.mark.parametrize("slope", [0.0, 300.0, -20.0])
def test_growth_is_counted_after_warm_up_for_the_clusters_processes(slope):
    (found,) = growth(samples(slope, private=7.0), warm_up_requests=250)
    assert found.name == "decode-0"
    assert found.rss_per_request == pytest.approx(slope, abs=0.2)
    assert found.private_per_request == pytest.approx(7.0, abs=0.2)
    assert found.rss_after_warm_up_bytes == pytest.approx(100_000_000, rel=0.01)


def test_warm_up_that_is_counted_in_shows_as_growth():
    (found,) = growth(samples(0.0), warm_up_requests=0)
    assert found.rss_per_request > 10_000


def test_too_few_samples_are_no_answer():
    with pytest.raises(TooShortError, match="ask for more requests"):
        growth(samples(0.0), warm_up_requests=950)
    still = [Sample(float(i), 500, {"decode-0": Memory(1, 1)}) for i in range(50)]
    with pytest.raises(TooShortError):
        growth(still, warm_up_requests=100)
