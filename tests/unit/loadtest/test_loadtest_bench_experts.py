"""The benchmark of expert placement runs, and its figures are of what it says."""

from __future__ import annotations

from loadtest.bench_experts import Options, run

SMALL = Options(layers=4, logical=32, physical=40, groups=8, hosts=4, gpus=8)


def test_an_even_load_is_placed_evenly_and_a_skewed_one_better_than_in_order():
    even, skewed = run(SMALL, 0.0), run(SMALL, 0.75)
    assert even.even_hierarchical == 1.0
    assert skewed.even_hierarchical > skewed.even_before + 0.2
    assert skewed.even_global >= skewed.even_hierarchical
    again = run(SMALL, 0.75)
    assert (again.even_again, again.copies) == (skewed.even_again, skewed.copies)


def test_a_plan_is_made_where_drift_costs_more_than_the_copies():
    drifted, hopeless = run(SMALL, 0.0), run(SMALL, 0.75)
    assert drifted.even_again > drifted.even_drifted + 0.1
    assert 0 < drifted.copies < SMALL.layers * SMALL.physical
    assert drifted.saved > 0.01
    assert drifted.stall_seconds > 0
    assert hopeless.even_again < hopeless.even_drifted + 0.02
    assert hopeless.copies == 0
