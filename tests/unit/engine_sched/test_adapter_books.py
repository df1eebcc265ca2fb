"""What names an adapter, where one may be read from, and the books of who has which."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engine.adapters import (
    LINGER_SECONDS,
    Adapter,
    AdapterBooks,
    AdapterLimits,
    check_name,
    folder_within,
    name_of,
    named_paths,
    read_files,
)
from services.engine.models.errors import UnsupportedAdapterError
from services.runtime.errors import (
    AdapterLimitError,
    AdapterNotLoadedError,
    InvalidRequestError,
    UnknownAdapterError,
)

LIMITS = AdapterLimits(count=3, rank=16, bytes=1000)


def adapter(adapter_id, rank=8, size=100):
    return Adapter(adapter_id, rank, size)


def write(folder, config=b"{}", weights=b"w"):
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


class TestNames:
    @pytest.mark.parametrize("name", ["a", "legal-2", "0.x_y", "a" * 64])
    def test_good_ones(self, name):
        assert check_name(name) == name
        assert name_of(f"{name}@{'0' * 32}") == name

    @pytest.mark.parametrize(
        "name", ["", "a" * 65, ".hidden", "a@b", "a/b", "a=b", "a\n", "ä", ".."]
    )
    def test_bad_ones(self, name):
        with pytest.raises(InvalidRequestError, match="name"):
            check_name(name)


class TestDigest:
    def test_is_of_both_files(self, tmp_path):
        one = read_files("n", write(tmp_path / "1", b"{}", b"w"), LIMITS).id
        assert read_files("n", write(tmp_path / "2", b"{}", b"w"), LIMITS).id == one
        assert read_files("m", tmp_path / "1", LIMITS).id == "m" + one[1:]
        others = [(b"{ }", b"w"), (b"{}", b"v"), (b"{}w", b""), (b"", b"{}w")]
        ids = {
            read_files("n", write(tmp_path / f"3{i}", *files), LIMITS).id
            for i, files in enumerate(others)
        }
        assert len(ids | {one}) == 5


class TestPaths:
    def test_below_the_folder_alone(self, tmp_path):
        root = tmp_path / "root"
        write(root / "in" / "deeper")
        write(tmp_path / "out")
        (root / "link").symlink_to(tmp_path / "out")
        assert folder_within(str(root), "in/deeper") == root / "in" / "deeper"
        assert folder_within(str(root), "in/../in") == root / "in"
        for path in (
            "..",
            ".",
            "",
            "../out",
            "/etc",
            str(tmp_path / "out"),
            "link",
            "in/../..",
            "\0",
        ):
            with pytest.raises(InvalidRequestError, match="path"):
                folder_within(str(root), path)

    def test_off_without_a_folder(self):
        with pytest.raises(InvalidRequestError, match=r"engine\.adapter_folder is not set"):
            folder_within("", "a")

    def test_files_that_lead_out(self, tmp_path):
        root = tmp_path / "root"
        folder = write(root / "a")
        weights = folder / "adapter_model.safetensors"
        weights.unlink()
        (tmp_path / "secret").write_bytes(b"s")
        weights.symlink_to(tmp_path / "secret")
        with pytest.raises(UnsupportedAdapterError, match="leads out of"):
            read_files("a", folder, LIMITS, str(root))
        # A cache of models is made of links: within the folder they are followed.
        (root / "blob").write_bytes(b"w")
        weights.unlink()
        weights.symlink_to(root / "blob")
        assert read_files("a", folder, LIMITS, str(root)).weights == b"w"

    def test_no_regular_file_is_waited_for(self, tmp_path):
        folder = write(tmp_path / "a")
        (folder / "adapter_model.safetensors").unlink()
        with pytest.raises(UnsupportedAdapterError, match="No such file"):
            read_files("a", folder, LIMITS)
        os.mkfifo(folder / "adapter_model.safetensors")
        with pytest.raises(UnsupportedAdapterError, match="not a regular file"):
            read_files("a", folder, LIMITS)

    def test_a_file_beyond_the_limit_is_not_read(self, tmp_path):
        folder = write(tmp_path / "a", weights=b"w" * 1001)
        with pytest.raises(AdapterLimitError, match="1001 bytes"):
            read_files("a", folder, LIMITS)

    def test_settings(self, tmp_path):
        found = named_paths(["a=x/y", "b=/abs=1"], str(tmp_path))
        assert [(n, str(p)) for n, p in found] == [("a", f"{tmp_path}/x/y"), ("b", "/abs=1")]


class TestBooks:
    def test_one_that_is_unloaded_goes_with_its_last_request(self):
        books = AdapterBooks(LIMITS)
        books.load(adapter("a@1"), 0)
        books.begin("a@1")
        (leaving,) = books.unload("a")
        assert (leaving.requests, leaving.leaving) == (1, True)
        assert books.listed == ()
        with pytest.raises(AdapterNotLoadedError, match="loaded: none"):
            books.check("a@1")
        assert books.take_gone(9) == []
        books.end("a@1")
        assert books.take_gone(9) == ["a@1"]
        with pytest.raises(UnknownAdapterError, match="no adapter 'a' here"):
            books.unload("a")

    def test_one_that_is_replaced_lingers_for_those_on_their_way(self):
        books = AdapterBooks(LIMITS)
        books.load(adapter("a@1"), 0)
        books.load(adapter("a@2"), 10)
        assert books.listed == ("a@2", "a@1")
        books.check("a@1")
        assert books.take_gone(10 + LINGER_SECONDS - 0.1) == []
        assert books.take_gone(10 + LINGER_SECONDS) == ["a@1"]
        assert books.listed == ("a@2",)

    def test_one_that_is_loaded_again_stays(self):
        books = AdapterBooks(LIMITS)
        books.load(adapter("a@1"), 0)
        books.load(adapter("a@2"), 1)
        books.load(adapter("a@1"), 2)
        assert books.listed == ("a@1", "a@2")
        assert books.take_gone(99) == ["a@2"]
        books.begin("a@1")
        books.unload("a")
        books.load(adapter("a@1"), 100)
        assert books.listed == ("a@1",)

    @pytest.mark.parametrize(
        ("another", "words"),
        [
            (adapter("d@1"), "engine.max_adapters is 3; held: a@1, b@1, b@2"),
            (adapter("b@2", rank=17), "engine.max_adapter_rank is 16"),
            (adapter("b@2", size=801), "engine.adapter_memory_mib"),
        ],
    )
    def test_limits_count_those_that_leave(self, another, words):
        books = AdapterBooks(LIMITS)
        for one in ("a@1", "b@1", "b@2"):
            books.load(adapter(one), 0)
        with pytest.raises(AdapterLimitError, match=words):
            books.load(another, 0)
        assert books.listed == ("a@1", "b@2", "b@1")

    @given(
        st.lists(
            st.tuples(
                st.sampled_from(["load", "unload", "begin", "end", "sweep"]),
                st.sampled_from(["a@1", "a@2", "b@1"]),
                st.floats(0, 10),
            ),
            max_size=40,
        )
    )
    def test_what_has_requests_is_never_gone(self, acts):
        books, live, now = AdapterBooks(AdapterLimits(9, 16, 10**6)), [], 0.0
        for act, name, passed in acts:
            now += passed
            if act == "load":
                books.load(adapter(name), now)
                first = next(i for i in books.listed if i[0] == name[0])
                assert first == name
            elif act == "unload":
                try:
                    books.unload(name_of(name))
                except UnknownAdapterError:
                    assert not any(s.adapter.name == name_of(name) for s in books.status())
            elif act == "begin":
                try:
                    books.check(name)
                except AdapterNotLoadedError:
                    assert name not in books.listed
                else:
                    books.begin(name)
                    live.append(name)
            elif act == "end" and live:
                books.end(live.pop())
            else:
                assert not set(books.take_gone(now)) & set(live)
            held = {s.adapter.id: s.requests for s in books.status()}
            assert all(held[i] == live.count(i) for i in live)
