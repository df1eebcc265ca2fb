"""From settings to a folder, and what is said when there is none."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from services.engine.models import cache, catalog, convert
from services.engine.models.errors import ModelFileError, ModelNotFoundError
from services.engine.models.folder import ModelFolder, check_weights, resolve
from services.engine.models.text import Tokenizer
from services.runtime.settings import ModelSettings

NAME = "smollm2-135m-instruct"


def test_a_hugging_face_folder_by_path(hf_folder: Path, tmp_path: Path) -> None:
    folder = resolve(ModelSettings(name="mine", path=str(hf_folder)), tmp_path / "cache")
    assert (folder.path, folder.name) == (hf_folder, "mine")
    assert (folder.context_tokens, folder.vocabulary) == (128, 300)
    assert (folder.bos_token_id, folder.eos_token_ids) == (1, (2,))
    assert not (tmp_path / "cache").exists()


def test_a_gguf_file_by_path_is_converted_once(tiny_gguf: Path, tmp_path: Path) -> None:
    settings = ModelSettings(name="mine", path=str(tiny_gguf))
    folder = resolve(settings, tmp_path)
    assert folder.path.parent == tmp_path / "local"
    assert Tokenizer(folder).encode("the")
    assert resolve(settings, tmp_path) == folder


def test_the_same_bytes_elsewhere_are_the_same_folder(tiny_gguf: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.GGUF"
    shutil.copy(tiny_gguf, copy)
    first = resolve(ModelSettings(path=str(tiny_gguf)), tmp_path / "cache")
    assert resolve(ModelSettings(path=str(copy)), tmp_path / "cache") == first


def test_a_model_of_the_catalogue_that_is_not_here(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=f"`tandem models fetch {NAME}` brings it"):
        resolve(ModelSettings(name=NAME), tmp_path)


def test_a_model_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=f"'gpt-9'; `tandem models` knows {NAME}"):
        resolve(ModelSettings(name="gpt-9"), tmp_path)


def test_what_an_older_converter_made_is_made_anew(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = catalog.CATALOG[NAME]
    home = tmp_path / NAME
    home.mkdir()
    shutil.copy(tiny_gguf, home / known.gguf)
    monkeypatch.setattr(convert, "CONVERTER_VERSION", 0)
    old = resolve(ModelSettings(name=NAME), tmp_path)
    monkeypatch.undo()
    assert resolve(ModelSettings(name=NAME), tmp_path).path != old.path


@pytest.mark.parametrize(
    ("path", "says"),
    [("none", "none does not exist"), ("x.bin", "x.bin: neither a folder nor a .gguf file")],
)
def test_paths_that_are_no_model(tmp_path: Path, path: str, says: str) -> None:
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises((ModelNotFoundError, ModelFileError)) as caught:
        resolve(ModelSettings(path=str(tmp_path / path)), tmp_path)
    assert says in caught.value.message


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(hf_folder: Path, file: str) -> None:
    (hf_folder / file).unlink()
    with pytest.raises(ModelFileError, match=f"{file}: missing"):
        resolve(ModelSettings(path=str(hf_folder)), hf_folder)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "config.json: max_position_embeddings is None, expected a positive integer"),
        ({"max_position_embeddings": "8k"}, "max_position_embeddings is '8k'"),
        ({"max_position_embeddings": True}, "max_position_embeddings is True"),
        ({"max_position_embeddings": 8}, "config.json: vocab_size is None"),
        (
            {"max_position_embeddings": 8, "vocab_size": 9, "eos_token_id": 9},
            "config.json: eos_token_id is 9, expected an id below 9",
        ),
        (
            {"max_position_embeddings": 8, "vocab_size": 9, "bos_token_id": -1},
            "config.json: bos_token_id is -1",
        ),
    ],
)
def test_a_bad_value_is_named(hf_folder: Path, config: dict[str, Any], says: str) -> None:
    (hf_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFileError) as caught:
        resolve(ModelSettings(path=str(hf_folder)), hf_folder)
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"{", "can't be read as JSON"), (b"[]", "a JSON list"), (b"\xff\xfe", "can't be read")],
)
def test_json_that_is_none(hf_folder: Path, content: bytes, says: str) -> None:
    (hf_folder / "config.json").write_bytes(content)
    with pytest.raises(ModelFileError, match=says):
        resolve(ModelSettings(path=str(hf_folder)), hf_folder)


@pytest.mark.parametrize(
    ("generation", "ids"),
    [({"eos_token_id": [5, 2, 5]}, (2, 5)), ({"eos_token_id": 7}, (7,)), ({}, (2,))],
)
def test_ends_come_from_the_generation_config_first(
    hf_folder: Path, generation: dict[str, Any], ids: tuple[int, ...]
) -> None:
    (hf_folder / "generation_config.json").write_text(json.dumps(generation))
    assert ModelFolder(hf_folder, "x").eos_token_ids == ids


def test_a_model_without_ends(hf_folder: Path) -> None:
    (hf_folder / "config.json").write_text('{"max_position_embeddings": 8, "vocab_size": 9}')
    folder = ModelFolder(hf_folder, "x")
    assert (folder.eos_token_ids, folder.bos_token_id) == ((), None)


def test_more_tokens_than_the_embedding_has(hf_folder: Path) -> None:
    config = json.loads((hf_folder / "config.json").read_text()) | {"vocab_size": 100}
    (hf_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFileError, match=r"has 268 tokens, config\.json's vocab_size is 100"):
        Tokenizer(ModelFolder(hf_folder, "x"))


def test_a_tokenizer_that_is_none(hf_folder: Path) -> None:
    (hf_folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ModelFileError, match=r"tokenizer\.json: can't be read as a tokenizer"):
        Tokenizer(ModelFolder(hf_folder, "x"))


def test_weights_whole_and_cut(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones((3, 4), np.float32), "b": np.zeros(5, np.float16)}, path)
    check_weights(tmp_path)
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 20, 8, 7, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelFileError, match=r"model\.safetensors: truncated or damaged"):
            check_weights(tmp_path)
    path.write_bytes(whole + b"x")
    with pytest.raises(ModelFileError, match=f"{len(whole) + 1} bytes long"):
        check_weights(tmp_path)
    path.unlink()
    with pytest.raises(ModelFileError, match=r"model\.safetensors: missing"):
        check_weights(tmp_path)


def test_sharded_weights(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "model-1.safetensors")
    with pytest.raises(ModelFileError, match=r"model-2\.safetensors: missing"):
        check_weights(tmp_path)
    save_file({"b": np.ones(3, np.float32)}, tmp_path / "model-2.safetensors")
    check_weights(tmp_path)


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/tandem/models"),
        ({"HOME": "/h"}, "/h/.cache/tandem/models"),
        ({"XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/tandem/models"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/tandem/models"),
    ],
)
def test_where_models_are_kept(environ: dict[str, str], folder: str) -> None:
    assert cache.cache_folder(environ) == Path(folder)
