"""The messages of the UCX transport. Bytes to values and back; no UCX.

UCX matches a message by its 64-bit tag, whoever sent it, so a tag is what tells messages apart. All
integers are little-endian.

    tag               from, to         content
    HELLO_TAG         sink, source     hello: magic, nonce of the ticket, id of the connection,
                                       u32 length and that many bytes of the sink's address
    id                source, sink     reply: 256 bytes, words for a person; none mean welcome
    id                sink, source     request: u64 tag, u32 count; then as often as count says
                                       u64 offset, u64 length
    tag + i           source, sink     the bytes of the i-th range of a request

A connection's id and the tags of its data are random numbers that the sink chooses. A request
names at most MAX_RANGES ranges of together MAX_BYTES. It is answered by its data alone, or by a
reply that says why not, after which nothing more comes. One of no ranges is a farewell: neither
side of UCX is told when the other closes in good order.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvtransfer.memory import NONCE_BYTES

HELLO_TAG = 0x544E444D4B565558
MAX_RANGES = 256
MAX_BYTES = 8 * 2**20
MAX_WORDS = 256
MAX_ADDRESS = 4096

_MAGIC = b"TNDMUCX\x01"
_HELLO = struct.Struct(f"<8s{NONCE_BYTES}sQI")
_REQUEST = struct.Struct("<QI")
_RANGE_BYTES = 16

HELLO_BYTES = _HELLO.size + MAX_ADDRESS
REQUEST_BYTES = _REQUEST.size + MAX_RANGES * _RANGE_BYTES
REPLY_BYTES = MAX_WORDS


class ProtocolError(Exception):
    """The peer sent what nobody may send."""


@dataclass(frozen=True, slots=True)
class Hello:
    """Who wants to read, and what with."""

    nonce: bytes
    connection: int
    address: bytes


@dataclass(frozen=True, slots=True)
class Request:
    """(offset, length) ranges; the i-th is sent with `tag` + i. None mean farewell."""

    tag: int
    ranges: Sequence[tuple[int, int]]


def pack_hello(hello: Hello) -> bytes:
    """Raises ValueError if the address is too long."""
    if len(hello.address) > MAX_ADDRESS:
        raise ValueError(f"an address of {len(hello.address)} bytes; {MAX_ADDRESS} have room")
    head = _HELLO.pack(_MAGIC, hello.nonce, hello.connection, len(hello.address))
    return head + hello.address


def unpack_hello(raw: bytes) -> Hello:
    """Raises ProtocolError. Bytes after its end are not looked at."""
    magic, nonce, connection, size = _HELLO.unpack_from(raw)
    if magic != _MAGIC or not 0 < size <= len(raw) - _HELLO.size:
        raise ProtocolError("not a hello")
    return Hello(nonce, connection, raw[_HELLO.size : _HELLO.size + size])


def pack_request(request: Request) -> bytes:
    """Bytes of a request."""
    head = _REQUEST.pack(request.tag, len(request.ranges))
    return head + np.array(request.ranges, "<u8").tobytes()


def unpack_request(raw: bytes, data_bytes: int) -> Request:
    """Raises ProtocolError if ranges leave the data, or are too many or too long."""
    tag, count = _REQUEST.unpack_from(raw)
    if count > MAX_RANGES or len(raw) < _REQUEST.size + count * _RANGE_BYTES:
        raise ProtocolError(f"a request of {count} ranges; up to {MAX_RANGES} are allowed")
    table = np.frombuffer(raw, "<u8", 2 * count, _REQUEST.size).reshape(-1, 2)
    ranges = [(int(offset), int(length)) for offset, length in table]
    for offset, length in ranges:
        if not length or offset + length > data_bytes:
            raise ProtocolError(f"range {offset}+{length} is not in the {data_bytes} bytes there")
    if sum(length for _, length in ranges) > MAX_BYTES:
        raise ProtocolError(f"a request of more than {MAX_BYTES} bytes")
    return Request(tag, ranges)


def pack_reply(words: str) -> bytes:
    """Words that are too long are cut."""
    return words.encode()[:MAX_WORDS].ljust(MAX_WORDS, b"\0")


def unpack_reply(raw: bytes) -> str:
    """The words."""
    return raw.rstrip(b"\0").decode(errors="replace")
