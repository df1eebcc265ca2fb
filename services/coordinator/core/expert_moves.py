"""From one map of expert replicas to another: with as few copies as can be, and which.

GPUs of a host are alike, and so are the places of a GPU and, as far as a placement is concerned,
hosts. So a new map says who is together, not where: it is turned until it fits the old one best.

The copies of one layer are one exchange: all are read from where experts were before the plan, and
none is written before all are read. So copies may go round in a circle, and no order can lose an
expert; what it takes is room for the experts that a GPU gets in one layer.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from services.coordinator.core.experts import Ints
from services.coordinator.core.messages import ExpertMove


def fit(new: Ints, old: Ints, *, logical: int, hosts: int, gpus: int) -> Ints:
    """The new map [layers, physical], turned to fit the old one: who is together stays together.

    Hosts are matched first, then the GPUs of matched hosts, then the places of matched GPUs. With
    `hosts` 1 GPUs are matched over all hosts.
    """
    layers, physical = old.shape
    for parts, within in ((hosts, 1), (gpus // hosts, hosts)):
        size = physical // (parts * within)
        was = old.reshape(layers * within, parts, size)
        now = new.reshape(layers * within, parts, size)
        partner = _match(_overlap(was, now, logical))
        new = np.take_along_axis(now, partner[:, :, None], 1).reshape(layers, physical)
    size = physical // gpus
    return _align(new.reshape(-1, size), old.reshape(-1, size)).reshape(layers, physical)


def moves(new: Ints, old: Ints, *, hosts: int, gpus: int) -> tuple[ExpertMove, ...]:
    """The copies that lead from the old map to the new one, layer by layer.

    An expert comes from the same GPU if it is there, else from the same host, else from anywhere;
    of equal sources, from the GPU that has sent least in this layer.
    """
    physical = old.shape[1]
    per_gpu, per_host = physical // gpus, physical // hosts
    found: list[ExpertMove] = []
    for layer in np.flatnonzero((new != old).any(1)).tolist():
        before, after = old[layer].tolist(), new[layer].tolist()
        places: dict[int, list[int]] = {}
        for place, expert in enumerate(before):
            places.setdefault(expert, []).append(place)
        sent: Counter[int] = Counter()
        for place, expert in enumerate(after):
            if before[place] == expert:
                continue
            far = [
                (
                    p // per_gpu != place // per_gpu,
                    p // per_host != place // per_host,
                    sent[p // per_gpu],
                    p,
                )
                for p in places[expert]
            ]
            source = min(far)[-1]
            sent[source // per_gpu] += 1
            found.append(ExpertMove(layer, expert, source, place))
    return tuple(found)


def incoming(new: Ints, old: Ints, *, logical: int, hosts: int, gpus: int) -> tuple[Ints, Ints]:
    """Experts that each GPU gets in each layer: from its host, from others; [layers, gpus] each."""
    layers, physical = old.shape
    rows = np.arange(layers)[:, None]
    host = np.arange(physical) // (physical // hosts)
    on_host = np.zeros((layers, hosts, logical), np.bool_)
    on_host[rows, host, old] = True
    moved, near = new != old, on_host[rows, host, new]
    by_gpu = (layers, gpus, -1)
    return (moved & near).reshape(by_gpu).sum(2), (moved & ~near).reshape(by_gpu).sum(2)


def _overlap(was: Ints, now: Ints, logical: int) -> Ints:
    """Replicas that each old part has in common with each new one: [rows, parts, parts].

    Both are [rows, parts, size].
    """
    before, after = _counts(was, logical), _counts(now, logical)
    common = np.zeros((len(was), was.shape[1], was.shape[1]), np.float32)
    for times in range(1, int(min(before.max(), after.max())) + 1):
        have, want = (before >= times).astype(np.float32), (after >= times).astype(np.float32)
        common += have @ want.transpose(0, 2, 1)
    return common.astype(np.intp)


def _counts(parts: Ints, logical: int) -> Ints:
    """How often each part [rows, parts, size] has each expert: [rows, parts, logical]."""
    rows, count, _ = parts.shape
    base = np.arange(rows * count).reshape(rows, count, 1) * logical
    counted = np.bincount((base + parts).ravel(), minlength=rows * count * logical)
    return counted.reshape(rows, count, logical)


def _match(overlap: Ints) -> Ints:
    """For each old part its new one, [rows, parts]: the largest overlap left first.

    Then pairs swap for as long as that helps.
    """
    rows, parts = np.arange(len(overlap)), overlap.shape[1]
    partner, left = np.empty((len(overlap), parts), np.intp), overlap.copy()
    for _ in range(parts):
        old, new = np.divmod(left.reshape(len(overlap), -1).argmax(1), parts)
        partner[rows, old] = new
        left[rows, old, :] = left[rows, :, new] = -1
    while True:
        got = np.take_along_axis(overlap, partner[:, None, :], 2)  # row i with the partner of j
        own = np.diagonal(got, axis1=1, axis2=2)
        gain = got + got.transpose(0, 2, 1) - own[:, :, None] - own[:, None, :]
        first, second = np.divmod(gain.reshape(len(overlap), -1).argmax(1), parts)
        better = gain[rows, first, second] > 0
        if not better.any():
            return partner
        row, a, b = rows[better], first[better], second[better]
        partner[row, a], partner[row, b] = partner[row, b], partner[row, a]


def _align(new: Ints, old: Ints) -> Ints:
    """Each row of the new parts in the order that leaves most experts where they were."""
    aligned = np.empty_like(old)
    free = np.ones(new.shape, np.bool_)
    open_places: NDArray[np.bool_] = np.ones(old.shape, np.bool_)
    for place in range(old.shape[1]):
        same = (new == old[:, place : place + 1]) & free
        rows = np.flatnonzero(same.any(1))
        free[rows, same[rows].argmax(1)] = False
        open_places[rows, place] = False
    aligned[~open_places] = old[~open_places]
    aligned[open_places] = new[free]  # as many of one as of the other in each row, in its order
    return aligned
