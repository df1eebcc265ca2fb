import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.keys import KEY_BYTES, KeyChain, block_keys, salt

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=70)
SALT = salt("m", "l")


def test_key_is_the_documented_hash():
    first = hashlib.blake2b(
        SALT + struct.pack("<2I", 7, 2**32 - 1), digest_size=16, person=b"tandem-kv-block"
    ).digest()
    second = hashlib.blake2b(
        first + struct.pack("<2I", 0, 5), digest_size=16, person=b"tandem-kv-block"
    ).digest()
    assert block_keys([7, 2**32 - 1, 0, 5], 2, SALT) == [first, second]


@given(TOKENS, st.integers(1, 9), st.booleans())
def test_number_of_keys(tokens, size, partial):
    keys = block_keys(tokens, size, SALT, partial=partial)
    assert len(keys) == len(tokens) // size + (partial and len(tokens) % size > 0)
    assert len(set(keys)) == len(keys)
    assert all(len(k) == KEY_BYTES for k in keys)


@given(TOKENS, st.integers(1, 9), st.integers(0, 2**31))
def test_a_key_covers_everything_before_it(tokens, size, position):
    keys = block_keys(tokens, size, SALT)
    if not tokens:
        return
    position %= len(tokens)
    changed = [*tokens]
    changed[position] ^= 1
    others = block_keys(changed, size, SALT)
    same = position // size
    assert keys[:same] == others[:same]
    assert not set(keys[same:]) & set(others[same:])


@given(st.lists(TOKENS, max_size=6), st.integers(1, 9))
def test_a_chain_that_grows_equals_the_whole(parts, size):
    chain = KeyChain(SALT, size)
    new = [key for part in parts for key in chain.extend(part)]
    whole = [t for part in parts for t in part]
    assert new == chain.keys == block_keys(whole, size, SALT)
    with_partial = block_keys(whole, size, SALT, partial=True)
    partial = chain.partial_key()
    assert chain.keys + ([partial] if partial else []) == with_partial


def test_partial_key_is_no_full_block_key():
    assert block_keys([1, 2, 3], 4, SALT, partial=True) != block_keys([1, 2, 3, 0], 4, SALT)


@given(st.lists(st.text(max_size=4), min_size=4, max_size=4))
def test_salt_separates_fields(fields):
    assert salt(*fields) == salt(*fields)
    moved = [fields[0] + fields[1], "", *fields[2:]]
    if moved != fields:
        assert salt(*fields) != salt(*moved)


def test_any_kind_of_token_sequence():
    tokens = list(range(10))
    expected = block_keys(tokens, 4, SALT)
    for kind in (tuple(tokens), np.arange(10, dtype=np.int64), np.arange(10, dtype=np.int32)):
        assert block_keys(kind, 4, SALT) == expected


@pytest.mark.parametrize("token", [-1, 2**32])
def test_token_out_of_range(token):
    with pytest.raises(OverflowError):
        block_keys([token], 1, SALT)
