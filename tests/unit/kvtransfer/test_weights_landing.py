"""A folder is put together from pieces: what counts, what is kept, what is never touched."""

from __future__ import annotations

import errno
import itertools
import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvtransfer.errors import WeightsDifferError
from kvtransfer.weights.describing import Digests, describe
from kvtransfer.weights.landing import FolderLanding
from kvtransfer.weights.manifest import SMALLEST_PIECE as SIZE

FILES = {
    "config.json": b'{"a": 1}',
    "empty.txt": b"",
    "model-1.safetensors": random.Random(1).randbytes(5 * SIZE + 7),
    "model-2.safetensors": random.Random(2).randbytes(3 * SIZE),
    "tokenizer.json": b"{}",
}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    return describe(folder, Digests(), piece_bytes=SIZE)


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


def data_of(manifest, number):
    piece = manifest.piece(number)
    data = FILES[manifest.files[piece.file].name]
    return memoryview(data)[piece.offset : piece.offset + piece.length]


def fill(landing, numbers):
    for number in numbers:
        assert landing.put(number, data_of(landing.manifest, number))


def read(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("seed", range(5))
def test_pieces_in_any_order_make_the_folder_and_config_json_comes_last(source, place, seed):
    landing = FolderLanding(place, source)
    missing = landing.survey()
    assert sorted(missing) == list(range(source.pieces))
    random.Random(seed).shuffle(missing)
    for number in missing:
        assert not (place / "config.json").exists()
        fill(landing, [number])
    assert landing.whole
    landing.close()
    assert read(place) == FILES


def test_several_threads_put_at_once(source, place):
    landing = FolderLanding(place, source)
    missing = landing.survey() * 2  # each piece from two peers
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda n: landing.put(n, data_of(source, n)), missing))
    assert landing.whole
    landing.close()
    assert read(place) == FILES


def test_wrong_bytes_are_not_written(source, place):
    landing = FolderLanding(place, source)
    number = landing.survey()[2]
    right = data_of(source, number)
    assert not landing.put(number, memoryview(bytes(len(right))))
    assert not landing.put(number, right[:-1])
    assert not landing.put(number, memoryview(bytes(right) + b"x"))
    landing.close()
    assert FolderLanding(place, source).survey() == list(range(source.pieces))


@pytest.mark.parametrize("count", [1, 4, 8, 10])
def test_what_has_come_is_not_fetched_again(source, place, count):
    landing = FolderLanding(place, source)
    came = landing.survey()[:count]
    fill(landing, came)
    # No close: as a process that was killed leaves it.
    again = FolderLanding(place, source)
    left = again.survey()
    assert left == [n for n in range(source.pieces) if n not in came]
    fill(again, left)
    again.close()
    assert read(place) == FILES
    landing.close()


def test_what_a_dead_process_left_is_not_believed(source, place):
    landing = FolderLanding(place, source)
    fill(landing, landing.survey()[1:4])
    landing.close()
    (part,) = place.glob(".model-1.*.part")
    with open(part, "r+b") as file:
        file.seek(SIZE)
        file.write(b"torn")
    again = FolderLanding(place, source)
    left = again.survey()
    start = source.numbers(2).start
    assert start + 1 in left
    fill(again, left)
    again.close()
    assert read(place) == FILES


def test_files_that_are_here_are_kept_and_the_folder_then_is_whole(source, place):
    for name in ("config.json", "model-1.safetensors"):
        (place / name).write_bytes(FILES[name])
    before = (place / "model-1.safetensors").stat()
    landing = FolderLanding(place, source)
    missing = landing.survey()
    assert {source.files[source.piece(n).file].name for n in missing} == {
        "model-2.safetensors",
        "tokenizer.json",
    }
    fill(landing, missing)
    landing.close()
    assert read(place) == FILES
    assert (place / "model-1.safetensors").stat().st_ino == before.st_ino
    again = FolderLanding(place, source)
    assert again.survey() == []
    assert again.whole


@pytest.mark.parametrize("other", [b"", b"{}" * 9, b'{"a": 2}'])
def test_another_file_of_the_same_name_is_never_overwritten(source, place, other):
    (place / "config.json").write_bytes(other)
    landing = FolderLanding(place, source)
    with pytest.raises(WeightsDifferError, match=r"config\.json is here and is not what"):
        landing.survey()
    landing.close()
    assert (place / "config.json").read_bytes() == other


def test_parts_of_another_folder_are_swept_and_nothing_else(source, place):
    (place / f".model-1.safetensors.{'0' * 16}.part").write_bytes(b"old")
    (place / "notes").write_bytes(b"mine")
    (place / ".lock").touch()
    landing = FolderLanding(place, source)
    fill(landing, landing.survey())
    landing.close()
    assert read(place) == FILES | {"notes": b"mine", ".lock": b""}


def test_a_link_in_a_parts_place_is_not_followed(source, place, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    suffix = f".{source.digest.hex()[:16]}.part"
    (place / f".config.json{suffix}").symlink_to(victim)
    landing = FolderLanding(place, source)
    with pytest.raises(OSError, match=r"(?i)symbolic link") as raised:
        landing.survey()
    assert raised.value.errno == errno.ELOOP
    landing.close()
    assert victim.read_bytes() == b"precious"


def test_a_full_disk_is_told_and_what_came_before_stays(source, place, monkeypatch):
    landing = FolderLanding(place, source)
    missing = landing.survey()
    write, calls = os.pwrite, itertools.count()

    def full(fd, data, offset):
        if next(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[: SIZE // 2], offset)  # as the system may

    monkeypatch.setattr(os, "pwrite", full)
    fill(landing, missing[:2])
    with pytest.raises(OSError, match="No space"):
        fill(landing, missing[2:3])
    landing.close()
    monkeypatch.undo()
    assert FolderLanding(place, source).survey() == missing[2:]
