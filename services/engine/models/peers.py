"""Brings a model here from workers that serve it (kvtransfer.weights), to where resolve() looks.

model.path                                  if it is set: that folder is filled
<cache>/peers/model-<name>/                 otherwise
<cache>/digests/<hash of a folder>.json     what its files were found to be
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from kvtransfer.weights.describing import Digests
from kvtransfer.weights.driving import Means
from kvtransfer.weights.fetch import WeightsReport, fetch_weights
from kvtransfer.weights.finding import Wanted, Watch, unwatched
from services.engine.models import cache
from services.engine.models.errors import ModelFileError, ModelNotFoundError
from services.engine.models.folder import GGUF_SUFFIX, check_weights, fetched_folder, resolve
from services.runtime.load import SettingsError
from services.runtime.settings import ModelSettings

LOCK_SECONDS = 0.2
"""Between two looks whether another process still fetches."""


@dataclass(frozen=True, slots=True)
class Brought:
    """A model that was fetched. place: its folder."""

    place: Path
    report: WeightsReport

    def words(self) -> str:
        """For a log."""
        report = self.report
        seconds = max(report.fetching, 1e-9)
        peers = ", ".join(
            f"{peer.bytes / 1e6:.1f} MB from {address} over {peer.transport}"
            for address, peer in report.peers.items()
            if peer.bytes
        )
        dropped = "".join(f"; {name} was given up: {why}" for name, why in report.dropped.items())
        return (
            f"{peers or 'nothing was missing'}, {report.here / 1e6:.1f} MB were here; "
            f"described in {report.describing:.2f} s, looked through in {report.checking:.2f} s, "
            f"fetched in {report.fetching:.2f} s ({report.bytes / 1e6 / seconds:.1f} MB/s); "
            f"digest {report.manifest.digest.hex()}{dropped}"
        )


def is_here(model: ModelSettings, models: Path) -> bool:
    """Whether resolve() finds the model, with all of its weights."""
    try:
        check_weights(resolve(model, models).path)
    except (ModelNotFoundError, ModelFileError):
        return False
    return True


def digests_of(folder: Path, models: Path) -> Digests:
    """What is remembered of a folder's files."""
    name = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:32]
    return Digests(models / "digests" / f"{name}.json")


async def bring(
    model: ModelSettings,
    models: Path,
    peers: Sequence[str],
    means: Means,
    *,
    digest: str = "",
    region: str = "",
    watch: Watch = unwatched,
    waiting: Callable[[], None] = lambda: None,
) -> Brought | None:
    """Has the model here, fetched from `peers` (host:port, best first); None if it was.

    models: the cache folder. digest: hexadecimal, of the folder wanted. `waiting` is called if
    another process is fetching it. Raises what fetch_weights() raises, its OSErrors as
    ModelSpaceError and ModelFetchError, and SettingsError.
    """
    if is_here(model, models):
        return None
    place = _place(model, models)
    with cache.writing(place):
        place.mkdir(parents=True, exist_ok=True)
        async with _locked(place, waiting):
            if is_here(model, models):
                return None
            wanted = Wanted(model.name, peers, bytes.fromhex(digest) or None, region)
            report = await fetch_weights(
                place,
                wanted,
                means,
                need_space=lambda nbytes: cache.need_space(place, nbytes),
                watch=watch,
            )
    # What is served from here need not be read for its digests first.
    digests_of(place, models).keep(place, report.manifest)
    check_weights(resolve(model, models).path)
    return Brought(place, report)


def _place(model: ModelSettings, models: Path) -> Path:
    if not model.path:
        return fetched_folder(model.name, models)
    path = Path(model.path).expanduser()
    if path.suffix.lower() == GGUF_SUFFIX or path.is_file():
        raise SettingsError(
            f"weights.sources: workers give folders, and model.path={model.path} is a file"
        )
    return path


@asynccontextmanager
async def _locked(folder: Path, waiting: Callable[[], None]) -> AsyncIterator[None]:
    """As cache.locked(), without blocking the event loop while another process has the lock."""
    lock = os.open(folder / ".lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not _lock(lock):
            waiting()
            while not _lock(lock):  # noqa: ASYNC110 - nothing announces it
                await asyncio.sleep(LOCK_SECONDS)
        yield
    finally:
        os.close(lock)


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
