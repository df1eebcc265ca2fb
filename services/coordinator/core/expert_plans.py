"""When a worker's experts should be placed anew, and what is to be copied then.

What is weighed, layer by layer:

- *Gain.* A layer's experts are done when the busiest GPU's are. So of a step, experts take
  `expert_share`, each layer of it in proportion to its maximum GPU load; a new map that halves a
  layer's maximum saves half of that. It is taken to hold for `horizon_seconds`.
- *Cost.* The worker is taken to stand still while a layer is exchanged: as long as the GPU that
  gets most experts needs to take them in, those of its host over `host_bytes_per_second`, others
  over `network_bytes_per_second`.

Tokens gained are the step time saved times the rate over the horizon, tokens lost the stall times
the same rate; so the rate cancels, and seconds are compared. A layer is placed anew if it gains
`margin` times what it costs, and all that are if the steps then are shorter by `least_gain`.

Loads are counted in a window that decays, and believed when each layer has seen `tokens_each` for
every expert: chance alone makes the busiest of 32 GPUs with 9 experts seem some 2% busier than it
is then, which is half a percent of a step and less than `least_gain`. So a load without skew is
left alone.

A worker that was sent a plan gets no other until it reports the plan's map, or for
`patience_seconds`. Its plans' numbers grow, whoever makes them: of two coordinators that both plan
for it, it takes the first, whose map the other then reckons with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from services.coordinator.core.expert_moves import fit, incoming, moves
from services.coordinator.core.experts import (
    Floats,
    Ints,
    balancedness,
    gpu_loads,
    packing_hosts,
    place_experts,
)
from services.coordinator.core.messages import ExpertMap, ExpertMove, ExpertShape, WorkerStats


@dataclass(frozen=True, slots=True)
class ExpertRules:
    """What is known or believed of the cluster; see the module's docstring."""

    plan_seconds: float = 60.0
    """Least time between two looks at a worker; 0: experts are never moved."""
    tokens_each: float = 1000.0
    expert_share: float = 0.25
    """DeepSeek V3's decode on H100 at a batch of 128 a GPU: of 569 us that a layer takes, 146 grow
    with the tokens that a GPU's experts get (fits to NVIDIA aiconfigurator's data)."""
    horizon_seconds: float = 300.0
    half_life_seconds: float = 120.0
    """Of the window."""
    margin: float = 2.0
    least_gain: float = 0.01
    host_bytes_per_second: float = 200e9
    """NVLink: under half of what an H100's gives a direction."""
    network_bytes_per_second: float = 25e9
    """Half of a 400 Gb/s adapter for each GPU: the other half is traffic's."""
    patience_seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class ExpertPlan:
    """What a worker is asked for, and what is expected of it."""

    map: ExpertMap
    moves: tuple[ExpertMove, ...]
    why: str
    gain: float
    """Part by which steps get shorter."""
    stall_seconds: float


@dataclass(frozen=True, slots=True)
class ExpertStatus:
    """How a worker's experts are placed; fields as in coordinator.proto."""

    plan: int
    balancedness: float
    last_plan: str
    fault: str


@dataclass(slots=True)
class _Group:
    """What is known of one worker's experts."""

    shape: ExpertShape
    window: Floats
    """[layers, logical], as of `counted`."""
    counted: float
    looked: float
    placed: Ints | None = None
    """[layers, physical]; None: not told yet."""
    plan: int = 0
    """Of `placed`, or of a later one that was asked for."""
    asked: float | None = None
    """When a plan went out that the worker has not answered yet."""
    reported: int = 0
    """Plan of `placed`."""
    why: str = ""
    """Of the last plan."""
    fault: str = ""
    """What is wrong with its reports."""


class ExpertPlanner:
    """Watches the experts of all workers that have some."""

    def __init__(self, rules: ExpertRules) -> None:
        self._rules = rules
        self._groups: dict[str, _Group] = {}

    def forget(self, worker_id: str) -> None:
        """The worker is gone."""
        self._groups.pop(worker_id, None)

    def status(self, worker_id: str) -> ExpertStatus | None:
        """How it stands with a worker; None if it has no experts."""
        group = self._groups.get(worker_id)
        if group is None:
            return None
        even = 0.0
        if group.placed is not None and group.window.any():
            even = float(balancedness(group.window, group.placed, group.shape.gpus).mean())
        return ExpertStatus(group.reported, even, group.why, group.fault)

    def observe(
        self, worker_id: str, shape: ExpertShape, stats: WorkerStats, now: float
    ) -> ExpertPlan | None:
        """Takes in a report; a plan if it is time for one and one is worth it.

        A look takes milliseconds, a report with loads 0.5 ms at 58 layers of 256 experts, one
        without next to nothing.
        """
        group = self._groups.get(worker_id)
        if group is None:
            window = np.zeros((shape.layers, shape.logical))
            group = self._groups[worker_id] = _Group(shape, window, now, now)
        if stats.expert_map is not None:
            self._moved(group, stats.expert_map)
        if stats.expert_tokens:
            self._count(group, stats.expert_tokens, now)
        if group.placed is None or group.fault or not self._due(group, now):
            return None
        group.looked = now
        plan = self._plan(group, group.placed)
        if plan is not None:
            group.plan, group.asked, group.why = plan.map.plan, now, plan.why
        return plan

    def _moved(self, group: _Group, told: ExpertMap) -> None:
        """Takes a map in, if it is one."""
        shape = group.shape
        placed = np.array(told.physical_to_logical, np.intp)
        group.placed, group.fault = None, ""
        if placed.size != shape.layers * shape.physical:
            group.fault = f"expert_map: {placed.size} places, not {shape.layers} x {shape.physical}"
            return
        placed = placed.reshape(shape.layers, shape.physical)
        group.fault = _wrong(placed, shape.logical)
        if group.fault:
            return
        group.placed, group.reported = placed, told.plan
        if told.plan >= group.plan:
            group.asked = None
        group.plan = max(group.plan, told.plan)

    def _count(self, group: _Group, tokens: tuple[int, ...], now: float) -> None:
        """Takes loads in, if they are of this shape."""
        shape = group.shape
        if len(tokens) != group.window.size:
            words = f"{len(tokens)} numbers, not {shape.layers} x {shape.logical}"
            group.fault = f"expert_tokens: {words}"
            return
        if group.placed is not None:
            group.fault = ""
        self._decay(group, now)
        group.window += np.array(tokens, np.float64).reshape(group.window.shape)

    def _decay(self, group: _Group, now: float) -> None:
        group.window *= 0.5 ** ((now - group.counted) / self._rules.half_life_seconds)
        group.counted = now

    def _due(self, group: _Group, now: float) -> bool:
        rules = self._rules
        if not rules.plan_seconds or now - group.looked < rules.plan_seconds:
            return False
        if group.asked is not None and now - group.asked < rules.patience_seconds:
            return False
        self._decay(group, now)
        return float(group.window.sum(1).min()) >= rules.tokens_each * group.shape.logical

    def _plan(self, group: _Group, old: Ints) -> ExpertPlan | None:
        rules, shape, loads = self._rules, group.shape, group.window
        peaks = gpu_loads(loads, old, shape.gpus).max(1)
        # No map does better than an even one; most looks end here.
        if self._saved(peaks, loads.sum(1) / shape.gpus).sum() < rules.least_gain:
            return None
        hosts = packing_hosts(shape.groups, shape.hosts)
        new = place_experts(
            loads, physical=shape.physical, groups=shape.groups, hosts=hosts, gpus=shape.gpus
        )
        new = fit(new, old, logical=shape.logical, hosts=hosts, gpus=shape.gpus)
        saved = self._saved(peaks, gpu_loads(loads, new, shape.gpus).max(1))
        stall = self._stall(shape, new, old)
        worth = rules.horizon_seconds * saved > rules.margin * stall
        gain, cost = float(saved[worth].sum()), float(stall[worth].sum())
        if gain < rules.least_gain:
            return None
        new = np.where(worth[:, None], new, old)
        copies = moves(new, old, hosts=shape.hosts, gpus=shape.gpus)
        before, after = (gpu_loads(loads[worth], m[worth], shape.gpus) for m in (old, new))
        why = (
            f"experts of {int(worth.sum())} of {shape.layers} layers: mean over maximum GPU load "
            f"from {_even(before):.2f} to {_even(after):.2f}, which saves {gain:.1%} of a step; "
            f"{len(copies)} copies ({len(copies) * shape.expert_bytes / 1e9:.3g} GB) stall it for "
            f"{cost:.3g} s"
        )
        where = ExpertMap(tuple(new.ravel().tolist()), group.plan + 1)
        return ExpertPlan(where, copies, why, gain, cost)

    def _saved(self, before: Floats, after: Floats) -> Floats:
        """Part of a step that each layer's new maximum GPU load saves, [layers]."""
        return np.asarray(self._rules.expert_share * (before - after) / before.sum())

    def _stall(self, shape: ExpertShape, new: Ints, old: Ints) -> Floats:
        """Seconds that each layer's exchange takes, [layers]."""
        rules = self._rules
        near, far = incoming(new, old, logical=shape.logical, hosts=shape.hosts, gpus=shape.gpus)
        seconds = near / rules.host_bytes_per_second + far / rules.network_bytes_per_second
        return np.asarray(seconds.max(1) * shape.expert_bytes)


def _even(loads: Floats) -> float:
    """Mean over maximum of GPU loads [layers, gpus], the mean of the layers."""
    return float((loads.mean(1) / loads.max(1)).mean())


def _wrong(placed: Ints, logical: int) -> str:
    """What is wrong with a map [layers, physical]; "" if nothing is."""
    if placed.min() < 0 or placed.max() >= logical:
        return f"expert_map: an expert that is not below {logical}"
    layers = len(placed)
    base = np.arange(layers)[:, None] * logical
    count = np.bincount((base + placed).ravel(), minlength=layers * logical)
    if count.all():
        return ""
    layer, expert = divmod(int(np.flatnonzero(count == 0)[0]), logical)
    return f"expert_map: layer {layer} has no expert {expert}"
