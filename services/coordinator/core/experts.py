"""Where expert replicas go, as DeepSeek's expert-parallel load balancer (EPLB) defines it.

Source: the README of https://github.com/deepseek-ai/EPLB, whose example the tests reproduce. Three
steps, each greedy: groups of experts are packed onto hosts, so that a token whose router stays
within few groups stays on few hosts; on each host the experts with most load a replica get one more
until its places are full; the replicas are packed onto the host's GPUs. That is the hierarchical
policy. The global one is the same with all experts in one group on one host, and is taken where the
groups can't be spread evenly over the hosts.

Everything is computed for all layers at once: 58 layers of 256 experts take a few milliseconds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]


def place_experts(loads: Floats, *, physical: int, groups: int, hosts: int, gpus: int) -> Ints:
    """The logical expert for each place: [layers, physical].

    `loads` [layers, logical]: tokens routed to each expert, or anything in proportion to that. Of
    the `physical` places of a layer, GPU g has the gpus-th part from g * physical / gpus on; of the
    GPUs, each host has an equal part in the same way. Expert e is of group e // (logical / groups).
    Every expert gets a place. Raises ValueError if these can't be equal parts, or if there are
    fewer places than experts.
    """
    layers, logical = loads.shape
    if physical < logical:
        raise ValueError(f"{logical} experts don't fit {physical} places")
    for name, whole, part in (
        ("logical", logical, groups),
        ("physical", physical, gpus),
        ("gpus", gpus, hosts),
    ):
        if part < 1 or whole % part:
            raise ValueError(f"{name}: {whole} can't be split into {part} equal parts")
    hosts = packing_hosts(groups, hosts)
    groups = groups if hosts > 1 else 1
    size = logical // groups
    by_host = _fill(_pack(loads.reshape(layers, groups, size).sum(2), hosts))
    experts = (by_host[:, :, None] * size + np.arange(size)).reshape(layers * hosts, -1)
    loads = np.take_along_axis(loads, experts.reshape(layers, logical), 1).reshape(experts.shape)
    which, count = _replicate(loads, physical // hosts)
    order = _fill(_pack(np.take_along_axis(loads / count, which, 1), gpus // hosts))
    placed = np.take_along_axis(experts, np.take_along_axis(which, order, 1), 1)
    return placed.reshape(layers, physical)


def packing_hosts(groups: int, hosts: int) -> int:
    """Hosts that matter to a placement: all if groups spread evenly over them, else one."""
    return hosts if groups % hosts == 0 else 1


def gpu_loads(loads: Floats, placed: Ints, gpus: int) -> Floats:
    """What each GPU has to compute, [layers, gpus]: an expert's replicas share its load evenly.

    `loads` [layers, logical], `placed` [layers, physical] as place_experts gives it.
    """
    layers, logical = loads.shape
    rows = np.arange(layers)[:, None]
    count = np.bincount((rows * logical + placed).ravel(), minlength=loads.size)
    each = loads / np.maximum(count, 1).reshape(loads.shape)
    return np.asarray(np.take_along_axis(each, placed, 1).reshape(layers, gpus, -1).sum(2))


def balancedness(loads: Floats, placed: Ints, gpus: int) -> Floats:
    """Mean over maximum GPU load of each layer, [layers]: 1 is even, and so is a layer at rest."""
    load = gpu_loads(loads, placed, gpus)
    most = load.max(1)
    return np.where(most > 0, load.mean(1) / np.where(most > 0, most, 1), 1.0)


def _pack(weights: Floats, packs: int) -> tuple[Ints, Ints]:
    """Packs of equal size and nearly equal weight: for each item [rows, items] (pack, place in it).

    Heaviest first, each into the lightest pack that has a place.
    """
    rows, items = np.arange(len(weights)), weights.shape[1]
    size = items // packs
    weight, taken = np.zeros((len(weights), packs)), np.zeros((len(weights), packs), np.intp)
    pack_of, place_of = np.empty(weights.shape, np.intp), np.empty(weights.shape, np.intp)
    for item in np.argsort(-weights, axis=1, kind="stable").T:
        pack = np.where(taken < size, weight, np.inf).argmin(1)
        pack_of[rows, item], place_of[rows, item] = pack, taken[rows, pack]
        weight[rows, pack] += weights[rows, item]
        taken[rows, pack] += 1
    return pack_of, place_of


def _fill(packed: tuple[Ints, Ints]) -> Ints:
    """The item at each place, packs one after another: [rows, items]."""
    pack_of, place_of = packed
    size = int(place_of.max()) + 1
    return np.argsort(pack_of * size + place_of, axis=1)


def _replicate(loads: Floats, places: int) -> tuple[Ints, Ints]:
    """One replica for each expert, and the rest one by one for whoever has most load a replica.

    `loads` [rows, experts]. Returns the expert of each replica [rows, places], and how many
    replicas each expert has [rows, experts].
    """
    rows, experts = np.arange(len(loads)), loads.shape[1]
    which = np.tile(np.arange(places), (len(loads), 1))
    count = np.ones(loads.shape, np.intp)
    for place in range(experts, places):
        which[:, place] = heaviest = (loads / count).argmax(1)
        count[rows, heaviest] += 1
    return which, count
