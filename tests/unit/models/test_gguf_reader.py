"""Reading GGUF: the same as the reference library, and nothing but ModelFileError for damage."""

import contextlib
from pathlib import Path

import gguf as reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.models import gguf, llama, weights
from services.engine.models.errors import ModelFileError


def test_reads_what_the_reference_library_reads(tiny_gguf: Path) -> None:
    ours, theirs = gguf.read(tiny_gguf), reference.GGUFReader(tiny_gguf)
    expected = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == expected
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.shape == tuple(reversed(tensor.shape.tolist()))
        np.testing.assert_array_equal(
            weights.stored_bytes(ours, found).ravel(),
            np.asarray(tensor.data).view(np.uint8).ravel(),
        )


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (200, "uint8"),
        (-100, "int8"),
        (60000, "uint16"),
        (-30000, "int16"),
        (4_000_000_000, "uint32"),
        (-2_000_000_000, "int32"),
        (2**63, "uint64"),
        (-(2**62), "int64"),
        (0.5, "float32"),
        (1e300, "float64"),
        (True, "bool"),
        ("häß 日本", "string"),
    ],
)
def test_every_kind_of_value(tmp_path: Path, value: object, kind: str) -> None:
    writer = reference.GGUFWriter(tmp_path / "x.gguf", "llama")
    getattr(writer, f"add_{kind}")("key", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = gguf.read(tmp_path / "x.gguf").metadata["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a GGUF file"),
        (b"PK\x03\x04" + b"\0" * 40, "not a GGUF file: it begins with b'PK"),
        (b"GGUF", "truncated or damaged: version at byte 4 needs 4 bytes, but the file ends at 4"),
        (b"GGUF\x01\0\0\0" + b"\0" * 16, "version 1 can't be read"),
        (b"GGUF\0\0\0\x03" + b"\0" * 16, "version 50331648 can't be read"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 8 + b"\0" * 8, "tensor count at byte 8 is 18446744073"),
    ],
)
def test_headers_that_cannot_be(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError) as caught:
        gguf.read(path)
    assert says in caught.value.message
    assert str(path) in caught.value.message


def read_whole(path: Path) -> None:
    """All that a conversion looks at before it writes."""
    file = gguf.read(path)
    shape = llama.shape_of(file)
    for weight in llama.weights_of(file, shape):
        weights.stored_bytes(file, weight.source)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_every_truncation_is_an_error_of_the_file(
    tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = tiny_gguf.read_bytes()
    # The last bytes are padding behind the last tensor's data.
    cut = data.draw(st.integers(0, len(whole) - 33))
    path = tmp_path_factory.mktemp("cut") / "cut.gguf"
    path.write_bytes(whole[:cut])
    with pytest.raises(ModelFileError):
        read_whole(path)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damage_is_an_error_of_the_file_or_not_seen(
    tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    damaged = bytearray(tiny_gguf.read_bytes())
    header = min(t.offset for t in gguf.read(tiny_gguf).tensors.values())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "damaged.gguf"
    path.write_bytes(damaged)
    with contextlib.suppress(ModelFileError):  # no other error
        read_whole(path)


def test_wrong_kinds_and_missing_keys_are_named(tiny_gguf: Path) -> None:
    file = gguf.read(tiny_gguf)
    with pytest.raises(ModelFileError, match=r"metadata key no\.such\.key is missing"):
        file.get("no.such.key", int)
    with pytest.raises(ModelFileError, match=r"llama\.block_count is a int, not a str"):
        file.get("llama.block_count", str)
    assert file.get("no.such.key", int, 7) == 7
    assert file.optional("no.such.key", int) is None
