"""The index's table against a dict: growth, collisions within rows, batches with repeats."""

from __future__ import annotations

import random

import numpy as np
import pytest

from services.coordinator.core import table as table_module
from services.coordinator.core.packed import PackedKeys
from services.coordinator.core.table import ROW_PLACES, KeyTable, tag_of, tags_of


def put(table: KeyTable, keys: list[bytes], number: int) -> None:
    if len(set(keys)) == 1:
        while (one := table.place(keys[0])) < 0 and (one := table.claim_one(keys[0])) < 0:
            table.grow()
        table.set_one(one, number)
        return
    while (at := table.claim(tags_of(keys))) is None:
        table.grow()
    table.set(at, number)


@pytest.mark.parametrize("largest", [1, 40, 3000])
def test_equals_a_dict(largest):
    draw = random.Random(largest)
    table, truth = KeyTable(), {}
    for step in range(300):
        count = draw.randint(1, largest)
        keys = [draw.randrange(20 * largest).to_bytes(16, "big") for _ in range(count)]
        if draw.random() < 0.7:
            put(table, keys, step + 1)
            truth |= dict.fromkeys(keys, step + 1)
        elif count == 1:
            at = table.place(keys[0])
            assert (at >= 0) == (keys[0] in truth)
            if at >= 0:
                table.set_one(at, 0)
                del truth[keys[0]]
        else:
            found = table.find(tags_of(keys))
            assert len(found) == len(truth.keys() & set(keys))
            table.set(found, 0)
            for key in keys:
                truth.pop(key, None)
        assert np.count_nonzero(table.numbers) == len(truth)
    table.check_integrity()
    for number in range(20 * largest):
        key = number.to_bytes(16, "big")
        assert table.get(key) == truth.get(key, 0)


def test_numbers_of_their_own():
    table, keys = KeyTable(), [bytes([i]) * 16 for i in range(ROW_PLACES)]
    at = table.claim(tags_of(keys))
    numbers = np.arange(ROW_PLACES, dtype=np.uint32)
    table.set(at, numbers)
    assert sorted(map(table.get, keys)) == numbers.tolist()
    table.check_integrity()  # the one that got 0 has no place
    assert np.count_nonzero(table.numbers) == ROW_PLACES - 1


def test_tags_are_distinct_and_never_zero():
    keys = [random.Random(i % 7).randbytes(16) for i in range(20)] + [bytes(16)]
    assert tags_of(keys).tolist() == sorted({tag_of(key) for key in keys})
    assert tags_of(PackedKeys(b"".join(keys))).tolist() == tags_of(keys).tolist()
    assert len(tags_of([])) == 0
    opposite = (1).to_bytes(8, "little") + b"\xff" * 8
    assert tag_of(bytes(16)) == tag_of(opposite) == 1


def test_a_full_row_spills_until_that_is_full_too():
    table = KeyTable()
    places = len(table)
    keys = [i.to_bytes(16, "big") for i in range(places + 1)]
    assert places > ROW_PLACES, "a row and spare places"
    put(table, keys[:places], 7)
    assert len(table) == places
    table.check_integrity()
    assert table.claim(tags_of(keys[:3])) is not None, "those that are here have their places"
    assert table.claim(tags_of(keys[places:])) is None
    table.check_integrity()
    # A row that has room again still knows what it spilled.
    inside = [k for k in keys[:places] if tag_of(k) not in table._spilled]
    table.set(table.find(tags_of(inside[:2])), 0)
    put(table, keys[2:places], 9)
    assert len(table) == places
    table.check_integrity()
    put(table, keys, 8)
    assert len(table) > places
    assert [table.get(key) for key in keys] == [8] * len(keys)
    table.check_integrity()


def test_spilled_keys_leave_and_come_back():
    draw = random.Random(4)
    table, keys = KeyTable(), [draw.randbytes(16) for _ in range(9000)]
    for first in range(0, len(keys), 50):
        put(table, keys[first : first + 50], 1)
    spilled = [key for key in keys if tag_of(key) in table._spilled]
    assert len(spilled) > 20
    table.set(table.find(tags_of(spilled)), 0)
    table.check_integrity()
    assert not table._spilled
    assert not any(map(table.get, spilled))
    put(table, spilled, 2)
    assert all(table.get(key) == 2 for key in spilled)
    table.check_integrity()


def test_the_table_grows_slice_by_slice(monkeypatch):
    monkeypatch.setattr(table_module, "_ROWS_AT_ONCE", 3)
    draw = random.Random(1)
    table, keys = KeyTable(), [draw.randbytes(16) for _ in range(20_000)]
    for first in range(0, len(keys), 100):
        put(table, keys[first : first + 100], 1 + first // 100)
    table.check_integrity()
    assert [table.get(key) for key in keys] == [1 + i // 100 for i in range(20_000)]
    assert 0.3 < len(keys) / len(table) < 0.75


def test_bytes_that_look_like_a_tag_between_two_are_not_one(monkeypatch):
    table = KeyTable()
    at = table.claim(np.array([0x0101010101010101, 0x0101010101010102], np.int64))
    table.set(at, np.array([3, 4], np.uint32))
    straddled = 0x0201010101010101  # the end of the first and the start of the second
    monkeypatch.setattr(table_module, "tag_of", lambda _key: straddled)
    assert table._bytes.find(straddled.to_bytes(8, "little")) % 8
    assert table.get(b"") == 0
    table.set(table.claim(np.array([straddled], np.int64)), 9)
    assert table.get(b"") == 9
