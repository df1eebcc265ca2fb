"""Asks peers what files a model has, and who has them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import grpc

from kvtransfer.channels import Channels
from kvtransfer.errors import WeightsDifferError, WeightsInvalidError, WeightsLostError
from kvtransfer.weights import wire
from kvtransfer.weights.manifest import Manifest
from tandem.weights.v1 import weights_pb2 as pb
from tandem.weights.v1 import weights_pb2_grpc

log = logging.getLogger(__name__)

OTHERS_SECONDS = 1.0
"""Once one peer has described the folder, the others have this long to say that theirs differs."""

Stage = Literal["describe", "check", "fetch"]
Watch = Callable[[Stage, int, int], None]
"""Told how far a stage is: bytes done, bytes in all."""


def unwatched(stage: Stage, done: int, total: int) -> None:
    """For who does not look."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is fetched: the model of this name, of this digest if that is known; from where.

    peers: host:port of workers, best first. region: that this sink says it is in.
    """

    model: str
    peers: Sequence[str]
    digest: bytes | None = None
    region: str = ""


async def find(
    wanted: Wanted, stall_seconds: float, watch: Watch = unwatched
) -> tuple[Manifest, list[str]]:
    """The folder, and the peers that have it or have not said that they don't.

    Raises WeightsLostError, WeightsDifferError.
    """
    if not wanted.peers:
        raise WeightsLostError(f"no peer is known that could give {wanted.model}")
    channels = Channels()
    asked = {
        asyncio.create_task(_describe(channels, address, wanted, stall_seconds, watch)): address
        for address in wanted.peers
    }
    try:
        found, why = await _answers(asked, wanted.digest)
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        await channels.close()
    if not found:
        said = "; ".join(f"{address}: {words}" for address, words in why.items())
        raise WeightsLostError(f"no peer can give {wanted.model}. {said}", model=wanted.model)
    digests = {manifest.digest.hex() for manifest in found.values()}
    if len(digests) > 1:
        said = "; ".join(f"{a} has {m.digest.hex()}" for a, m in found.items())
        raise WeightsDifferError(
            f"peers have different files of {wanted.model}, and nothing says which are meant. "
            f"{said}",
            model=wanted.model,
            digests=",".join(sorted(digests)),
        )
    for address, words in why.items():
        log.warning("%s gives no weights: %s", address, words)
    first = next(iter(found.values()))
    silent = [a for a in wanted.peers if a not in found and a not in why]
    return first, [*found, *silent]


async def _describe(
    channels: Channels, address: str, wanted: Wanted, stall_seconds: float, watch: Watch
) -> Manifest:
    """Raises PeerError, WeightsInvalidError."""
    stub = weights_pb2_grpc.WeightsServiceStub(channels.use(address))
    call = stub.Describe(pb.DescribeRequest(model=wanted.model, region=wanted.region))
    reader = wire.ManifestReader()
    try:
        while True:
            async with asyncio.timeout(stall_seconds):
                message = await call.read()
            if not isinstance(message, pb.DescribeResponse):
                break
            if (reading := reader.take(message)) is not None:
                watch("describe", reading.done, max(1, reading.total))
        manifest = reader.manifest()
    except TimeoutError:
        raise wire.PeerError(f"it did not answer in {stall_seconds:g} s") from None
    except grpc.aio.AioRpcError as error:
        raise wire.failure(error) from error
    finally:
        call.cancel()
        await channels.done(address)
    if wanted.digest is not None and manifest.digest != wanted.digest:
        raise wire.PeerError(f"it has other files, {manifest.digest.hex()}", refused=True)
    return manifest


async def _answers(
    asked: Mapping[asyncio.Task[Manifest], str], digest: bytes | None
) -> tuple[dict[str, Manifest], dict[str, str]]:
    """What peers described, and why others did not.

    Waits for the first description, then a little for the others, which might disagree; with a
    digest they can't.
    """
    found: dict[str, Manifest] = {}
    why: dict[str, str] = {}
    waiting = set(asked)
    while waiting and not (found and digest):
        done, waiting = await asyncio.wait(
            waiting,
            timeout=OTHERS_SECONDS if found else None,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if not done:
            break
        for task in done:
            try:
                found[asked[task]] = task.result()
            except wire.PeerError as error:
                why[asked[task]] = error.why
            except WeightsInvalidError as error:
                why[asked[task]] = error.message
    return found, why
