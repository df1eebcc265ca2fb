"""The bytes of a disk tier's index: pure, what is written and what is believed of what is read.

A folder has two files. `data` is blocks and nothing else, each from a multiple of 4096 bytes on;
`index` is a file header of 4096 bytes, then a record of equal size for each block. All numbers
are little-endian.

    file header   magic, version, bytes of a record, bytes of a block's place, shape digest,
                  fingerprint in words (length, UTF-8), zeros, checksum
    record        magic, version, bytes of the tenant, shape digest, sequence number, key,
                  tenant (UTF-8), checksums of the block's pieces, zeros, checksum

The checksum at the end of each is XXH3-64 of all before it. A record that is all zeros is empty.
A record vouches for its block's bytes by the checksums of them, so neither may be torn unseen,
in whatever order they reached the disk.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import xxhash

from kvtransfer.keys import KEY_BYTES
from kvtransfer.tiers.base import Label, Shape

VERSION = 1
HEADER_BYTES = 4096
PLACE_ALIGNMENT = 4096
TENANT_BYTES = 256

_RECORD_ALIGNMENT = 512
_FILE_MAGIC = b"TANDEMKT"
_RECORD_MAGIC = b"TKVBLOCK"
_FILE = struct.Struct("<8sIIQ16sI")
_RECORD = struct.Struct(f"<8sHH16sQ{KEY_BYTES}s")
_CHECKSUM = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class RecordFormat:
    """Of the blocks of one shape."""

    shape: Shape

    @property
    def record_bytes(self) -> int:
        """Bytes of a record in the index."""
        size = _RECORD.size + TENANT_BYTES + 8 * len(self.shape.pieces) + _CHECKSUM.size
        return -(-size // _RECORD_ALIGNMENT) * _RECORD_ALIGNMENT

    @property
    def place_bytes(self) -> int:
        """Bytes of a block's place in the data, padding included."""
        return -(-self.shape.block_bytes // PLACE_ALIGNMENT) * PLACE_ALIGNMENT

    @property
    def digest(self) -> bytes:
        """16 bytes that differ where shapes do."""
        text = f"{self.shape.fingerprint}\n{self.shape.pieces}"
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    def fits(self, label: Label) -> bool:
        """Whether a record has room for what is known of a block."""
        return (
            len(label.key) == KEY_BYTES
            and len(label.tenant.encode()) <= TENANT_BYTES
            and len(label.checksums) == 8 * len(self.shape.pieces)
        )

    def header(self) -> bytes:
        """The first HEADER_BYTES of the index."""
        words = self.shape.fingerprint.encode()[:2048]
        head = _FILE.pack(
            _FILE_MAGIC, VERSION, self.record_bytes, self.place_bytes, self.digest, len(words)
        )
        return _sealed(head + words, HEADER_BYTES)

    def why_not(self, raw: bytes) -> str:
        """Why an index that begins like this can't be used; empty if it can."""
        if len(raw) < HEADER_BYTES or raw[:8] != _FILE_MAGIC:
            return "it is not the index of a KV tier"
        _, version, _, _, digest, words = _FILE.unpack_from(raw)
        if version != VERSION:
            return f"it is of version {version}, this is version {VERSION}"
        if not _whole(raw[:HEADER_BYTES]):
            return "its header is damaged"
        if digest != self.digest:
            other = raw[_FILE.size :][:words].decode(errors="replace")
            return f"its blocks are of layout {other}, these are of {self.shape.fingerprint}"
        return ""

    def record(self, sequence: int, label: Label) -> bytes:
        """A record, for a label that fits."""
        tenant = label.tenant.encode()
        head = _RECORD.pack(_RECORD_MAGIC, VERSION, len(tenant), self.digest, sequence, label.key)
        return _sealed(head + tenant + label.checksums, self.record_bytes)

    def read(self, raw: bytes) -> tuple[int, Label] | None:
        """Sequence number and label of a record; None if it is not a whole one of this shape."""
        if not _whole(raw):
            return None
        magic, version, tenant_bytes, digest, sequence, key = _RECORD.unpack_from(raw)
        if (magic, version, digest) != (_RECORD_MAGIC, VERSION, self.digest):
            return None
        at = _RECORD.size + tenant_bytes
        tenant = raw[_RECORD.size : at].decode()
        return sequence, Label(key, tenant, raw[at : at + 8 * len(self.shape.pieces)])


def _sealed(raw: bytes, size: int) -> bytes:
    body = raw.ljust(size - _CHECKSUM.size, b"\0")
    return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))


def _whole(raw: bytes) -> bool:
    body, seal = raw[: -_CHECKSUM.size], raw[-_CHECKSUM.size :]
    return _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body)) == seal
