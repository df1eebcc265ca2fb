"""A disk tier's folder: what it looks like, and what is left of it after every kind of end."""

import importlib.util
import logging
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.errors import TierUnusableError
from kvtransfer.tiers import disk
from kvtransfer.tiers.base import Label, Shape
from kvtransfer.tiers.disk import disk_tier
from kvtransfer.tiers.record import HEADER_BYTES, TENANT_BYTES, RecordFormat

_spec = importlib.util.spec_from_file_location(
    "disk_tier_writer", Path(__file__).with_name("disk_tier_writer.py")
)
writer = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(writer)

SHAPE = Shape("layout", (3000, 3000, 1000))
PLACE, RECORD = 8192, 512
KEYS = [bytes([i]) * 16 for i in range(20)]
DATA = {
    key: np.random.default_rng(key[0]).integers(0, 256, SHAPE.block_bytes, np.uint8) for key in KEYS
}
LABELS = {key: Label(key, "tenant", SHAPE.checksums(data)) for key, data in DATA.items()}


class Crash(BaseException):
    """The process ends here. Not an Exception: nothing may catch it and go on."""


def size(blocks):
    return HEADER_BYTES + blocks * (PLACE + RECORD)


def put(tier, *keys):
    for key in keys:
        assert tier.put(LABELS[key], DATA[key])


def readable(tier, data=DATA):
    """Keys that can be read; what is read is right."""
    found = set()
    for key in tier.keys():  # noqa: SIM118
        into = np.empty(len(data[key]), np.uint8)
        if tier.read(key, into) is not None:
            assert np.array_equal(into, data[key])
            found.add(key)
    tier.check_integrity()
    return found


@pytest.fixture
def filled(tmp_path):
    """A folder with four blocks, closed."""
    tier = disk_tier(SHAPE, tmp_path / "kv", size(4))
    put(tier, *KEYS[:4])
    tier.close()
    return tmp_path / "kv"


def reopened(folder, blocks=4, shape=SHAPE):
    return disk_tier(shape, folder, size(blocks))


# Starting again


def test_blocks_are_found_again_in_the_order_they_were_put(filled):
    tier = reopened(filled)
    assert readable(tier) == set(KEYS[:4])
    assert tier.find(KEYS[2]) == LABELS[KEYS[2]]
    tier.close()
    tier = reopened(filled)
    put(tier, KEYS[4])
    assert set(tier.keys()) == set(KEYS[1:5])
    tier.close()
    # The sequence goes on: what was put last is the last to go.
    tier = reopened(filled)
    put(tier, *KEYS[5:8])
    assert set(tier.keys()) == set(KEYS[4:8])
    tier.close()


def test_what_was_forgotten_stays_so(filled):
    tier = reopened(filled)
    tier.forget(KEYS[1])
    tier.close()
    tier = reopened(filled)
    assert readable(tier) == {KEYS[0], KEYS[2], KEYS[3]}
    tier.close()


@pytest.mark.parametrize("blocks", [1, 2, 9])
def test_another_capacity_keeps_what_fits(filled, blocks):
    tier = reopened(filled, blocks)
    assert readable(tier) == set(KEYS[: min(blocks, 4)])
    put(tier, *KEYS[8 : 8 + blocks])
    assert readable(tier) == set(KEYS[8 : 8 + blocks])
    files = sum(p.stat().st_size for p in filled.iterdir() if p.name != "lock")
    assert files == size(blocks)
    tier.close()
    tier = reopened(filled, 4)
    assert len(readable(tier)) == min(4, blocks)
    tier.close()


def test_the_space_is_taken_at_the_start(tmp_path):
    tier = disk_tier(SHAPE, tmp_path, size(50))
    taken = sum(p.stat().st_blocks * 512 for p in tmp_path.iterdir())
    assert taken >= size(50)
    tier.close()


def test_two_readers_and_one_buffer(filled):
    """The other takes it after it was seen to be there."""

    class TakenMeanwhile(list):
        def __bool__(self):
            return True

    tier = reopened(filled)
    tier._medium._buffers = TakenMeanwhile()
    assert readable(tier) == set(KEYS[:4])
    tier.close()


def test_one_process_a_folder(filled):
    tier = reopened(filled)
    with pytest.raises(TierUnusableError, match="in use by process") as raised:
        reopened(filled)
    assert raised.value.metadata["process"] == str(os.getpid())
    tier.close()
    reopened(filled).close()


@pytest.mark.parametrize(
    "shape",
    [
        Shape("other layout", SHAPE.pieces),
        Shape("layout", (3000, 4000)),
        Shape("layout", (3000, 3000, 1001)),
    ],
)
def test_blocks_of_another_layout_are_cleared(filled, caplog, shape):
    tier = reopened(filled, shape=shape)
    assert tier.keys() == []
    (record,) = (r for r in caplog.records if r.levelno == logging.WARNING)
    assert f"{filled} is cleared: its blocks are of layout layout, these are" in record.message
    tier.close()
    tier = reopened(filled)
    assert tier.keys() == []
    tier.close()


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda raw: raw[:8] + b"\x07\0\0\0" + raw[12:], "it is of version 7, this is version 1"),
        (lambda raw: b"somebody" + raw[8:], "it is not the index of a KV tier"),
        (lambda raw: raw[:100], "it is not the index of a KV tier"),
        (lambda raw: b"", "it is not the index of a KV tier"),
        (lambda raw: raw[:2000] + b"x" + raw[2001:], "its header is damaged"),
    ],
)
def test_an_index_that_is_not_ours_is_cleared(filled, caplog, harm, why):
    index = filled / "index"
    index.write_bytes(harm(index.read_bytes()))
    tier = reopened(filled)
    assert tier.keys() == []
    assert f"{filled} is cleared: {why}" in caplog.text
    put(tier, KEYS[0])
    assert readable(tier) == {KEYS[0]}
    tier.close()


@pytest.mark.parametrize("name", ["index", "data"])
def test_half_a_folder_is_cleared(filled, caplog, name):
    (filled / name).unlink()
    tier = reopened(filled)
    assert tier.keys() == []
    assert "is cleared" in caplog.text
    tier.close()


def test_a_folder_that_can_not_be(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(TierUnusableError, match="can't hold"):
            disk_tier(SHAPE, folder, size(4))


def test_a_disk_too_small_is_told_of_at_the_start(tmp_path, monkeypatch):
    def full(fd, at, count):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TierUnusableError, match="No space left on device"):
        disk_tier(SHAPE, tmp_path, size(4))
    monkeypatch.undo()
    disk_tier(SHAPE, tmp_path, size(4)).close()  # the lock was let go


def test_labels_that_no_record_has_room_for(tmp_path):
    tier = disk_tier(SHAPE, tmp_path, size(4))
    longest = Label(KEYS[0], "ä" * (TENANT_BYTES // 2), LABELS[KEYS[0]].checksums)
    assert tier.put(longest, DATA[KEYS[0]])
    assert not tier.put(
        Label(KEYS[1], "x" * (TENANT_BYTES + 1), LABELS[KEYS[1]].checksums), DATA[KEYS[1]]
    )
    assert not tier.put(Label(b"short", "", LABELS[KEYS[1]].checksums), DATA[KEYS[1]])
    tier.close()
    tier = disk_tier(SHAPE, tmp_path, size(4))
    assert tier.find(KEYS[0]) == longest
    tier.close()


# Records


labels = st.builds(
    Label,
    st.binary(min_size=16, max_size=16),
    st.text(max_size=60),
    st.binary(min_size=24, max_size=24),
)


@settings(derandomize=True)
@given(labels, st.integers(0, 2**64 - 1))
def test_records_say_what_was_written(label, sequence):
    form = RecordFormat(SHAPE)
    assert form.fits(label)
    raw = form.record(sequence, label)
    assert len(raw) == form.record_bytes
    assert form.read(raw) == (sequence, label)
    assert RecordFormat(Shape("another", SHAPE.pieces)).read(raw) is None


@settings(derandomize=True)
@given(labels, st.integers(0, RECORD * 8 - 1))
def test_one_bit_undoes_a_record(label, bit):
    form = RecordFormat(SHAPE)
    raw = bytearray(form.record(1, label))
    raw[bit // 8] ^= 1 << bit % 8
    assert form.read(bytes(raw)) is None


def test_nothing_is_no_record():
    assert RecordFormat(SHAPE).read(bytes(RECORD)) is None


# Ends


def test_bytes_of_every_region_flipped(filled):
    """Each region in turn: whatever is served is right, and other blocks are not touched."""
    chance = random.Random(1)
    files = {name: (filled / name).read_bytes() for name in ("index", "data")}
    places = [("data", at) for at in range(0, 4 * PLACE, 409)]
    places += [("index", at) for at in range(0, HEADER_BYTES, 97)]
    places += [("index", at) for at in range(HEADER_BYTES, HEADER_BYTES + 4 * RECORD, 13)]
    for name, at in places:
        for other, raw in files.items():
            (filled / other).write_bytes(raw)
        harmed = bytearray(files[name])
        harmed[at] ^= chance.randrange(1, 256)
        (filled / name).write_bytes(harmed)
        tier = reopened(filled)
        found = readable(tier)
        if name == "data":
            lost = set() if at % PLACE >= SHAPE.block_bytes else {KEYS[at // PLACE]}
            assert found == set(KEYS[:4]) - lost
            assert tier.stats().corrupt == len(lost)
        elif at >= HEADER_BYTES:
            assert found == set(KEYS[:4]) - {KEYS[(at - HEADER_BYTES) // RECORD]}
        else:
            assert found == set()
        tier.close()


@pytest.mark.parametrize("name", ["index", "data"])
def test_files_cut_short(filled, name):
    files = {name: (filled / name).read_bytes() for name in ("index", "data")}
    for length in range(0, len(files[name]), 613):
        for other, raw in files.items():
            (filled / other).write_bytes(raw)
        (filled / name).write_bytes(files[name][:length])
        tier = reopened(filled)
        found = readable(tier)
        if name == "data":
            whole = sum(i * PLACE + SHAPE.block_bytes <= length for i in range(4))
        else:
            whole = max(0, length - HEADER_BYTES) // RECORD
        assert found == set(KEYS[:whole])
        tier.close()


def test_a_file_that_shrinks_in_use_turns_the_tier_off(filled):
    tier = reopened(filled)
    os.truncate(filled / "data", PLACE + 10)
    assert tier.read(KEYS[0], np.empty(SHAPE.block_bytes, np.uint8))
    assert tier.read(KEYS[1], np.empty(SHAPE.block_bytes, np.uint8)) is None
    assert "shorter" in tier.stats().off
    tier.close()


@pytest.mark.parametrize("call", ["_read", "_write"])
def test_a_disk_that_does_not_answer_turns_the_tier_off(filled, monkeypatch, call):
    monkeypatch.setattr(disk, "ANSWER_SECONDS", 0.05)
    tier = reopened(filled)
    real, go_on, over = getattr(disk, call), threading.Event(), threading.Event()

    def hang(fd, raw, at):
        assert go_on.wait(30)
        real(fd, raw, at)
        over.set()

    monkeypatch.setattr(disk, call, hang)
    into = np.full(SHAPE.block_bytes, 9, np.uint8)
    if call == "_read":
        assert tier.read(KEYS[0], into) is None
    else:
        assert not tier.put(LABELS[KEYS[5]], DATA[KEYS[5]])
    assert tier.stats().off == "no answer in 0.05 s"
    assert tier.keys() == []
    tier.close()  # which waits for nothing
    with pytest.raises(TierUnusableError, match="in use"):
        reopened(filled)  # what hangs may still write
    go_on.set()
    assert over.wait(30)
    # By now the memory may be somebody else's.
    assert np.all(into == 9)


def test_a_crash_after_any_number_of_bytes(tmp_path, monkeypatch):
    """A put that evicts, stopped after each of its writes and in the middle of each."""
    real = disk._write

    def budgeted(budget):
        left = [budget]

        def write(fd, raw, at):
            part = memoryview(raw)[: left[0]]
            left[0] -= len(part)
            real(fd, part, at)
            if len(part) < len(raw) or left[0] == 0:
                raise Crash

        return write

    total = RECORD + SHAPE.block_bytes + RECORD
    for budget in [*range(1, total, 317), RECORD, RECORD + SHAPE.block_bytes, total]:
        folder = tmp_path / str(budget)
        tier = reopened(folder)
        put(tier, *KEYS[:4])
        monkeypatch.setattr(disk, "_write", budgeted(budget))
        with pytest.raises(Crash):
            put(tier, KEYS[4])
        monkeypatch.undo()
        tier._medium.close()
        tier = reopened(folder)
        # The victim goes with the first byte that is not what was there, the new one comes last.
        assert readable(tier) == set(KEYS[1:5] if budget == total else KEYS[1:4])
        assert tier.stats().corrupt == 0
        put(tier, KEYS[5])
        tier.close()


def test_power_is_lost_with_any_part_of_the_writes_on_the_disk(tmp_path, monkeypatch):
    """Writes reach the disk in sectors, any of them, in any order. Served is only what is right."""
    real, sectors = disk._write, []
    names = {}

    def write(fd, raw, at):
        name = names.setdefault(fd, Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        cuts = range(0, len(raw), 512)
        sectors.extend((name, at + cut, bytes(memoryview(raw)[cut:][:512])) for cut in cuts)
        real(fd, raw, at)

    folder = tmp_path / "kv"
    tier = reopened(folder)
    put(tier, *KEYS[:4])
    before = {name: (folder / name).read_bytes() for name in ("index", "data")}
    monkeypatch.setattr(disk, "_write", write)
    put(tier, *KEYS[4:10])
    tier.forget(KEYS[8])
    monkeypatch.undo()
    tier.close()
    dropped = served = 0
    for seed in range(300):
        chance = random.Random(seed)
        images = {name: bytearray(raw) for name, raw in before.items()}
        share = chance.choice([0.02, 0.5, 0.9, 0.99, 1.0])
        until = chance.randrange(len(sectors) + 1)
        for name, at, raw in sectors[:until]:
            if chance.random() < share:
                images[name][at : at + len(raw)] = raw
        for name, image in images.items():
            (folder / name).write_bytes(image)
        tier = reopened(folder)
        had = len(tier.keys())
        found = readable(tier)
        served, dropped = served + len(found), dropped + had - len(found)
        tier.close()
    # Both happened, or this test says nothing.
    assert served > 100
    assert dropped > 100


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_killed_while_writing(tmp_path):
    """A process that writes is killed at some point, again and again in the same folder."""
    data = {key: writer.data_of(key) for key in writer.KEYS}
    chance = random.Random(5)
    script = Path(writer.__file__)
    root = Path(disk.__file__).parents[2]
    for round_ in range(6):
        child = subprocess.Popen(
            [sys.executable, script, tmp_path / "kv", str(round_)],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": f"{root}:{root / 'protos/gen'}"},
        )
        for _ in range(chance.randrange(20, 120)):
            assert child.stdout.read(1) == b"."
        child.kill()
        child.wait()
        child.stdout.close()
        tier = writer.open_tier(tmp_path / "kv")
        held = len(tier.keys())
        assert len(readable(tier, data)) == held
        assert held, "killed or forgotten are a few, not all"
        # A killed process leaves a place empty or whole.
        assert tier.stats().corrupt == 0
        tier.close()
