"""What a failed call says of itself, however it was ended."""

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

from kvtransfer.rpc_status import status_of
from services.runtime.errors import DeadlineError, from_rpc, to_proto

SAID = to_proto(DeadlineError("the deadline passed after 0.092 s"))
DEADLINE = grpc.StatusCode.DEADLINE_EXCEEDED


def failed(code: grpc.StatusCode, words: str, *trailing: tuple[str, bytes | str]) -> AioRpcError:
    return AioRpcError(code, Metadata(), Metadata(*trailing), details=words)


def test_the_handlers_status_counts_though_grpc_ended_the_call_at_the_same_time():
    error = failed(
        DEADLINE, "Deadline Exceeded", ("grpc-status-details-bin", SAID.SerializeToString())
    )
    assert status_of(error) == SAID
    told = from_rpc(error)
    assert isinstance(told, DeadlineError)
    assert told.message == "the deadline passed after 0.092 s"


@pytest.mark.parametrize(
    ("code", "trailing"),
    [
        (DEADLINE, ()),
        (DEADLINE, (("other-bin", b"x"),)),
        (DEADLINE, (("grpc-status-details-bin", b"\xff\xff"),)),
        (grpc.StatusCode.CANCELLED, (("grpc-status-details-bin", SAID.SerializeToString()),)),
    ],
)
def test_the_transports_own_failure_says_nothing_of_a_handler(code, trailing):
    error = failed(code, "words", *trailing)
    assert status_of(error) is None
    assert from_rpc(error) is None
