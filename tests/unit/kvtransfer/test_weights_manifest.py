"""What a folder's description says, and which descriptions nobody may send."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.errors import WeightsInvalidError, WeightsNotGivenError
from kvtransfer.weights import describing, wire
from kvtransfer.weights.describing import Digests, describe
from kvtransfer.weights.manifest import (
    DIGEST_BYTES,
    LARGEST_PIECE,
    MAX_FILES,
    SMALLEST_PIECE,
    File,
    Manifest,
)
from kvtransfer.weights.pace import BURST_SECONDS, Pace
from tandem.weights.v1 import weights_pb2 as pb

SIZE = SMALLEST_PIECE


def file(name: str, size: int, fill: bytes = b"d") -> File:
    return File(name, size, fill * (DIGEST_BYTES * -(-size // SIZE)))


NAMES = st.lists(
    st.from_regex(r"\A[a-z]{1,8}\.(json|safetensors)\Z"), min_size=1, max_size=6, unique=True
)


@settings(max_examples=25)
@given(NAMES, st.data())
def test_pieces_cover_every_byte_of_every_file_once(names, data):
    sizes = [data.draw(st.integers(0, 5 * SIZE)) for _ in names]
    manifest = Manifest(SIZE, tuple(map(file, sorted(names), sizes)))
    covered = dict.fromkeys(range(len(names)), 0)
    for number in range(manifest.pieces):
        piece = manifest.piece(number)
        assert number in manifest.numbers(piece.file)
        assert piece.offset == covered[piece.file]
        assert 0 < piece.length <= SIZE
        covered[piece.file] += piece.length
    assert list(covered.values()) == sizes
    for number in (-1, manifest.pieces):
        with pytest.raises(WeightsInvalidError):
            manifest.piece(number)


@settings(max_examples=25)
@given(NAMES, st.integers(0, 3 * SIZE))
def test_a_manifest_travels(names, size):
    manifest = Manifest(SIZE, tuple(file(name, size) for name in sorted(names)))
    reader = wire.ManifestReader()
    assert reader.take(pb.DescribeResponse(reading=pb.Reading(done=1, total=2))).total == 2
    for message in wire.described(manifest):
        assert reader.take(pb.DescribeResponse.FromString(message.SerializeToString())) is None
    assert reader.manifest() == manifest


def test_a_file_of_many_pieces_travels_in_parts(monkeypatch):
    monkeypatch.setattr(wire, "DIGESTS_IN_A_MESSAGE", 2)
    manifest = Manifest(SIZE, (file("a.json", 7), file("b.safetensors", 5 * SIZE)))
    messages = list(wire.described(manifest))
    assert len(messages) == 1 + 1 + 3
    reader = wire.ManifestReader()
    for message in messages:
        reader.take(message)
    assert reader.manifest() == manifest


@pytest.mark.parametrize(
    "name",
    [
        "../config.json",
        "/etc/config.json",
        "a/config.json",
        "a\\config.json",
        "..",
        ".json",
        ".lock",
        ".config.json",
        "",
        "model.py",
        "tokenizer.so",
        "config.json\n",
        "config.json\0",
        "con\u2044fig.json",
        "x" * 300 + ".json",
    ],
)
def test_no_name_leaves_the_folder_or_brings_code(name):
    with pytest.raises(WeightsInvalidError, match="no name of a model's file"):
        Manifest(SIZE, (file(name, 1),))


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ((), "0 files"),
        ((file("a.json", 1), file("a.json", 1)), "two files"),
        ((file("A.json", 1), file("a.json", 1)), "two files"),
        ((file("b.json", 1), file("a.json", 1)), "order"),
        ((File("a.json", 2**62, b"d" * 32),), "bytes of digests"),
        ((File("a.json", -1, b""),), "bytes of digests"),
        ((File("a.json", 1, b""),), "bytes of digests"),
        ((File("a.json", 1, b"short"),), "bytes of digests"),
        ((File("a.json", 0, b"d" * 32),), "bytes of digests"),
    ],
)
def test_a_folder_that_cannot_be_is_refused(files, why):
    with pytest.raises(WeightsInvalidError, match=why):
        Manifest(SIZE, files)


@pytest.mark.parametrize("size", [0, SMALLEST_PIECE - 1, LARGEST_PIECE + 1, 2**32])
def test_pieces_of_absurd_size_are_refused(size):
    with pytest.raises(WeightsInvalidError, match="pieces of"):
        Manifest(size, (File("a.json", 0, b""),))


def test_everything_is_in_the_digest():
    manifest = Manifest(SIZE, (file("a.json", 1), file("b.json", SIZE + 1)))
    one, two = manifest.files
    others = [
        Manifest(2 * SIZE, (one, replace(two, digests=two.digests[:32]))),
        Manifest(SIZE, (replace(one, name="aa.json"), two)),
        Manifest(SIZE, (replace(one, size=2), two)),
        Manifest(SIZE, (replace(one, digests=b"e" * 32), two)),
        Manifest(SIZE, (one,)),
    ]
    assert len({m.digest for m in [manifest, *others]}) == 6
    assert Manifest(SIZE, (one, two)).digest == manifest.digest


def folder_message(files=1, digest=b"x" * 32, piece_bytes=SIZE):
    return pb.DescribeResponse(
        folder=pb.Folder(digest=digest, piece_bytes=piece_bytes, files=files)
    )


def part(name="a.json", size=1, digests=b"d" * 32):
    return pb.DescribeResponse(file=pb.FilePart(name=name, size=size, digests=digests))


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([], "no folder"),
        ([part()], "order"),
        ([folder_message(), folder_message()], "order"),
        ([folder_message(), pb.DescribeResponse(reading=pb.Reading())], "order"),
        ([pb.DescribeResponse()], "order"),
        ([folder_message(files=2), part()], "1 files were described of 2"),
        ([folder_message(), part()], "digest is not that"),
        ([folder_message(), *(part(f"{i}.json") for i in range(MAX_FILES + 1))], "too long"),
    ],
)
def test_a_description_that_cannot_be_is_refused(messages, why):
    reader = wire.ManifestReader()
    with pytest.raises(WeightsInvalidError, match=why):  # noqa: PT012 - any of them may say so
        for message in messages:
            reader.take(message)
        reader.manifest()


def write(folder, **files):
    for name, data in files.items():
        (folder / name.replace("_", ".")).write_bytes(data)


def test_a_folder_is_read_once(tmp_path, monkeypatch):
    folder, memory = tmp_path / "model", tmp_path / "digests" / "x.json"
    folder.mkdir()
    write(folder, config_json=b"{}", model_safetensors=b"m" * (2 * SIZE + 1), run_py=b"evil")
    (folder / ".lock").touch()
    (folder / "sub.json").mkdir()
    read = []
    manifest = describe(folder, Digests(memory), read.append, piece_bytes=SIZE)
    assert [f.name for f in manifest.files] == ["config.json", "model.safetensors"]
    assert sum(read) == manifest.nbytes == describing.total_bytes(folder)
    last = manifest.piece(manifest.pieces - 1)
    assert (last.length, last.digest) == (1, hashlib.sha256(b"m").digest())

    def nobody(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(describing, "digests_of", nobody)
    assert describe(folder, Digests(memory), piece_bytes=SIZE) == manifest
    monkeypatch.undo()
    write(folder, model_safetensors=b"n" * (2 * SIZE + 1))
    os.utime(folder / "model.safetensors", (1, 1))  # two writes may have one time
    changed = describe(folder, Digests(memory), piece_bytes=SIZE)
    assert changed.digest != manifest.digest


@pytest.mark.parametrize("said", [b"", b"[]", b"{}", b'{"format": 1, "piece_bytes": 4096}'])
def test_a_spoilt_memory_only_costs_reading(tmp_path, said):
    folder, memory = tmp_path / "model", tmp_path / "x.json"
    folder.mkdir()
    write(folder, config_json=b"{}")
    memory.write_bytes(said)
    known = describe(folder, Digests(memory), piece_bytes=SIZE)
    assert known == describe(folder, Digests(), piece_bytes=SIZE)


def test_a_folder_without_a_model_gives_nothing(tmp_path):
    with pytest.raises(WeightsNotGivenError, match="no files of a model"):
        describe(tmp_path, Digests())


def test_the_pace_is_kept_on_average_and_changes_at_once():
    pace, now = Pace(), 100.0
    began = now
    for _ in range(50):
        now += pace.wait(10, 100.0, now)
    assert now - began == pytest.approx(49 * 0.1 - BURST_SECONDS, abs=0.06)
    assert pace.wait(10**9, 0.0, now) == 0.0
    assert pace.wait(10, 100.0, now) == 0.0
    # What was not used for long is not made up for.
    now += 60
    waits = [pace.wait(10, 100.0, now) for _ in range(3)]
    assert waits[0] == 0.0
    assert waits[2] == pytest.approx(0.2 - BURST_SECONDS)
