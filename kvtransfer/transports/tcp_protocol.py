"""The messages of the TCP transport. Bytes to values and back; no sockets.

All integers are little-endian. The sink speaks first, then requests are answered in order:

    hello     8 bytes magic, 16 bytes nonce of the ticket
    request   u32 id, u32 count; count times: u64 offset, u64 length
    reply     u32 id, u32 status, u64 length; then as many bytes: the data asked for, one range
              after the other, if the status is OK, else words for a person

The hello is answered by a reply with id 0 and no data. A request names at most MAX_RANGES ranges
of together MAX_BYTES; a reader keeps at most WINDOW requests unanswered, which bounds what is
under way on a connection.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

MAGIC = b"TNDMKV\x00\x01"
NONCE_BYTES = 16
MAX_RANGES = 256
MAX_BYTES = 16 * 2**20
WINDOW = 2
MAX_WORDS = 1024

OK = 0
REFUSED = 1

HELLO = struct.Struct(f"<8s{NONCE_BYTES}s")
REQUEST = struct.Struct("<II")
REPLY = struct.Struct("<IIQ")
RANGE = struct.Struct("<QQ")
MAX_REQUEST_BYTES = REQUEST.size + MAX_RANGES * RANGE.size


class ProtocolError(Exception):
    """The peer sent what nobody may send."""


@dataclass(frozen=True, slots=True)
class Request:
    """Ranges that a sink asks for."""

    request_id: int
    ranges: tuple[tuple[int, int], ...]
    """(offset, length) of each."""
    nbytes: int
    """Of all together."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The head of an answer."""

    request_id: int
    status: int
    length: int


def pack_request(request_id: int, ranges: Sequence[tuple[int, int]]) -> bytes:
    """A request for (offset, length) ranges."""
    flat = [number for pair in ranges for number in pair]
    return REQUEST.pack(request_id, len(ranges)) + struct.pack(f"<{len(flat)}Q", *flat)


def take_request(inbox: bytearray, data_bytes: int) -> Request | None:
    """Takes the first request out of what has come; None if it is not whole yet.

    Raises ProtocolError if it has too many ranges or none, or if they leave the data or are too
    long.
    """
    if len(inbox) < REQUEST.size:
        return None
    request_id, count = REQUEST.unpack_from(inbox)
    if not 0 < count <= MAX_RANGES:
        raise ProtocolError(f"a request of {count} ranges; 1 to {MAX_RANGES} are allowed")
    end = REQUEST.size + count * RANGE.size
    if len(inbox) < end:
        return None
    ranges = tuple(RANGE.iter_unpack(inbox[REQUEST.size : end]))
    del inbox[:end]
    for offset, length in ranges:
        if offset + length > data_bytes:
            raise ProtocolError(f"range {offset}+{length} leaves the {data_bytes} bytes there are")
    request = Request(request_id, ranges, sum(length for _, length in ranges))
    if request.nbytes > MAX_BYTES:
        raise ProtocolError(f"a request of more than {MAX_BYTES} bytes")
    return request


def unpack_reply(raw: bytes | bytearray) -> Reply:
    """The head of a reply."""
    return Reply(*REPLY.unpack(raw))
