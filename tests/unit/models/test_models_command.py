"""`tandem models` as a person sees it."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.models import app
from services.engine.models import catalog, convert

NAME = "smollm2-135m-instruct"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "tandem" / "models"


def asked(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


def test_the_list_shows_what_could_be_here(cache: Path) -> None:
    status, output = asked()
    assert status == 0
    line = next(line for line in output.splitlines() if line.startswith(NAME))
    assert "not here" in line
    assert "8192" in line
    assert "Apache-2.0" in line
    assert str(cache) in output


def test_the_list_shows_what_is_here(cache: Path, tiny_gguf: Path) -> None:
    known = catalog.CATALOG[NAME]
    (cache / NAME).mkdir(parents=True)
    shutil.copy(tiny_gguf, cache / NAME / known.gguf)
    assert "to be converted at first use" in asked()[1]
    convert.convert(tiny_gguf, known.gguf_sha256, cache / NAME)
    assert "ready" in asked()[1]


def test_an_unknown_name() -> None:
    for command in ("fetch", "check"):
        status, output = asked(command, "gpt-9")
        assert status == 1
        assert f"`tandem models` knows {NAME}" in output


def test_what_was_not_fetched_is_not_checked() -> None:
    status, output = asked("check")
    assert status == 0
    assert "tiny-deepseek: whole" in output
    assert NAME not in output
    assert asked("check", NAME)[0] == 1


def test_a_model_that_comes_with_tandem_needs_no_fetching(cache: Path) -> None:
    status, output = asked("fetch", "tiny-deepseek")
    assert status == 0
    assert "comes with Tandem" in output
    assert not cache.exists()
    line = next(line for line in asked()[1].splitlines() if line.startswith("tiny-deepseek"))
    assert "ready" in line
    assert "4096" in line


def test_a_wrong_file_is_not_taken(cache: Path, tiny_gguf: Path) -> None:
    status, output = asked("fetch", NAME, "--from", str(tiny_gguf))
    assert status == 1
    assert "its SHA-256 is" in output
    assert [p.name for p in (cache / NAME).iterdir()] == [".lock"]


def test_a_file_by_path(tiny_gguf: Path) -> None:
    status, output = asked("check", str(tiny_gguf))
    assert (status, output) == (0, f"{tiny_gguf}: can be served (128 tokens of context)\n")


def test_damage_is_named_and_fails(cache: Path, tiny_gguf: Path) -> None:
    asked("check", str(tiny_gguf))
    folder = next((cache / "local").glob("hf-*"))
    status, output = asked("check")
    assert status == 0
    assert "tiny.gguf: whole" in output
    (folder / "config.json").write_text("{}")
    status, output = asked("check")
    assert status == 1
    assert "config.json: damaged" in output
    assert str(folder) in output
