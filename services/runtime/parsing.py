"""Why bytes are not a valid message: the field at fault, found from the descriptor.

protobuf only says "error parsing message". These walk the wire format, after a failure and never
before, to name the string field whose bytes are not UTF-8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from services.runtime.errors import InvalidRequestError

MAX_DEPTH = 100

VARINT, FIXED64, LENGTH, GROUP, GROUP_END, FIXED32 = range(6)


@dataclass(frozen=True, slots=True)
class Unparsable:
    """What a request deserializer returns in place of a message that can't be parsed."""

    error: InvalidRequestError


class _TruncatedError(Exception):
    """The bytes end inside a field, or are no wire format at all."""


def deserializer(parse: Callable[[bytes], Any], descriptor: Descriptor) -> Callable[[bytes], Any]:
    """`parse`, but answering with an Unparsable instead of raising."""

    def checked(data: bytes) -> Any:
        try:
            return parse(data)
        except Exception:
            return Unparsable(explain(data, descriptor))

    return checked


def explain(data: bytes, descriptor: Descriptor) -> InvalidRequestError:
    """What is wrong with bytes that failed to parse as a message of this type."""
    try:
        for path, text in _strings(memoryview(data), descriptor, "", 0):
            try:
                text.decode("utf-8")
            except UnicodeDecodeError as error:
                where = f"byte 0x{text[error.start]:02x} at offset {error.start} is not"
                return InvalidRequestError(path, text[:40], f"must be UTF-8; {where}")
    except _TruncatedError:
        pass
    allowed = f"the {len(data)} bytes sent are not a {descriptor.full_name}"
    return InvalidRequestError(descriptor.name, data[:20], allowed)


def _strings(
    data: memoryview, descriptor: Descriptor, prefix: str, depth: int
) -> Iterator[tuple[str, bytes]]:
    """Every string of a message with its path, as far as the bytes can be followed."""
    if depth > MAX_DEPTH:
        raise _TruncatedError
    seen: dict[int, int] = {}
    for number, wire_type, value in _fields(data):
        field = descriptor.fields_by_number.get(number)
        if field is None or wire_type != LENGTH:
            continue
        path = prefix + field.name
        if field.is_repeated:
            path += f"[{seen.get(number, 0)}]"
            seen[number] = seen.get(number, 0) + 1
        if field.type == FieldDescriptor.TYPE_STRING:
            yield path, bytes(value)
        elif field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type is not None:
            yield from _strings(value, field.message_type, path + ".", depth + 1)


def _fields(data: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """(number, wire type, payload) of each field; payload is empty except for LENGTH."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire_type, size = tag & 7, 0
        if wire_type == VARINT:
            _, at = _varint(data, at)
        elif wire_type == FIXED64:
            size = 8
        elif wire_type == FIXED32:
            size = 4
        elif wire_type == LENGTH:
            size, at = _varint(data, at)
        elif wire_type not in (GROUP, GROUP_END):
            raise _TruncatedError
        if at + size > len(data):
            raise _TruncatedError
        yield tag >> 3, wire_type, data[at : at + size] if wire_type == LENGTH else data[:0]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _TruncatedError
