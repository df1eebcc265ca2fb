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

import numpy as np

MAGIC = b"TNDMKV\x00\x01"
NONCE_BYTES = 16
MAX_RANGES = 256
MAX_BYTES = 4 * 2**20
WINDOW = 2
MAX_WORDS = 1024

OK = 0
REFUSED = 1

HELLO = struct.Struct(f"<8s{NONCE_BYTES}s")
REQUEST = struct.Struct("<II")
REPLY = struct.Struct("<IIQ")
RANGE_BYTES = 16


class ProtocolError(Exception):
    """The peer sent what nobody may send."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The head of an answer."""

    request_id: int
    status: int
    length: int


def pack_request(request_id: int, ranges: Sequence[tuple[int, int]]) -> bytes:
    """A request for (offset, length) ranges."""
    return REQUEST.pack(request_id, len(ranges)) + np.array(ranges, "<u8").tobytes()


def unpack_request_head(raw: bytes) -> tuple[int, int]:
    """Id and count of ranges. Raises ProtocolError if there are too many, or none."""
    request_id, count = REQUEST.unpack(raw)
    if not 0 < count <= MAX_RANGES:
        raise ProtocolError(f"a request of {count} ranges; 1 to {MAX_RANGES} are allowed")
    return request_id, count


def unpack_ranges(raw: bytes, data_bytes: int) -> list[tuple[int, int]]:
    """(offset, length) of each. Raises ProtocolError if they leave the data or are too long."""
    ranges = [(int(o), int(n)) for o, n in np.frombuffer(raw, "<u8").reshape(-1, 2)]
    for offset, length in ranges:
        if offset + length > data_bytes:
            raise ProtocolError(f"range {offset}+{length} leaves the {data_bytes} bytes there are")
    if sum(length for _, length in ranges) > MAX_BYTES:
        raise ProtocolError(f"a request of more than {MAX_BYTES} bytes")
    return ranges


def unpack_reply(raw: bytes) -> Reply:
    """The head of a reply."""
    return Reply(*REPLY.unpack(raw))
