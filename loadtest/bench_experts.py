"""What placing expert replicas gains and costs: `python -m loadtest.bench_experts`.

Loads follow Zipf's law, each layer with its experts in an order of its own, at DeepSeek V3's size
unless told otherwise. How even is the mean over the maximum GPU load, 1 at best. Times are CPU
time, the median of several rounds.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

from services.coordinator.core.expert_plans import ExpertPlan, ExpertPlanner, ExpertRules
from services.coordinator.core.experts import Floats, Ints, balancedness, place_experts
from services.coordinator.core.messages import ExpertMap, ExpertShape, WorkerStats

ROUNDS = 7
SKEWS = (0.0, 0.25, 0.5, 0.75, 1.0)
TOKENS = 1e8
"""Routed in each layer: so many that chance plays no part."""


@dataclass(frozen=True, slots=True)
class Options:
    """How large the expert-parallel group is."""

    layers: int = 58
    logical: int = 256
    physical: int = 288
    groups: int = 8
    hosts: int = 4
    gpus: int = 32
    expert_mb: int = 44
    """One FP8 expert of DeepSeek V3."""


@dataclass(frozen=True, slots=True)
class Row:
    """What placing for one load brought. `even_*` are means over layers."""

    skew: float
    even_before: float
    """Experts in order, the spare places with the first ones again."""
    even_hierarchical: float
    even_global: float
    even_drifted: float
    """The hierarchical map when the loads have drifted: each by a factor e^N(0, 0.25)."""
    even_again: float
    """Placed anew for those."""
    copies: int
    """That this takes, of all places."""
    saved: float
    """Part of a step, as the planner predicts it; 0: it would not move anything."""
    stall_seconds: float
    place_ms: float
    """CPU time of a placement, hierarchical."""
    report_ms: float
    """CPU time of taking in a report of loads."""
    look_ms: float
    """CPU time of a look that ends in a plan, the plan's moves included; 0: none did."""


def run(options: Options, skew: float, seed: int = 1) -> Row:
    """One row, the same for one seed."""
    shape = ExpertShape(
        options.layers,
        options.logical,
        options.physical,
        options.groups,
        options.hosts,
        options.gpus,
        options.expert_mb * 1_000_000,
    )
    draw = np.random.default_rng(seed)
    share = 1 / np.arange(1, shape.logical + 1) ** skew
    loads = np.stack([draw.permutation(share / share.sum()) for _ in range(shape.layers)]) * TOKENS
    drifted = loads * np.exp(draw.normal(0, 0.25, loads.shape))
    in_order = np.tile(np.arange(shape.physical) % shape.logical, (shape.layers, 1))

    def place(of: Floats, groups: int, hosts: int) -> Ints:
        return place_experts(
            of, physical=shape.physical, groups=groups, hosts=hosts, gpus=shape.gpus
        )

    def even(of: Floats, placed: Ints) -> float:
        return float(balancedness(of, placed, shape.gpus).mean())

    placed = place(loads, shape.groups, shape.hosts)
    plan, report_ms, look_ms = _replan(shape, placed, drifted)
    return Row(
        skew=skew,
        even_before=even(loads, in_order),
        even_hierarchical=even(loads, placed),
        even_global=even(loads, place(loads, 1, 1)),
        even_drifted=even(drifted, placed),
        even_again=even(drifted, place(drifted, shape.groups, shape.hosts)),
        copies=0 if plan is None else len(plan.moves),
        saved=0.0 if plan is None else plan.gain,
        stall_seconds=0.0 if plan is None else plan.stall_seconds,
        place_ms=_median_ms(lambda: place(loads, shape.groups, shape.hosts)),
        report_ms=report_ms,
        look_ms=look_ms,
    )


def _replan(
    shape: ExpertShape, placed: Ints, loads: Floats
) -> tuple[ExpertPlan | None, float, float]:
    """What a planner makes of loads that its map was not made for, and its times in ms."""
    rules = ExpertRules()
    where = ExpertMap(tuple(placed.ravel().tolist()))
    tokens = WorkerStats(expert_tokens=tuple(loads.astype(int).ravel().tolist()))
    plan: ExpertPlan | None = None
    reports, looks = [], []
    for _ in range(ROUNDS):
        planner = ExpertPlanner(rules)
        planner.observe("w", shape, WorkerStats(expert_map=where), 0.0)
        start = time.process_time()
        planner.observe("w", shape, tokens, 1.0)
        between = time.process_time()
        plan = planner.observe("w", shape, WorkerStats(), rules.plan_seconds)
        reports.append((between - start) * 1e3)
        looks.append((time.process_time() - between) * 1e3)
    look = statistics.median(looks) if plan is not None else 0.0
    return plan, statistics.median(reports), look


def _median_ms(work: Callable[[], object]) -> float:
    work()
    return statistics.median(_ms(work) for _ in range(ROUNDS))


def _ms(work: Callable[[], object]) -> float:
    gc.collect()
    start = time.process_time()
    work()
    return (time.process_time() - start) * 1e3


def main() -> None:
    """Runs the benchmark with sizes from the command line and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for option in fields(Options):
        flag = "--" + option.name.replace("_", "-")
        parser.add_argument(flag, type=int, default=option.default)
    options = Options(**vars(parser.parse_args()))
    rows = [run(options, skew) for skew in SKEWS]
    for figure in fields(Row):
        values = (f"{getattr(row, figure.name):>10,.3f}" for row in rows)
        print(f"{figure.name:18}", *values)


if __name__ == "__main__":
    main()
