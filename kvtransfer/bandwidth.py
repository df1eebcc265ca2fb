"""How long a fetch will take, by how long earlier ones took. Pure.

A fetch takes latency + bytes / rate. Both are fitted to what was measured by least squares, where
an error counts relative to what such a fetch takes by the prior, so that small fetches determine
the latency and large ones the rate. A measurement counts half as much after HALF_LIFE_SECONDS.

The prior is part of every fit, as two measurements that don't age. It is all there is before the
first fetch, it keeps a fit of few or equal sizes sane, and it comes back with time: a peer that was
slow once is tried again.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

PRIOR_LATENCY_SECONDS = 0.005
PRIOR_BYTES_PER_SECOND = 1e9
"""What most of a 10 Gbit/s network gives."""
PRIOR_SIZES = (0, 64 * 2**20)
PRIOR_WEIGHT = 0.1
"""Of each of the prior's two points, where a new measurement has 1."""
HALF_LIFE_SECONDS = 60.0
MAX_PEERS = 1024


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a fetch is predicted to take."""

    seconds: float
    basis: str
    """"this peer", "other peers" or "the prior": what it rests on."""


@dataclass(frozen=True, slots=True)
class _Fit:
    """Weighted sums over measured points: x in bytes, y in seconds; as they were at `at`."""

    at: float = 0.0
    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def aged(self, now: float) -> _Fit:
        f = 0.5 ** (max(0.0, now - self.at) / HALF_LIFE_SECONDS)
        return _Fit(now, f * self.weight, f * self.x, f * self.y, f * self.xx, f * self.xy)

    def with_point(self, size: float, seconds: float, weight: float = 1.0) -> _Fit:
        w = weight / _prior_seconds(size) ** 2
        return _Fit(
            self.at,
            self.weight + w,
            self.x + w * size,
            self.y + w * seconds,
            self.xx + w * size * size,
            self.xy + w * size * seconds,
        )

    def seconds(self, size: float) -> float:
        """For so many bytes, with the prior in it: neither latency nor slope is negative."""
        sums = self
        for x in PRIOR_SIZES:
            sums = sums.with_point(x, _prior_seconds(x), PRIOR_WEIGHT)
        spread = sums.weight * sums.xx - sums.x * sums.x
        slope = (sums.weight * sums.xy - sums.x * sums.y) / spread
        if slope < 0:
            return sums.y / sums.weight
        latency = (sums.y - slope * sums.x) / sums.weight
        if latency < 0:
            return sums.xy / sums.xx * size
        return latency + slope * size


def _prior_seconds(size: float) -> float:
    return PRIOR_LATENCY_SECONDS + size / PRIOR_BYTES_PER_SECOND


class Bandwidth:
    """What fetches from each peer took. One thread observes; any may ask. Times are one clock's."""

    def __init__(self) -> None:
        self._all: _Fit | None = None
        self._peers: OrderedDict[str, _Fit] = OrderedDict()

    def observe(self, peer: str, size: int, seconds: float, now: float) -> None:
        """A fetch of blocks that were all there has moved `size` bytes in so many seconds.

        Fetches that wait for blocks to be computed measure something else.
        """
        self._all = (self._all or _Fit(now)).aged(now).with_point(size, seconds)
        known = self._peers.get(peer) or _Fit(now)
        self._peers[peer] = known.aged(now).with_point(size, seconds)
        self._peers.move_to_end(peer)
        if len(self._peers) > MAX_PEERS:
            self._peers.popitem(last=False)

    def estimate(self, peer: str, size: int, now: float) -> Estimate:
        """For a fetch of `size` bytes from a peer; one not known yet is taken to be as others."""
        fit, basis = self._peers.get(peer), "this peer"
        if fit is None:
            fit, basis = self._all, "other peers"
        if fit is None:
            return Estimate(_prior_seconds(size), "the prior")
        return Estimate(fit.aged(now).seconds(size), basis)
