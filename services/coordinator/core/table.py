"""A hash table from keys to small numbers, for millions of keys: 12 bytes a place, no objects.

A key is known by its tag, 64 bits made of it; two keys of one tag are one key here. The tag's
upper bits name a row of 8 places, one cache line, in any of which it may be. A key whose row is
full goes to one of the spare places behind all rows, which a dict knows. When these are used up the
table doubles: row r becomes rows 2r and 2r + 1, and nothing moves within a row, so that this is a
copy and no hashing. So between a third and two thirds of the places are in use, and few keys are
spilled. A batch of keys is looked for at once; a single one by a search through its row's bytes.

A tag is the sum of a key's halves times an odd number that each process draws for itself
(multiplicative hashing: Dietzfelbinger et al., 1997). So nobody can aim at a row.
"""

from __future__ import annotations

from collections.abc import Collection
from struct import Struct

import numpy as np
from numpy.typing import NDArray

from services.coordinator.core.packed import PackedKeys

ROW_PLACES = 8

_TAG_BYTES = 8
_ROW_BYTES = ROW_PLACES * _TAG_BYTES
_ROWS_FOR_A_SPARE = 4
_ROWS_AT_ONCE = 4096
"""Rows copied at once when the table grows: what stays in a core's cache."""

_raw = Struct("=q").pack
_halves = Struct("=QQ").unpack

_FACTOR = hash(b"rows of a key table") & 2**64 - 1 | 1
"""Python draws the key of its hash when a process starts."""
_SIGN = 1 << 63

Tags = NDArray[np.int64]
Places = NDArray[np.int64]


def tags_of(keys: Collection[bytes]) -> Tags:
    """The distinct tags of keys, in order."""
    raw = keys.raw if isinstance(keys, PackedKeys) else b"".join(keys)
    words = np.frombuffer(raw, np.uint64)
    made = words[::2] + words[1::2]
    made *= np.uint64(_FACTOR)
    made[made == 0] = 1  # 0 stands for no key.
    tags = made.view(np.int64)
    tags.sort()
    twice = tags[1:] == tags[:-1]
    return np.delete(tags, np.flatnonzero(twice)) if twice.any() else tags


def tag_of(key: bytes) -> int:
    """The tag of one key."""
    low, high = _halves(key)
    made: int = (low + high) * _FACTOR & 2**64 - 1 or 1
    return (made ^ _SIGN) - _SIGN


class KeyTable:
    """Key -> number, 1 to 2**32 - 1; 0 for keys that are not here."""

    def __init__(self) -> None:
        self._resize(1)

    def __len__(self) -> int:
        """Places, in use or not."""
        return len(self.numbers)

    def get(self, key: bytes) -> int:
        """The number of one key."""
        at = self.place(key)
        return self._number[at] if at >= 0 else 0

    def place(self, key: bytes) -> int:
        """The place of one key; -1: it is not here."""
        tag = tag_of(key)
        at = self._place_in_row(tag, tag)
        return at if at >= 0 or tag not in self._spilled else self._spilled[tag]

    def claim_one(self, key: bytes) -> int:
        """As claim(), for a key that is not here. -1 if there is no room."""
        tag = tag_of(key)
        at = self._place_in_row(tag, 0)
        if at < 0:
            return self._spill(tag) if self._spare else -1
        self._tags[at] = tag
        return at

    def set_one(self, place: int, number: int) -> None:
        """As set()."""
        self._number[place] = number
        if number:
            return
        if place < self._rows.size:
            self._tags[place] = 0
        else:
            self._free(np.array([place]))

    def find(self, tags: Tags) -> Places:
        """The places of those of the tags that are here."""
        at, missing = self._search(tags, self._rows_of(tags))
        return np.delete(at, missing) if len(missing) else at

    def claim(self, tags: Tags) -> Places | None:
        """A place for each tag: its own, or else a free one, which has number 0.

        All are to be given numbers at once. None if there is no room: grow(), and claim again.
        """
        rows = self._rows_of(tags)
        at, new = self._search(tags, rows)
        while len(new):
            wanted = tags[new]
            free = self._first(rows[new], 0)
            full = self._tags[free] != 0
            if full.any():
                for i in new[full].tolist():
                    if not self._spare:
                        return None
                    at[i] = self._spill(int(tags[i]))
                new, wanted, free = new[~full], wanted[~full], free[~full]
            # Of several that want one place the last gets it.
            self._tags[free] = wanted
            at[new] = free
            new = new[self._tags[free] != wanted]
        return at

    def set(self, places: Places, numbers: NDArray[np.uint32] | int) -> None:
        """Gives numbers to places; 0 frees them."""
        self.numbers[places] = numbers
        if not isinstance(numbers, int):
            self._free(places[numbers == 0])
        elif not numbers:
            self._free(places)

    def grow(self) -> None:
        """Doubles the table."""
        rows, numbers, spilled = self._rows, self.numbers, self._spilled
        self._resize(2 * len(rows))
        places = numbers[: rows.size].reshape(rows.shape)
        for old, new in ((rows, self._rows), (places, self.numbers[: 2 * rows.size])):
            halves = new.reshape(len(rows), 2, ROW_PLACES)
            for first in range(0, len(rows), _ROWS_AT_ONCE):
                some = slice(first, first + _ROWS_AT_ONCE)
                odd = rows[some] >> self._shift & 1
                np.multiply(old[some], odd, out=halves[some, 1], casting="unsafe")
                np.subtract(old[some], halves[some, 1], out=halves[some, 0])
        if spilled:
            tags = np.array(sorted(spilled), np.int64)
            while (at := self.claim(tags)) is None:
                self.grow()
            self.set(at, numbers[[spilled[tag] for tag in tags.tolist()]])

    def check_integrity(self) -> None:
        """Every key is in its row or spilled, once, and has a number. Raises AssertionError."""
        held = np.flatnonzero(self._tags)
        tags, rows = self._tags[held], self._rows_of(self._tags[held])
        assert np.array_equal(held, np.flatnonzero(self.numbers)), "a key without a number"
        assert len(np.unique(tags)) == len(tags), "a key has two places"
        inside = held < self._rows.size
        assert np.array_equal(held[inside] // ROW_PLACES, rows[inside]), "a wrong row"
        spilled = dict(zip(tags[~inside].tolist(), held[~inside].tolist(), strict=True))
        assert spilled == self._spilled, "a spilled key that is not known"
        assert np.array_equal(
            np.bincount(rows[~inside], minlength=len(self._rows)), self._spills
        ), "rows do not know what they spilled"
        every = set(range(self._rows.size, len(self)))
        assert {*self._spare, *spilled.values()} == every, "a spare place is lost"
        assert len(self._spare) + len(spilled) == len(every), "a spare place is there twice"

    def _rows_of(self, tags: Tags) -> NDArray[np.int64]:
        rows: NDArray[np.int64] = tags >> self._shift & self._mask
        return rows

    def _place_in_row(self, tag: int, wanted: int) -> int:
        """The first place with what is wanted in the row of a tag; -1: none has it."""
        raw, start = _raw(wanted), (tag >> self._shift & self._mask) * _ROW_BYTES
        end = start + _ROW_BYTES
        at = self._bytes.find(raw, start, end)
        while at & 7 and at > 0:  # the end of one tag and the start of the next
            at = self._bytes.find(raw, at + 1, end)
        return at >> 3

    def _first(self, rows: NDArray[np.int64], wanted: Tags | int) -> Places:
        """The first place with what is wanted in each row; any place of it if none has."""
        places: Places = rows * ROW_PLACES + (self._rows.take(rows, 0) == wanted).argmax(1)
        return places

    def _search(self, tags: Tags, rows: NDArray[np.int64]) -> tuple[Places, NDArray[np.int64]]:
        """Places, and which of the tags are not here: their places are of no meaning."""
        at = self._first(rows, tags[:, None])
        missing = np.flatnonzero(self._tags[at] != tags)
        if self._spilled and len(missing):
            over = missing[self._spills[rows[missing]] > 0]
            if len(over):
                for i in over.tolist():
                    at[i] = self._spilled.get(int(tags[i]), at[i])
                missing = missing[self._tags[at[missing]] != tags[missing]]
        return at, missing

    def _spill(self, tag: int) -> int:
        """Gives a tag a spare place; there is one."""
        self._spills[tag >> self._shift & self._mask] += 1
        self._spilled[tag] = place = self._spare.pop()
        self._tags[place] = tag
        return place

    def _free(self, places: Places) -> None:
        for place in places[places >= self._rows.size].tolist():
            tag = int(self._tags[place])
            self._spills[tag >> self._shift & self._mask] -= 1
            del self._spilled[tag]
            self._spare.append(place)
        self._tags[places] = 0

    def _resize(self, rows: int) -> None:
        places = rows * ROW_PLACES
        spare = -(-rows // _ROWS_FOR_A_SPARE)
        self._mask, self._shift = rows - 1, 64 - (rows.bit_length() - 1 or 1)
        self._bytes = bytearray((places + spare) * _TAG_BYTES)
        # The same memory for batches.
        self._tags: Tags = np.frombuffer(self._bytes, np.int64)
        self._rows = self._tags[:places].reshape(rows, ROW_PLACES)
        self.numbers: NDArray[np.uint32] = np.zeros(places + spare, np.uint32)
        """Of each place, for reading."""
        self._number = self.numbers.data
        self._spilled: dict[int, int] = {}
        """Place of each tag that is not in its row."""
        self._spills = np.zeros(rows, np.int16)
        """How many of each row."""
        self._spare = list(range(places, places + spare))
