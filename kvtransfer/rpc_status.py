"""The google.rpc.Status that a failed call brought with it."""

from __future__ import annotations

import grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

_KEY = "grpc-status-details-bin"


def status_of(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    """What the handler said, or None if the failure is the transport's own.

    A deadline may pass for the handler and for the server's gRPC at once: then the handler's status
    comes with gRPC's words, which grpc_status.from_call takes for a fault. The code has to be one.
    """
    for key, value in error.trailing_metadata() or ():
        if key == _KEY and isinstance(value, bytes):
            try:
                status = status_pb2.Status.FromString(value)
            except DecodeError:
                return None
            return status if status.code == error.code().value[0] else None
    return None
