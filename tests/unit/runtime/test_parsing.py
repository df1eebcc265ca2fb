"""Bytes that are no message: the field at fault is named, whatever else the message has."""

from __future__ import annotations

import pytest
from google.protobuf import struct_pb2
from hypothesis import given
from hypothesis import strategies as st

from services.runtime.parsing import Unparsable, deserializer, explain
from tandem.generation.v1 import generation_pb2
from tandem.inference.v1 import inference_pb2

DESCRIPTOR = inference_pb2.GenerateRequest.DESCRIPTOR


def request(**more) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        sampling=generation_pb2.SamplingParams(
            temperature=0.5, seed=2**63, stop_token_ids=[1, 300]
        ),
        **more,
    )


def broken(message, marker: bytes = b"@@@@") -> bytes:
    return message.SerializeToString().replace(marker, b"ab\xc3(")


@pytest.mark.parametrize(
    ("message", "path"),
    [
        (request(prompt="@@@@"), "prompt"),
        (request(prompt="fine", model="@@@@"), "model"),
        (request(prompt="fine", stop=["a", "b", "x@@@@"]), "stop[2]"),
        (
            request(
                chat=inference_pb2.ChatInput(
                    messages=[
                        inference_pb2.ChatMessage(role="user", content="fine"),
                        inference_pb2.ChatMessage(role="user", content="@@@@"),
                    ]
                )
            ),
            "chat.messages[1].content",
        ),
    ],
)
def test_the_field_that_is_not_utf8_is_named(message, path):
    error = explain(broken(message), DESCRIPTOR)
    assert error.metadata["field"] == path
    assert error.code == "INVALID_ARGUMENT"
    assert "0xc3" in error.message
    assert "must be UTF-8" in error.message


def test_map_entries_are_followed():
    message = struct_pb2.Struct()
    message["key"] = "@@@@"
    error = explain(broken(message), struct_pb2.Struct.DESCRIPTOR)
    assert error.metadata["field"] == "fields[0].value.string_value"


def test_unknown_fields_and_groups_are_passed_over():
    group = b"\xfb\x07" + b"\x08\x01" + b"\xfc\x07"  # field 127 as a group holding field 1
    unknown = b"\xfa\x3f\x02\xff\xff"  # field 1023, not a string we know
    fixed = b"\xf9\x3f" + b"\x00" * 8 + b"\xfd\x3f" + b"\x00" * 4
    data = group + unknown + fixed + broken(request(prompt="@@@@"))
    assert explain(data, DESCRIPTOR).metadata["field"] == "prompt"


@pytest.mark.parametrize(
    "data",
    [b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x12\x05ab", b"\x07", b"\x80" * 20, b"\x3a" * 300],
)
def test_what_is_no_wire_format_says_so(data):
    error = explain(data, DESCRIPTOR)
    assert "are not a tandem.inference.v1.GenerateRequest" in error.message
    assert f"{len(data)} bytes" in error.message


def test_depth_is_bounded():
    """1,000 nested lists, deeper than protobuf parses."""
    data = b""
    for _ in range(1000):
        value = b"\x32" + _length(data) + data
        data = b"\x0a" + _length(value) + value
    error = explain(data, struct_pb2.ListValue.DESCRIPTOR)
    assert "are not a google.protobuf.ListValue" in error.message


def _length(data: bytes) -> bytes:
    size, out = len(data), b""
    while size > 0x7F:
        out += bytes([size & 0x7F | 0x80])
        size >>= 7
    return out + bytes([size])


@given(st.binary(max_size=200))
def test_any_bytes_parse_or_are_explained(data):
    parse = deserializer(inference_pb2.GenerateRequest.FromString, DESCRIPTOR)
    found = parse(data)
    if isinstance(found, Unparsable):
        assert found.error.metadata["field"]
        assert len(found.error.message) < 400
    else:
        assert found == inference_pb2.GenerateRequest.FromString(data)


@given(st.binary(min_size=1, max_size=30), st.integers(0, 3))
def test_a_stop_string_of_any_bytes(text, before):
    message = request(prompt="fine", stop=["ok"] * before)
    data = message.SerializeToString() + b"\x32" + bytes([len(text)]) + text
    found = deserializer(inference_pb2.GenerateRequest.FromString, DESCRIPTOR)(data)
    try:
        text.decode()
    except UnicodeDecodeError:
        assert found.error.metadata["field"] == f"stop[{before}]"
    else:
        assert list(found.stop) == ["ok"] * before + [text.decode()]
