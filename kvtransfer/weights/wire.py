"""The messages of weights.proto, to and from what this room works with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grpc

from kvtransfer.errors import WeightsInvalidError
from kvtransfer.transports.base import Offer
from kvtransfer.weights.manifest import DIGEST_BYTES, MAX_FILES, MAX_PIECES, File, Manifest
from kvtransfer.wire import FEW, offer_from, offer_to
from tandem.weights.v1 import weights_pb2 as pb

DIGESTS_IN_A_MESSAGE = 32_768
"""1 MiB."""
MOST_PIECES_ASKED = 1024
NAME_BYTES = 512


@dataclass(frozen=True, slots=True)
class Opening:
    """What a sink begins with."""

    model: str
    digest: bytes
    offers: tuple[Offer, ...]
    region: str


@dataclass(frozen=True, slots=True)
class Agreed:
    """What a source answers."""

    ticket: Offer
    why: str
    window: int


def described(manifest: Manifest) -> Iterator[pb.DescribeResponse]:
    """The messages of a manifest."""
    yield pb.DescribeResponse(
        folder=pb.Folder(
            digest=manifest.digest, piece_bytes=manifest.piece_bytes, files=len(manifest.files)
        )
    )
    most = DIGESTS_IN_A_MESSAGE * DIGEST_BYTES
    for file in manifest.files:
        for start in range(0, max(1, len(file.digests)), most):
            part = file.digests[start : start + most]
            message = pb.FilePart(name=file.name, size=file.size, digests=part)
            yield pb.DescribeResponse(file=message)


class ManifestReader:
    """Takes the messages of a manifest. Memory is bounded, whatever comes."""

    def __init__(self) -> None:
        self._folder: pb.Folder | None = None
        self._names: list[tuple[str, int]] = []
        self._digests: list[bytearray] = []
        self._bytes = 0

    def take(self, message: pb.DescribeResponse) -> pb.Reading | None:
        """One message; returns it if it only says how far reading is.

        Raises WeightsInvalidError.
        """
        kind = message.WhichOneof("message")
        if kind == "reading" and self._folder is None:
            return message.reading
        if kind == "folder" and self._folder is None:
            self._folder = message.folder
        elif kind == "file" and self._folder is not None:
            self._take_file(message.file)
        else:
            raise WeightsInvalidError("a folder's description does not come in its order")
        return None

    def manifest(self) -> Manifest:
        """The whole of it. Raises WeightsInvalidError if it is none."""
        if self._folder is None:
            raise WeightsInvalidError("no folder was described")
        if len(self._names) != self._folder.files:
            raise WeightsInvalidError(
                f"{len(self._names)} files were described of {self._folder.files}"
            )
        files = [
            File(name, size, bytes(digests))
            for (name, size), digests in zip(self._names, self._digests, strict=True)
        ]
        manifest = Manifest(self._folder.piece_bytes, tuple(files))
        if manifest.digest != self._folder.digest:
            raise WeightsInvalidError("a folder's digest is not that of the files described")
        return manifest

    def _take_file(self, part: pb.FilePart) -> None:
        self._bytes += len(part.digests)
        if (part.name, part.size) not in self._names[-1:]:
            self._names.append((part.name, part.size))
            self._digests.append(bytearray())
        self._digests[-1] += part.digests
        if len(self._names) > MAX_FILES or self._bytes > MAX_PIECES * DIGEST_BYTES:
            raise WeightsInvalidError("a folder's description is too long")


def opening_to(opening: Opening) -> pb.GiveRequest:
    """To the wire."""
    return pb.GiveRequest(
        open=pb.GiveOpen(
            model=opening.model,
            digest=opening.digest,
            offers=map(offer_to, opening.offers),
            region=opening.region,
        )
    )


def opening_from(message: pb.GiveRequest) -> Opening:
    """From the wire. Raises WeightsInvalidError."""
    if message.WhichOneof("message") != "open":
        raise WeightsInvalidError("weights are asked for before the call is opened")
    said = message.open
    if len(said.offers) > FEW or len(said.region) > NAME_BYTES:
        raise WeightsInvalidError("an opening with too many offers, or too long a region")
    return Opening(said.model, bytes(said.digest), tuple(map(offer_from, said.offers)), said.region)


def agreed_to(agreed: Agreed) -> pb.GiveResponse:
    """To the wire."""
    return pb.GiveResponse(
        opened=pb.GiveOpened(
            transport=offer_to(agreed.ticket), why=agreed.why, window=agreed.window
        )
    )


def agreed_from(message: pb.GiveResponse | None) -> Agreed:
    """From the wire. Raises PeerError."""
    if message is None or message.WhichOneof("message") != "opened":
        raise PeerError("it did not open the call as it must", refused=True)
    opened = message.opened
    return Agreed(offer_from(opened.transport), opened.why, opened.window)


def want_to(pieces: Sequence[int]) -> pb.GiveRequest:
    """To the wire."""
    return pb.GiveRequest(want=pb.Pieces(numbers=pieces))


def read_to(pieces: Sequence[int]) -> pb.GiveRequest:
    """To the wire."""
    return pb.GiveRequest(read=pb.Pieces(numbers=pieces))


_REFUSALS = (
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED,
)


class PeerError(Exception):
    """A peer gives nothing, or no more. `refused`: asking it again is in vain."""

    def __init__(self, why: str, *, refused: bool = False) -> None:
        super().__init__(why)
        self.why = why
        self.refused = refused


def failure(error: grpc.aio.AioRpcError) -> PeerError:
    """What a peer ended a call with."""
    code = error.code()
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return PeerError("it is no worker that gives weights", refused=True)
    if code is grpc.StatusCode.UNAVAILABLE:
        return PeerError(f"it can't be reached: {error.details() or 'no details'}")
    return PeerError(error.details() or code.name, refused=code in _REFUSALS)
