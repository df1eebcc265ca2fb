"""The error tree: codes that exist, reasons that are unique, and a round trip over the wire."""

from __future__ import annotations

import re

import pytest
from google.rpc import code_pb2

from kvtransfer import errors as kv_errors
from services.runtime import errors


def tree(root: type) -> list[type]:
    return [root] + [kind for sub in root.__subclasses__() for kind in tree(sub)]


SERVICES = tree(errors.TandemError)
ALL = SERVICES + tree(kv_errors.KvError)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_kind_has_a_reason_and_a_code_of_grpc(kind):
    assert re.fullmatch(r"[A-Z][A-Z_]*[A-Z]", kind.reason)
    assert code_pb2.Code.Value(kind.code)
    assert kind.__doc__


@pytest.mark.parametrize("root", [errors.TandemError, kv_errors.KvError])
def test_a_reason_has_one_meaning(root):
    reasons = [kind.reason for kind in tree(root)]
    assert len(reasons) == len(set(reasons))


def test_a_reason_of_both_trees_has_one_code():
    codes = {kind.reason: kind.code for kind in SERVICES}
    for kind in tree(kv_errors.KvError):
        assert codes.get(kind.reason, kind.code) == kind.code


@pytest.mark.parametrize("kind", SERVICES, ids=lambda kind: kind.__name__)
def test_by_reason_gives_the_kind_back(kind):
    found = errors.by_reason(kind.reason, "words", {"a": "b"})
    assert found.reason == kind.reason
    assert (found.message, str(found), found.metadata) == ("words", "words", {"a": "b"})
    if kind is not errors.RetryableError:
        assert type(found) is kind
        assert found.code == kind.code


def test_a_reason_nobody_knows_is_kept():
    found = errors.by_reason("FROM_THE_FUTURE", "words", {})
    assert type(found) is errors.TandemError
    assert found.reason == "FROM_THE_FUTURE"
    assert errors.TandemError.reason == "INTERNAL"


def test_a_long_value_is_shown_in_part():
    error = errors.InvalidRequestError("prompt", "x" * 10_000, "at most 100 characters")
    assert len(error.message) < 200
    assert errors.to_proto(error).details


def test_every_status_can_be_built():
    for kind in ALL:
        error = kind.__new__(kind)
        error.message, error.metadata, error.retry_seconds = "words", {"field": "f"}, 0.25
        status = errors.to_proto(error)
        assert status.code == code_pb2.Code.Value(kind.code)
        assert len(status.details) >= 1


@pytest.mark.parametrize("letter", ["x", "é", "\U0001f600"])
def test_a_status_fits_the_headers_of_an_answer(letter):
    """Whatever of the caller's is echoed in it: gRPC refuses more than 16 KiB as a whole."""
    error = errors.InvalidRequestError("field", letter * 100_000, letter * 100_000)
    error.metadata["more"] = letter * 100_000
    status = errors.to_status(error)
    size = sum(len(value) for _, value in status.trailing_metadata)
    assert size + 3 * len(status.details.encode()) < 16_000
