"""GGUF file to Hugging Face folder, once: the result is kept by the file's hash."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from services.engine.models import cache, gguf, llama, vocabulary, weights
from services.engine.models.errors import ModelFetchError

CONVERTER_VERSION = 1
"""Raised whenever the same GGUF file would give other files, so that old results are not used."""

MANIFEST = "tandem.json"

Stage = Literal["download", "check", "extract", "convert", "wait"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a stage is; bytes, or numbers converted. `total` is at least 1."""

    stage: Stage
    done: int
    total: int


Watch = Callable[[Progress], None]


def unwatched(progress: Progress) -> None:
    """For who does not look."""


def folder_for(parent: Path, sha256: str) -> Path:
    """Where the conversion of the GGUF file with this hash is, once made."""
    return parent / f"hf-{sha256[:16]}-v{CONVERTER_VERSION}"


def convert(path: Path, sha256: str, parent: Path, watch: Watch = unwatched) -> Path:
    """The Hugging Face folder made from a GGUF file; made now if it is not there yet.

    Takes the lock of `parent`. Raises ModelFileError, ModelSpaceError, ModelFetchError.
    """
    place = folder_for(parent, sha256)
    if place.is_dir():
        return place
    with cache.locked(parent, lambda: watch(Progress("wait", 0, 1))):
        return convert_locked(path, sha256, parent, watch)


def convert_locked(path: Path, sha256: str, parent: Path, watch: Watch = unwatched) -> Path:
    """As convert(), the lock being held."""
    place = folder_for(parent, sha256)
    if place.is_dir():
        return place
    _need_gguf_package()
    with cache.part(parent) as work:
        made = work / place.name
        made.mkdir()
        _write(path, sha256, made, watch)
        cache.publish(made, place)
    return place


def _write(path: Path, sha256: str, made: Path, watch: Watch) -> None:
    file = gguf.read(path)
    shape = llama.shape_of(file)
    tensors = llama.weights_of(file, shape)
    rope = file.tensors.get(llama.ROPE_FACTORS)
    factors = weights.rope_factors(file, rope) if rope is not None else None
    config = llama.config_json(file, shape, factors)
    _json(made / "config.json", config)
    _json(
        made / "generation_config.json",
        {"bos_token_id": config["bos_token_id"], "eos_token_id": vocabulary.end_ids(file)},
    )
    vocabulary.tokenizer_json(file).save(str(made / "tokenizer.json"), pretty=False)
    _json(made / "tokenizer_config.json", vocabulary.tokenizer_config(file))

    total = sum(t.source.elements for t in tensors)
    cache.need_space(made, 2 * total)
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        watch(Progress("convert", done, total))

    weights.write(file, tensors, made / "model.safetensors", advance)
    files = {p.name: cache.sha256_of(p) for p in sorted(made.iterdir())}
    _json(
        made / MANIFEST,
        {
            "converter": CONVERTER_VERSION,
            "source": path.name,
            "source_sha256": sha256,
            "sha256": files,
        },
    )


def _need_gguf_package() -> None:
    import importlib.util

    if importlib.util.find_spec("gguf") is None:
        raise ModelFetchError(
            "a GGUF file has to be converted, which needs the package gguf: "
            "pip install 'tandem-serving[torch]'"
        )


def _json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
