"""The messages of the UCX transport. Bytes to values and back; no UCX.

All integers are little-endian. A sink says hello in a message to the source's worker; what follows
goes through the stream between two endpoints, one at either side:

    hello     magic, nonce of the ticket, u32 length and that many bytes of the sink's address
    reply     to a hello or a request: 256 bytes, words for a person that say why not; no words
              mean welcome, or that the ranges asked for follow, one after the other
    request   u32 count, and as often as it says u64 offset, u64 length; MAX_RANGES have room

A request names at most MAX_RANGES ranges of together MAX_BYTES. After words nothing more comes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvtransfer.memory import NONCE_BYTES

HELLO_TAG = 0x544E444D4B565558
"""The one message that is no part of a stream is known by this."""
MAX_RANGES = 256
MAX_BYTES = 8 * 2**20
MAX_ADDRESS = 4096

_MAGIC = b"TNDMUCX\x01"
_HELLO = struct.Struct(f"<8s{NONCE_BYTES}sI")
_REQUEST = struct.Struct("<I")
_RANGE_BYTES = 16

HELLO_BYTES = _HELLO.size + MAX_ADDRESS
REQUEST_BYTES = _REQUEST.size + MAX_RANGES * _RANGE_BYTES
REPLY_BYTES = 256


class ProtocolError(Exception):
    """The peer sent what nobody may send."""


@dataclass(frozen=True, slots=True)
class Hello:
    """Who wants to read, and where the sink is."""

    nonce: bytes
    address: bytes


def pack_hello(hello: Hello) -> bytes:
    """Raises ValueError if the address is too long."""
    if len(hello.address) > MAX_ADDRESS:
        raise ValueError(f"an address of {len(hello.address)} bytes; {MAX_ADDRESS} have room")
    return _HELLO.pack(_MAGIC, hello.nonce, len(hello.address)) + hello.address


def unpack_hello(raw: bytes) -> Hello:
    """Raises ProtocolError. Bytes after its end are not looked at."""
    magic, nonce, size = _HELLO.unpack_from(raw)
    if magic != _MAGIC or not 0 < size <= len(raw) - _HELLO.size:
        raise ProtocolError("not a hello")
    return Hello(nonce, raw[_HELLO.size : _HELLO.size + size])


def pack_request(ranges: Sequence[tuple[int, int]]) -> bytes:
    """REQUEST_BYTES for (offset, length) ranges."""
    table = np.array(ranges, "<u8").tobytes()
    return (_REQUEST.pack(len(ranges)) + table).ljust(REQUEST_BYTES, b"\0")


def unpack_request(raw: bytes, data_bytes: int) -> list[tuple[int, int]]:
    """(offset, length) of each. Raises ProtocolError if they leave the data or are too long."""
    (count,) = _REQUEST.unpack_from(raw)
    if not 0 < count <= MAX_RANGES:
        raise ProtocolError(f"a request of {count} ranges; 1 to {MAX_RANGES} are allowed")
    table = np.frombuffer(raw, "<u8", 2 * count, _REQUEST.size).reshape(-1, 2)
    ranges = [(int(offset), int(length)) for offset, length in table]
    for offset, length in ranges:
        if not length or offset + length > data_bytes:
            raise ProtocolError(f"range {offset}+{length} is not in the {data_bytes} bytes there")
    if sum(length for _, length in ranges) > MAX_BYTES:
        raise ProtocolError(f"a request of more than {MAX_BYTES} bytes")
    return ranges


def pack_reply(words: str) -> bytes:
    """Words that are too long are cut."""
    return words.encode()[:REPLY_BYTES].ljust(REPLY_BYTES, b"\0")


def unpack_reply(raw: bytes) -> str:
    """The words."""
    return raw.rstrip(b"\0").decode(errors="replace")
