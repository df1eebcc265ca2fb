"""What fetches came to, counted by transport and by peer. Pure.

Sums by transport are of all fetches since the start. Peers are bounded: beyond MAX_PEERS the one
that was fetched from longest ago makes way, with its figures.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace

MAX_PEERS = 256

REFUSALS = frozenset(
    {
        "LAYOUT_MISMATCH",
        "NO_TRANSPORT",
        "INVALID_FETCH",
        "KV_WRONG_TENANT",
        "KV_REGION_DENIED",
        "BLOCKS_NOT_HELD",
    }
)
"""Reasons, or causes of a lost source, with which a source turns a fetch down."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Sums over fetches that have ended."""

    fetches: int = 0
    bytes: int = 0
    """Verified and in place."""
    blocks: int = 0
    """Whole and verified."""
    seconds: float = 0.0
    """From asking to the last byte verified."""
    exposed_seconds: float = 0.0
    """Of them, those that a request waited for nothing else."""
    refused: int = 0
    """Fetches turned down by the source."""
    corrupt: int = 0
    """Blocks given up because their bytes were wrong twice."""
    reread: int = 0
    """Pieces that were read twice because they were wrong the first time."""
    stale: int = 0
    """Fetches given up because a block's memory went to other content meanwhile."""
    expired: int = 0
    """Fetches whose lease had ended at the source."""
    lost: int = 0
    """Fetches that lost their source in another way."""

    def plus(self, other: Figures) -> Figures:
        """The sum."""
        return Figures(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Figures)))


def failed(reason: str, cause: str) -> Figures:
    """A fetch that ended with an error, by its reason and by the `cause` in its metadata."""
    if cause == "STALE":
        return Figures(fetches=1, stale=1)
    if cause == "LEASE_LOST":
        return Figures(fetches=1, expired=1)
    if reason in REFUSALS or cause in REFUSALS:
        return Figures(fetches=1, refused=1)
    return Figures(fetches=1, lost=1)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Figures of a transport; of one peer over it, or of all if `peer` is ""."""

    transport: str
    peer: str
    figures: Figures
    why: str = ""
    """Why this transport was chosen the last time."""


@dataclass(slots=True)
class FetchStats:
    """One endpoint's fetches. `transport` is "" for those that ended before one was agreed on."""

    _transports: dict[str, Traffic] = field(default_factory=dict)
    _peers: OrderedDict[tuple[str, str], Traffic] = field(default_factory=OrderedDict)

    def add(self, transport: str, peer: str, figures: Figures, why: str = "") -> None:
        """A fetch has ended, or more became known of one."""
        sums = self._transports.get(transport) or Traffic(transport, "", Figures())
        self._transports[transport] = _with(sums, figures, why)
        known = self._peers.get((transport, peer)) or Traffic(transport, peer, Figures())
        self._peers[transport, peer] = _with(known, figures, why)
        self._peers.move_to_end((transport, peer))
        if len(self._peers) > MAX_PEERS:
            self._peers.popitem(last=False)

    @property
    def total(self) -> Figures:
        """Over all transports."""
        return total(self._transports.values())

    @property
    def transports(self) -> list[Traffic]:
        """A sum for each transport, the one with most bytes first."""
        return sorted(self._transports.values(), key=_rank)

    def peers(self, most: int = MAX_PEERS) -> list[Traffic]:
        """One for each peer and transport, those with most bytes first."""
        return sorted(self._peers.values(), key=_rank)[:most]


def total(traffic: Iterable[Traffic]) -> Figures:
    """The sum of all of these."""
    figures = Figures()
    for one in traffic:
        figures = figures.plus(one.figures)
    return figures


def _with(traffic: Traffic, figures: Figures, why: str) -> Traffic:
    return replace(traffic, figures=traffic.figures.plus(figures), why=why or traffic.why)


def _rank(traffic: Traffic) -> tuple[int, int, str, str]:
    return -traffic.figures.bytes, -traffic.figures.fetches, traffic.transport, traffic.peer
