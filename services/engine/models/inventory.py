"""What models are on this machine, and whether they are whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from kvtransfer.weights.describing import Digests, describe
from kvtransfer.weights.manifest import PIECE_BYTES
from services.engine.models import cache, convert
from services.engine.models.catalog import CATALOG, CatalogModel
from services.engine.models.convert import MANIFEST, Progress, Watch, unwatched
from services.engine.models.errors import ModelFileError, ModelNotFoundError
from services.engine.models.folder import PEERS, ModelFolder, check_weights, read_json
from services.engine.models.peers import digests_of
from services.engine.models.shipped import SHIPPED, ShippedModel
from services.engine.models.text import Tokenizer


@dataclass(frozen=True, slots=True)
class Entry:
    """A model of the catalogue or shipped, a local GGUF file's conversion, or one from workers.

    known: of the first two. folder: what engines load, None if it is not there.
    file: the GGUF file kept in the cache, None if there is none. nbytes: what both take.
    """

    name: str
    known: CatalogModel | ShippedModel | None
    folder: Path | None
    file: Path | None
    nbytes: int

    @property
    def origin(self) -> str:
        """Where one comes from that is not known."""
        fetched = self.folder is not None and self.folder.parent.name == PEERS
        return "fetched from workers" if fetched else "converted from a local file"


def entries(models: Path) -> list[Entry]:
    """Every model of the catalogue, here or not, those shipped, then all others that are here."""
    found = [_of_catalogue(known, models) for known in CATALOG.values()]
    found += [
        Entry(known.name, known, known.folder, None, _size(known.folder))
        for known in SHIPPED.values()
        if known.folder.is_dir()
    ]
    for folder in sorted((models / "local").glob(f"hf-*-v{convert.CONVERTER_VERSION}")):
        name = str(read_json(folder / MANIFEST).get("source", folder.name))
        found.append(Entry(name, None, folder, None, _size(folder)))
    for folder in sorted((models / PEERS).glob("model-*")):
        if (folder / "config.json").is_file():
            name = unquote(folder.name.removeprefix("model-"))
            found.append(Entry(name, None, folder, None, _size(folder)))
    return found


def check(entry: Entry, watch: Watch = unwatched) -> None:
    """Reads every byte of a model and compares it with what was fetched and converted.

    Raises ModelNotFoundError, ModelFileError for the first file that is wrong.
    """
    if entry.folder is None:
        raise ModelNotFoundError(
            f"{entry.name} is not here: `tandem models fetch {entry.name}` brings it",
            model=entry.name,
        )
    advance = _counted(entry.nbytes, watch)
    if entry.folder.parent.name == PEERS:
        _compare_pieces(entry.folder, advance)
        check_folder(ModelFolder(entry.folder, entry.name))
        return
    if isinstance(entry.known, CatalogModel) and entry.file is not None:
        _compare(entry.file, entry.known.gguf_sha256, advance)
    expected = read_json(entry.folder / MANIFEST).get("sha256")
    if not isinstance(expected, dict) or "model.safetensors" not in expected:
        raise ModelFileError(entry.folder / MANIFEST, "sha256 does not name the model's files")
    for name, sha256 in expected.items():
        _compare(entry.folder / name, str(sha256), advance)
    check_folder(ModelFolder(entry.folder, entry.name))


def check_folder(folder: ModelFolder) -> None:
    """Whether a Hugging Face folder, wherever it is from, has what serving needs.

    Reads config and tokenizer, and the lengths of the weights. Raises ModelFileError.
    """
    _ = folder.context_tokens, folder.vocabulary, folder.eos_token_ids, folder.bos_token_id
    check_weights(folder.path)
    Tokenizer(folder)


def _of_catalogue(known: CatalogModel, models: Path) -> Entry:
    home = models / known.name
    folder: Path | None = convert.folder_for(home, known.gguf_sha256)
    file: Path | None = home / known.gguf
    folder = folder if folder is not None and folder.is_dir() else None
    file = file if file is not None and file.is_file() else None
    size = sum(_size(path) for path in (folder, file) if path is not None)
    return Entry(known.name, known, folder, file, size)


def _size(path: Path) -> int:
    paths = path.iterdir() if path.is_dir() else [path]
    return sum(p.stat().st_size for p in paths)


def _counted(total: int, watch: Watch) -> Callable[[int], None]:
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        watch(Progress("check", min(done, total), max(total, 1)))

    return advance


def _compare_pieces(folder: Path, advance: Callable[[int], None]) -> None:
    """Raises ModelFileError for the first file that is not what came."""
    known = digests_of(folder, folder.parent.parent).recall(PIECE_BYTES)
    for file in describe(folder, Digests(), advance).files:
        if file.name not in known or known[file.name][1] != file.digests:
            raise ModelFileError(folder / file.name, "is not what was fetched")


def _compare(path: Path, expected: str, advance: Callable[[int], None]) -> None:
    try:
        found = cache.sha256_of(path, advance)
    except FileNotFoundError:
        raise ModelFileError(path, "missing") from None
    if found != expected:
        raise ModelFileError(path, f"damaged: its SHA-256 is {found}, expected {expected}")
