"""Fetches a model's folder from peers: find out what it has, look what is here, get the rest."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvtransfer.weights.driving import FromPeer, Means, PieceFetch
from kvtransfer.weights.finding import Wanted, Watch, find, unwatched
from kvtransfer.weights.landing import FolderLanding
from kvtransfer.weights.manifest import Manifest


@dataclass(frozen=True, slots=True)
class WeightsReport:
    """A fetch that ended well. Durations in seconds."""

    manifest: Manifest
    here: int
    """Bytes that were here before."""
    peers: Mapping[str, FromPeer]
    dropped: Mapping[str, str]
    """Peers that were given up: why."""
    describing: float
    checking: float
    fetching: float

    @property
    def bytes(self) -> int:
        """Fetched and verified."""
        return self.manifest.nbytes - self.here


def _anything(nbytes: int) -> None:
    """There is room for whatever comes."""


async def fetch_weights(
    folder: Path,
    wanted: Wanted,
    means: Means,
    *,
    need_space: Callable[[int], None] = _anything,
    watch: Watch = unwatched,
) -> WeightsReport:
    """Has `folder`, which exists, hold the model's files. One process at a time.

    need_space is called with the bytes that will be written, before any is; it may raise. When this
    raises or is cancelled nothing is written any more, and what has come stays for the next
    attempt. Raises WeightsLostError (no peer gives them), WeightsDifferError, NoTransportError,
    OSError (the disk) and what need_space raises.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    manifest, peers = await find(wanted, means.stall_seconds, watch)
    described = loop.time()
    landing = FolderLanding(folder, manifest)
    brought: Mapping[str, FromPeer] = {}
    dropped: Mapping[str, str] = {}
    try:
        missing = await _surveyed(landing, watch)
        surveyed = loop.time()
        left = sum(manifest.piece(number).length for number in missing)
        here = manifest.nbytes - left
        need_space(left)
        if missing:
            fetch = PieceFetch(means, wanted, landing, peers, missing, here, watch)
            await fetch.run()
            brought, dropped = fetch.brought, fetch.plan.dropped
    finally:
        landing.close()
    return WeightsReport(
        manifest=manifest,
        here=here,
        peers=brought,
        dropped=dropped,
        describing=described - began,
        checking=surveyed - described,
        fetching=loop.time() - surveyed,
    )


async def _surveyed(landing: FolderLanding, watch: Watch) -> list[int]:
    loop, done = asyncio.get_running_loop(), 0
    total = landing.manifest.nbytes

    def advance(more: int) -> None:
        nonlocal done
        done += more
        watch("check", min(done, total), max(1, total))

    def advance_from_thread(more: int) -> None:
        loop.call_soon_threadsafe(advance, more)

    return await asyncio.to_thread(landing.survey, advance_from_thread)
