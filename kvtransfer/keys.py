"""Content addresses: the chained hash of every token up to the end of a block.

    key[-1] = salt(model, layout, tenant, adapter)
    key[i]  = BLAKE2b-128(key[i - 1], tokens of block i as little-endian uint32)

Equal keys mean the same tokens from the start of the sequence, computed by the same model into the
same layout, for the same tenant: such blocks are interchangeable. The hash is a cryptographic one
because keys decide whose KV a request may reuse; a tenant must not be able to construct another's.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence

import numpy as np

KEY_BYTES = 16

_TOKEN_BYTES = 4
# Copied for every block: that costs less than to set it up anew.
_EMPTY = hashlib.blake2b(digest_size=KEY_BYTES, person=b"tandem-kv-block")
_SALT_PERSON = b"tandem-kv-salt"


def salt(model: str, kv_layout: str, tenant: str = "", adapter: str = "") -> bytes:
    """16 bytes that keys of one model, KvLayout.fingerprint, tenant and LoRA adapter start from."""
    h = hashlib.blake2b(digest_size=KEY_BYTES, person=_SALT_PERSON)
    for field in (model, kv_layout, tenant, adapter):
        raw = field.encode()
        # The length goes first, so that no two tuples of fields run together to the same bytes.
        h.update(len(raw).to_bytes(8, "little"))
        h.update(raw)
    return h.digest()


def block_keys(
    tokens: Sequence[int], block_tokens: int, salt: bytes, *, partial: bool = False
) -> list[bytes]:
    """Keys, 16 bytes each, of the full blocks of a sequence.

    With `partial` an incomplete last block has a key too. It is one that no full block can have,
    since the count of tokens is part of what is hashed. Raises OverflowError for a token id
    outside 0..2**32-1.
    """
    keys, previous = _chain(salt, _raw(tokens), block_tokens * _TOKEN_BYTES)
    rest = len(tokens) % block_tokens
    if partial and rest:
        keys.append(_key(previous, _raw(tokens[-rest:])))
    return keys


class KeyChain:
    """Keys of a sequence that grows."""

    __slots__ = ("_block_bytes", "_pending", "_salt", "keys")

    def __init__(self, salt: bytes, block_tokens: int) -> None:
        self._salt = salt
        self._block_bytes = block_tokens * _TOKEN_BYTES
        self._pending = b""
        self.keys: list[bytes] = []
        """Keys of all full blocks so far."""

    def extend(self, tokens: Sequence[int]) -> list[bytes]:
        """Adds tokens; returns the keys of the blocks that they completed."""
        raw = self._pending + _raw(tokens)
        new, _ = _chain(self._last, raw, self._block_bytes)
        self._pending = raw[len(new) * self._block_bytes :]
        self.keys += new
        return new

    def partial_key(self) -> bytes | None:
        """Key of the incomplete last block, None if there is none."""
        return _key(self._last, self._pending) if self._pending else None

    @property
    def _last(self) -> bytes:
        return self.keys[-1] if self.keys else self._salt


def _chain(previous: bytes, raw: bytes, block_bytes: int) -> tuple[list[bytes], bytes]:
    keys = []
    for start in range(0, len(raw) - block_bytes + 1, block_bytes):
        previous = _key(previous, raw[start : start + block_bytes])
        keys.append(previous)
    return keys, previous


def _key(previous: bytes, raw: bytes) -> bytes:
    h = _EMPTY.copy()
    h.update(previous + raw)
    return h.digest()


def _raw(tokens: Sequence[int]) -> bytes:
    if isinstance(tokens, np.ndarray):
        tokens = tokens.tolist()
    packed = array("I", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
