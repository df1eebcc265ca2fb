"""A hash table from keys to small numbers, for millions of keys: 12 bytes a place, no objects.

Key and place: a key is known by its tag, 64 bits of its hash; two keys of one tag are one key here.
The tag's upper bits name a row of 64 places, anywhere in which it may be. A row that is full
doubles the table: row r becomes rows 2r and 2r + 1, and nothing moves within a row, so that this
is a copy and no hashing. So between a third and two thirds of the places are in use. A batch of
keys is looked for at once; a single one by a search through its row's bytes.

Rows are named by Python's keyed hash, so nobody can aim at one.
"""

from __future__ import annotations

from collections.abc import Collection
from struct import Struct

import numpy as np
from numpy.typing import NDArray

ROW_PLACES = 64

_TAG_BYTES = 8
_ROW_BYTES = ROW_PLACES * _TAG_BYTES
_ROWS_AT_ONCE = 512
"""Rows copied at once when the table grows: what stays in a core's cache."""

_raw = Struct("=q").pack

Tags = NDArray[np.int64]
Places = NDArray[np.int64]


def tags_of(keys: Collection[bytes]) -> Tags:
    """The distinct tags of keys, in order."""
    tags = np.fromiter(map(hash, keys), np.int64, len(keys))
    # A hash is never -1, so its complement is never 0, which stands for no key.
    np.invert(tags, tags)
    tags.sort()
    twice = tags[1:] == tags[:-1]
    return np.delete(tags, np.flatnonzero(twice)) if twice.any() else tags


class KeyTable:
    """Key -> number, 1 to 2**32 - 1; 0 for keys that are not here."""

    def __init__(self) -> None:
        self._resize(1)

    def __len__(self) -> int:
        """Places, in use or not."""
        return len(self.numbers)

    def get(self, key: bytes) -> int:
        """The number of one key."""
        tag = ~hash(key)
        start = (tag >> self._shift & self._mask) * _ROW_BYTES
        raw, end = _raw(tag), start + _ROW_BYTES
        at = self._bytes.find(raw, start, end)
        while at > 0 and at & 7:  # the end of one tag and the start of the next
            at = self._bytes.find(raw, at + 1, end)
        return self._number[at >> 3] if at >= 0 else 0

    def find(self, tags: Tags) -> Places:
        """The places of those of the tags that are here."""
        at = self._search(tags, tags)
        here: Places = at[self._tags[at] == tags]
        return here

    def claim(self, tags: Tags) -> Places | None:
        """A place for each tag: its own, or else a free one, which has number 0.

        All are to be given numbers at once. None if a row is full: grow(), and claim again.
        """
        at = self._search(tags, tags)
        new = np.flatnonzero(self._tags[at] != tags)
        while len(new):
            wanted = tags[new]
            free = self._search(wanted, np.zeros_like(wanted))
            if self._tags[free].any():
                return None
            # Of several that want one place the last gets it.
            self._tags[free] = wanted
            at[new] = free
            new = new[self._tags[free] != wanted]
        return at

    def set(self, places: Places, numbers: NDArray[np.uint32] | int) -> None:
        """Gives numbers to places; 0 frees them."""
        self.numbers[places] = numbers
        if not isinstance(numbers, int):
            self._tags[places[numbers == 0]] = 0
        elif not numbers:
            self._tags[places] = 0

    def grow(self) -> None:
        """Doubles the table."""
        tags, numbers = self._rows, self.numbers.reshape(-1, ROW_PLACES)
        rows = len(tags)
        self._resize(2 * rows)
        new_tags = self._rows.reshape(rows, 2, ROW_PLACES)
        new_numbers = self.numbers.reshape(rows, 2, ROW_PLACES)
        for first in range(0, rows, _ROWS_AT_ONCE):
            some = slice(first, first + _ROWS_AT_ONCE)
            odd = tags[some] >> self._shift & 1
            for old, new in ((tags, new_tags), (numbers, new_numbers)):
                np.multiply(old[some], odd, out=new[some, 1], casting="unsafe")
                np.subtract(old[some], new[some, 1], out=new[some, 0])

    def check_integrity(self) -> None:
        """Every key is in its row, once, and has a number. Raises AssertionError."""
        held = np.flatnonzero(self._tags)
        tags = self._tags[held]
        assert np.array_equal(held, np.flatnonzero(self.numbers)), "a key without a number"
        assert np.array_equal(held // ROW_PLACES, tags >> self._shift & self._mask), "a wrong row"
        assert len(np.unique(tags)) == len(tags), "a key has two places"

    def _search(self, tags: Tags, wanted: Tags) -> Places:
        """The first place with what is wanted in each tag's row; any place of it if none has."""
        rows = tags >> self._shift & self._mask
        slots = (self._rows.take(rows, 0) == wanted[:, None]).argmax(1)
        places: Places = rows * ROW_PLACES + slots
        return places

    def _resize(self, rows: int) -> None:
        self._mask, self._shift = rows - 1, 64 - (rows.bit_length() - 1 or 1)
        self._bytes = bytearray(rows * _ROW_BYTES)
        self._tags: Tags = np.frombuffer(self._bytes, np.int64)
        self._rows = self._tags.reshape(rows, ROW_PLACES)
        self.numbers: NDArray[np.uint32] = np.zeros(rows * ROW_PLACES, np.uint32)
        """Of each place, for reading."""
        self._number = self.numbers.data
