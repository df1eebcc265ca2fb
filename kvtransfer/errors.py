"""Every error of the KV plane.

Each has a reason (UPPER_SNAKE_CASE, stable), a gRPC code by name, words for a person and the values
it names as metadata for programs: what a gRPC server needs to answer with a google.rpc.Status.
This room knows nothing of the services above it, so the tree is its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class KvError(Exception):
    """Root of the tree; an instance of the root itself stands for a reason we don't know."""

    reason: ClassVar[str] = "KV_ERROR"
    code: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message)
        self.message = message
        self.metadata: dict[str, str] = {k: str(v) for k, v in metadata.items()}


class OutOfBlocksError(KvError):
    """The pool can't give that many blocks, even if it evicts every unreferenced one."""

    reason = "OUT_OF_BLOCKS"
    code = "RESOURCE_EXHAUSTED"

    def __init__(self, wanted: int, available: int) -> None:
        super().__init__(
            f"{wanted} KV blocks wanted, {available} can be had",
            wanted=wanted,
            available=available,
        )


class KvSourceLostError(KvError):
    """The source died, went silent, or gave the lease up before everything was fetched.

    `complete[i]` says whether the block of the i-th key asked for arrived whole and verified.
    """

    reason = "KV_SOURCE_LOST"
    code = "UNAVAILABLE"

    def __init__(self, message: str, complete: tuple[bool, ...] = (), **metadata: object) -> None:
        super().__init__(message, **metadata)
        self.complete = complete


class LeaseLostError(KvError):
    """The lease was released, cancelled or expired. The sink reports KV_SOURCE_LOST for it."""

    reason = "LEASE_LOST"
    code = "ABORTED"


class BlocksNotHeldError(KvError):
    """The lease is complete and lacks a block asked for: waiting would be in vain."""

    reason = "BLOCKS_NOT_HELD"
    code = "NOT_FOUND"


class WrongTenantError(KvError):
    """Blocks computed for one tenant were asked for in the name of another."""

    reason = "KV_WRONG_TENANT"
    code = "PERMISSION_DENIED"

    @classmethod
    def of(cls, lease_id: str) -> WrongTenantError:
        """Says no more than who asked knows: not whose they are."""
        return cls("the blocks asked for are not this tenant's", lease_id=lease_id)


class RegionDeniedError(KvError):
    """Blocks may not go to the region of who asked; the rules are the source's."""

    reason = "KV_REGION_DENIED"
    code = "PERMISSION_DENIED"


class InvalidFetchError(KvError):
    """A fetch asks for something that can't be meant."""

    reason = "INVALID_FETCH"
    code = "INVALID_ARGUMENT"


class TooManyFetchesError(KvError):
    """A source serves as many fetches as it can keep books of. The sink reports KV_SOURCE_LOST."""

    reason = "KV_TOO_MANY_FETCHES"
    code = "RESOURCE_EXHAUSTED"


class LayoutMismatchError(KvError):
    """Bytes of one side mean nothing to the other."""

    reason = "LAYOUT_MISMATCH"
    code = "FAILED_PRECONDITION"

    @classmethod
    def between(cls, source: Mapping[str, str], sink: Mapping[str, str]) -> LayoutMismatchError:
        """Names every field that differs, with both values."""
        names = [n for n in {**source, **sink} if source.get(n) != sink.get(n)]
        said = "; ".join(
            f"{n} is {source.get(n, 'unknown')} at the source, {sink.get(n, 'unknown')} at the sink"
            for n in names
        )
        first = names[0] if names else "fingerprint"
        return cls(
            f"KV layouts differ: {said or 'in a way that the fields do not show'}",
            field=first,
            source=source.get(first, ""),
            sink=sink.get(first, ""),
            fields=",".join(names),
        )


class NoTransportError(KvError):
    """No transport fits both sides; the message says why for each."""

    reason = "NO_TRANSPORT"
    code = "FAILED_PRECONDITION"


class TransportError(KvError):
    """A transport broke while it was used; within a fetch it becomes KV_SOURCE_LOST."""

    reason = "TRANSPORT_FAILED"
    code = "UNAVAILABLE"


class TransportUnusableError(TransportError):
    """A transport that should fit can't be opened; another may do."""

    reason = "TRANSPORT_UNUSABLE"
    code = "FAILED_PRECONDITION"


class CorruptBlockError(KvError):
    """A block's bytes are not those its source computed a checksum of."""

    reason = "CORRUPT_BLOCK"
    code = "DATA_LOSS"


class TierUnusableError(KvError):
    """A folder can't be a tier: another process has it, or the disk can't or may not hold it."""

    reason = "KV_TIER_UNUSABLE"
    code = "FAILED_PRECONDITION"


class WeightsNotGivenError(KvError):
    """The worker that was asked does not give the weights."""

    reason = "WEIGHTS_NOT_GIVEN"
    code = "NOT_FOUND"


class WeightsDifferError(KvError):
    """Under one name there are different files: at peers, or at a peer and here."""

    reason = "WEIGHTS_DIFFER"
    code = "FAILED_PRECONDITION"


class WeightsInvalidError(KvError):
    """A peer describes a folder, or asks for pieces, as nobody may."""

    reason = "WEIGHTS_INVALID"
    code = "INVALID_ARGUMENT"


class WeightsLostError(KvError):
    """No peer could give the weights; the message says of each why."""

    reason = "WEIGHTS_LOST"
    code = "UNAVAILABLE"
