"""Every error a Tandem service answers with, and its one mapping to gRPC status.

An error has a reason (UPPER_SNAKE_CASE, stable, documented in docs/errors.md), a gRPC code,
words for a person, and the values it names as metadata for programs. On the wire it is a
google.rpc.Status with ErrorInfo always, BadRequest for a field, RetryInfo where a retry helps.
Errors of kvtransfer (kvtransfer/errors.py) have the same attributes and pass through here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from kvtransfer.rpc_status import status_of

DOMAIN = "tandem"
MESSAGE_BYTES = 2000
METADATA_BYTES = 500


@runtime_checkable
class StatusError(Protocol):
    """What can be mapped to a status: every TandemError and every kvtransfer error."""

    @property
    def reason(self) -> str:
        """UPPER_SNAKE_CASE, stable."""

    @property
    def code(self) -> str:
        """Name of the gRPC code."""

    @property
    def message(self) -> str:
        """For a person."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """Values named in the message, for programs."""


class TandemError(Exception):
    """Root of the tree; an instance of the root itself is a bug."""

    reason: str = "INTERNAL"
    code: str = "INTERNAL"

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message)
        self.message = message
        self.metadata: dict[str, str] = {k: str(v) for k, v in metadata.items()}


class InvalidRequestError(TandemError):
    """A field has a value that can't be served."""

    reason = "INVALID_REQUEST"
    code = "INVALID_ARGUMENT"

    def __init__(self, field: str, value: object, allowed: str) -> None:
        shown = repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        super().__init__(
            f"{field}: {shown} is not allowed; {allowed}", field=field, value=shown, allowed=allowed
        )


class UnknownModelError(TandemError):
    """No worker serves this model."""

    reason = "UNKNOWN_MODEL"
    code = "NOT_FOUND"


class UnknownAdapterError(TandemError):
    """No worker has this LoRA adapter."""

    reason = "UNKNOWN_ADAPTER"
    code = "NOT_FOUND"


class AdapterLimitError(TandemError):
    """A worker has no room for another LoRA adapter, or not for one like this."""

    reason = "ADAPTER_LIMIT"
    code = "RESOURCE_EXHAUSTED"


class DuplicateRequestError(TandemError):
    """A live request has this id."""

    reason = "DUPLICATE_REQUEST"
    code = "ALREADY_EXISTS"


class RetryableError(TandemError):
    """Trying again after `retry_seconds` may help."""

    reason = "UNAVAILABLE"
    code = "UNAVAILABLE"

    def __init__(self, message: str, *, retry_seconds: float = 1.0, **metadata: object) -> None:
        super().__init__(message, **metadata)
        self.retry_seconds = retry_seconds


class NoWorkersError(RetryableError):
    """No worker of a needed role is up."""

    reason = "NO_WORKERS"
    code = "UNAVAILABLE"


class CoordinatorUnavailableError(RetryableError):
    """The coordinator can't be reached."""

    reason = "COORDINATOR_UNAVAILABLE"
    code = "UNAVAILABLE"


class WorkerLostError(RetryableError):
    """A worker died while it had the request."""

    reason = "WORKER_LOST"
    code = "UNAVAILABLE"


class WorkerSilentError(RetryableError):
    """A worker that is there, for all that is known, brought nothing for longer than it takes."""

    reason = "WORKER_SILENT"
    code = "UNAVAILABLE"


class KvSourceLostError(RetryableError):
    """The KV of a prompt could not be fetched from where it was."""

    reason = "KV_SOURCE_LOST"
    code = "UNAVAILABLE"


class DrainingError(RetryableError):
    """The process shuts down: it takes no new requests, and ends those that run for too long."""

    reason = "DRAINING"
    code = "UNAVAILABLE"


class RoleChangedError(RetryableError):
    """The worker has changed its role and does not serve this now."""

    reason = "ROLE_CHANGED"
    code = "UNAVAILABLE"


class AdapterNotLoadedError(RetryableError):
    """The worker does not have the LoRA adapter that a request was placed with."""

    reason = "ADAPTER_NOT_LOADED"
    code = "UNAVAILABLE"


class AdapterFailedError(TandemError):
    """With this LoRA adapter the model gave no number to choose a token by."""

    reason = "ADAPTER_FAILED"
    code = "FAILED_PRECONDITION"


class EngineFailedError(RetryableError):
    """The engine broke while it ran the request."""

    reason = "ENGINE_FAILED"
    code = "UNAVAILABLE"


class OverloadedError(RetryableError):
    """Refused before the queue: it is full."""

    reason = "OVERLOADED"
    code = "RESOURCE_EXHAUSTED"


class SloUnattainableError(RetryableError):
    """Refused at once: the service level asked for can't be had now."""

    reason = "SLO_UNATTAINABLE"
    code = "RESOURCE_EXHAUSTED"


class EngineOverloadedError(RetryableError):
    """A worker has no room; the request can be placed elsewhere."""

    reason = "ENGINE_OVERLOADED"
    code = "RESOURCE_EXHAUSTED"


class GuideFailedError(TandemError):
    """An output can't be held to its form any further."""

    reason = "GUIDE_FAILED"
    code = "INVALID_ARGUMENT"


class DeadlineError(TandemError):
    """The client's deadline passed, or can't be met."""

    reason = "DEADLINE"
    code = "DEADLINE_EXCEEDED"


class CancelledError(TandemError):
    """The client cancelled."""

    reason = "CANCELLED"
    code = "CANCELLED"


def to_proto(error: StatusError) -> status_pb2.Status:
    """The google.rpc.Status of an error, details included."""
    metadata = {name: _cut(value, METADATA_BYTES) for name, value in error.metadata.items()}
    details = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)]
    packed = []
    if isinstance(error, InvalidRequestError):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.metadata.get("field", ""), description=_cut(error.message)
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, RetryableError):
        delay = duration_pb2.Duration()
        delay.FromMicroseconds(round(error.retry_seconds * 1e6))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    for detail in details:
        box = any_pb2.Any()
        box.Pack(detail)
        packed.append(box)
    code = code_pb2.Code.Value(error.code)
    return status_pb2.Status(code=code, message=_cut(error.message), details=packed)


def _cut(text: str, most: int = MESSAGE_BYTES) -> str:
    """What echoes a caller must not be so long that the answer is refused as a whole.

    gRPC takes 16 KiB of an answer's headers, in which this stands three times.
    """
    raw = text.encode()
    return text if len(raw) <= most else raw[:most].decode(errors="ignore") + "..."


def to_status(error: StatusError) -> grpc.Status:
    """For `context.abort_with_status`."""
    status: grpc.Status = rpc_status.to_status(to_proto(error))
    return status


def _subclasses(root: type[TandemError]) -> list[type[TandemError]]:
    return [root] + [c for sub in root.__subclasses__() for c in _subclasses(sub)]


def by_reason(reason: str, message: str, metadata: Mapping[str, str]) -> TandemError:
    """An error as another process raised it, from what the wire carried of it.

    A reason that this tree does not have (kvtransfer's, a newer version's) becomes a plain
    TandemError that keeps it.
    """
    kinds = (k for k in _subclasses(TandemError) if k.reason == reason and k is not RetryableError)
    kind = next(kinds, TandemError)
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    error.reason = reason
    error.message = message
    error.metadata = dict(metadata)
    if isinstance(error, RetryableError):
        error.retry_seconds = 1.0
    return error


def from_rpc(error: grpc.aio.AioRpcError) -> TandemError | None:
    """The TandemError inside a failed call, or None if the failure is the transport's own."""
    status = status_of(error)
    if status is None:
        return None
    found: TandemError | None = None
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            found = by_reason(info.reason, status.message, info.metadata)
            found.code = error.code().name
        elif detail.Unpack(retry) and isinstance(found, RetryableError):
            found.retry_seconds = retry.retry_delay.ToMicroseconds() / 1e6
    return found
